"""Failures caught: a transformers cache that loses more or less than llama.cpp's on a real model and real text.

Slow (`make hf-test`): SmolLM2 is calibrated with its weights as f32, since 8-bit activations would hide the error.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import driver
import numpy as np
import pytest
import tools
import torch_devices

from bench import heldout
from bench.float_copy import float_copy

torch = pytest.importorskip("torch", reason="needs the hf extra")
transformers = pytest.importorskip("transformers", reason="needs the hf extra")

from kvtc_gguf.hf import KVTCCache  # noqa: E402

pytestmark = pytest.mark.slow
MODEL = tools.ROOT / "build" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
N, TEXTS = 512, 4


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    assert MODEL.is_file(), "run `make models`"
    path = tmp_path_factory.mktemp("real") / "SmolLM2.f32.gguf"
    float_copy(MODEL, path)
    subprocess.run([sys.executable, "-m", "kvtc_gguf.calibrate", path, "--tokens", "4096"], check=True)
    return path


@pytest.fixture(scope="module", params=torch_devices.devices())
def model(request, gguf):
    options = {"gguf_file": gguf.name, "dtype": torch.float32}
    return transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options).eval().to(request.param)


@pytest.fixture(scope="module")
def texts(gguf, tmp_path_factory) -> list[list[int]]:
    """Tokens of a text that the calibration has not seen; both engines get these numbers."""
    text = heldout.find(tmp_path_factory.mktemp("text")).path.read_text(encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokens = tokenizer(text[: 8 * N * TEXTS])["input_ids"]
    assert len(tokens) >= N * TEXTS
    return [tokens[i * N : (i + 1) * N] for i in range(TEXTS)]


@pytest.fixture(scope="module")
def theirs(gguf, texts) -> dict[tuple[str, str], np.ndarray]:
    """Logits of llama.cpp's caches, f32 [TEXTS * N, n_vocab]."""
    loaded, logits = driver.Model(gguf), {}
    for types in (("f16", "f16"), ("kvtc2", "kvtc4"), ("kvtc2", "kvtc2")):
        context = driver.Context(loaded, types, sink=4, window=128, n_ctx=N)
        parts = []
        for tokens in texts:
            context.clear()
            parts.append(context.decode(tokens, 0))
        logits[types] = np.concatenate(parts)
        context.close()
    return logits


def ours(model, texts: list[list[int]], cache: KVTCCache | None) -> np.ndarray:
    """The same of transformers."""
    parts = []
    with torch.inference_mode():
        for tokens in texts:
            ids, fresh = torch.tensor([tokens], device=model.device), cache.fresh() if cache else None
            parts.append(model(ids, past_key_values=fresh, use_cache=cache is not None).logits[0].cpu().numpy())
    return np.concatenate(parts)


def test_kld_is_that_of_llama_cpp(gguf, model, texts, theirs) -> None:
    exact = ours(model, texts, None)
    for bits in ((2, 4), (2, 2)):
        types = tuple(f"kvtc{b}" for b in bits)
        cache = KVTCCache(model, gguf, cache_type="kvtc-k{}v{}".format(*bits), sink=4, window=128)
        kept = driver.kld(theirs["f16", "f16"], theirs[types]), driver.kld(exact, ours(model, texts, cache))
        print(f"{types}: llama.cpp {kept[0]:.6f}, transformers {kept[1]:.6f}")  # pytest -s, for the report
        assert kept[1] == pytest.approx(kept[0], rel=0.05)
