"""A stress model that is another function than the model it was made from, or that stresses nothing, fails here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import synthetic
from kvtc_gguf.gguf_io import Reader

from bench.stress import stress_copy

HEADS, KV, D = 4, 2, 32


def logits(reader: Reader, layer: int, interleaved: bool) -> np.ndarray:
    """q . R k by query head and RoPE pair, [heads, d / 2, n], of random inputs and random rotations of each pair."""
    rng = np.random.default_rng(0)
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    x = rng.standard_normal((tensors[f"blk.{layer}.attn_k.weight"].shape[1], 8)).astype(np.float32)
    parts = []
    for name, heads in (("q", HEADS), ("k", KV)):
        y = tensors[f"blk.{layer}.attn_{name}.weight"] @ x
        y = (y + tensors.get(f"blk.{layer}.attn_{name}.bias", np.zeros(len(y), np.float32))[:, None]).reshape(
            heads, D, -1
        )
        a, b = (y[:, ::2], y[:, 1::2]) if interleaved else (y[:, : D // 2], y[:, D // 2 :])
        parts.append(a + 1j * b)
    turn = np.exp(1j * rng.uniform(0, 6, (D // 2, 1)))
    return (parts[0].conj() * np.repeat(parts[1] * turn, HEADS // KV, axis=0)).real


@pytest.mark.parametrize(("architecture", "interleaved"), [("llama", True), ("qwen2", False)])
def test_stress_model_is_the_same_function_with_large_key_channels(tmp_path: Path, architecture, interleaved) -> None:
    synthetic.tiny_model(tmp_path / "a.gguf", architecture, n_head=HEADS, n_head_kv=KV, head_dim=D)
    stress_copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    plain, stressed = Reader(tmp_path / "a.gguf"), Reader(tmp_path / "b.gguf")
    for layer in range(2):
        np.testing.assert_array_equal(*(logits(r, layer, interleaved) for r in (plain, stressed)))
        keys = [next(t for t in r.tensors if t.name == f"blk.{layer}.attn_k.weight").data for r in (plain, stressed)]
        ratio = np.linalg.norm(keys[1], axis=1) / np.linalg.norm(keys[0], axis=1)
        assert ratio.max() == pytest.approx(64) and ratio.min() == pytest.approx(1)
    assert {t.name for t in plain.tensors} == {t.name for t in stressed.tensors}


def test_models_that_cannot_be_stressed_are_named(tmp_path: Path) -> None:
    synthetic.tiny_model(tmp_path / "half.gguf", dtype=np.float16)
    with pytest.raises(ValueError, match="bench.float_copy"):
        stress_copy(tmp_path / "half.gguf", tmp_path / "b.gguf")
    synthetic.tiny_model(tmp_path / "norm.gguf", "qwen3vl")
    with pytest.raises(ValueError, match="norms queries and keys"):
        stress_copy(tmp_path / "norm.gguf", tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()
