"""Keys of a checkpoint that transformers runs taken after RoPE, in another order of channels than the GGUF's, or of a
checkpoint that the GGUF is not made from: fails here. Needs the `hf` extra; tiny models with random weights."""

from __future__ import annotations

import copy
import runpy
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch_devices
from kvtc_gguf import statistics_file
from kvtc_gguf.capture import LayerSample, channels, rope_pairs
from kvtc_gguf.fingerprint import fingerprint
from kvtc_gguf.format import read
from kvtc_gguf.layout import FormatError
from kvtc_gguf.model_info import ModelInfo
from kvtc_gguf.score import SINKS

torch = pytest.importorskip("torch", reason="needs the hf extra")
transformers = pytest.importorskip("transformers", reason="needs the hf extra")

from kvtc_gguf.capture.transformers import TransformersCapture  # noqa: E402

DEVICES = torch_devices.devices()
T, D, WINDOW = 96, 32, 24
PLAIN: dict[str, Any] = dict(
    vocab_size=64, hidden_size=4 * D, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=D, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
LONG = dict(
    rope_type="longrope", factor=2.0, original_max_position_embeddings=32,
    short_factor=[1.0] * (D // 2), long_factor=[1 + 0.5 * i for i in range(D // 2)],
)  # fmt: skip
GEMMA = ["sliding_attention"] * 2 + ["full_attention"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("Llama", {}),
    "linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))),
    "dynamic": ("Llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4))),
    "yarn": ("Qwen2", dict(rope_parameters=dict(YARN, rope_theta=1e4))),
    "llama3": ("Llama", dict(rope_parameters=dict(LLAMA3, rope_theta=1e4))),
    "longrope, fused": ("Phi3", dict(rope_parameters=dict(LONG, rope_theta=1e4), original_max_position_embeddings=32)),
    "partial": ("StableLm", dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))),
    "QK-norm": ("Qwen3", {}),
    "windows, two kinds of RoPE": ("Gemma3Text", dict(sliding_window=WINDOW, layer_types=GEMMA)),
    "softcap": ("Gemma2", dict(sliding_window=WINDOW, attn_logit_softcapping=5.0)),
    "neighbours": ("Cohere", {}),
    "no RoPE in one layer": ("SmolLM3", dict(no_rope_layers=[1, 0, 1])),
}  # fmt: skip
ROTATED = {"partial": D // 2}


def tokenizer(folder: Path) -> None:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    model = pytest.importorskip("tokenizers").models.WordLevel(words, unk_token="w3")
    plain = pytest.importorskip("tokenizers").Tokenizer(model)
    plain.pre_tokenizer = pytest.importorskip("tokenizers").pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def checkpoint(folder: Path, name: str, seed: int = 0) -> Any:
    family, options = CASES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**copy.deepcopy(PLAIN | options))
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer(folder)
    return model


def key_module(model: Any, layer: int) -> Any:
    return next(m for m in model.modules() if getattr(m, "layer_idx", None) == layer and hasattr(m, "o_proj"))


def gguf_of(model: Any, path: Path, name: str, order: np.ndarray) -> ModelInfo:
    """What `ModelInfo` reads of a GGUF made from the checkpoint whose heads' channels its converter put in `order`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_rope_dimension_count(ROTATED.get(name, D))
    for layer in range(3):
        module = key_module(model, layer)
        fused = hasattr(module, "qkv_proj")
        weight = (module.qkv_proj if fused else module.k_proj).weight.detach().numpy()
        weight = weight.reshape(-1, D, weight.shape[1])
        moved = np.concatenate([weight[:6][:, order], weight[6:]]) if fused else weight[:, order]
        writer.add_tensor(f"blk.{layer}.attn_{'qkv' if fused else 'k'}.weight", moved.reshape(-1, weight.shape[2]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelInfo(path)


def converted(name: str, move: bool) -> tuple[np.ndarray, bool]:
    """(order of channels in the GGUF, whether its pairs are neighbours) with or without the converter's reordering."""
    own = name == "neighbours"
    (_, stays), (order, moved) = list(channels.orders(D, D, own))[:2]
    return (order, moved) if move else (np.arange(D), stays)


def attended(sample: LayerSample, softcap: float) -> np.ndarray:
    """Attention's output [T, n_head * d] by the definition, from a sample."""
    tokens, n_head, d = sample.q.shape
    out = np.zeros((tokens, n_head, d))
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    seen = (distance >= 0) & ((distance < sample.window) | (sample.window == 0))
    for i in range(n_head):
        h = i * sample.k.shape[1] // n_head
        logits = sample.q_rope[:, i].astype(np.float64) @ sample.k_rope[:, h].T
        logits = np.where(seen, softcap * np.tanh(logits / softcap) if softcap else logits, -np.inf)
        weight = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[:, i] = weight / weight.sum(axis=1, keepdims=True) @ sample.v[:, h]
    return out.reshape(tokens, -1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_samples_are_what_the_model_computes(tmp_path: Path, name: str, device: str) -> None:
    model = checkpoint(tmp_path / "hf", name)
    order, interleaved = converted(name, move=name in ("default", "llama3", "QK-norm"))
    info = gguf_of(model, tmp_path / "model.gguf", name, order)
    seen: dict[tuple[int, str], np.ndarray] = {}
    samples: dict[int, LayerSample] = {}
    with TransformersCapture(str(tmp_path / "hf"), info, device) as capture:
        assert capture.interleaved == interleaved and capture.model.device.type == torch.device(device).type
        for layer in range(3):
            module = key_module(capture.model, layer)
            source = getattr(module, "k_norm", None) or getattr(module, "k_proj", None) or module.qkv_proj
            source.register_forward_hook(lambda m, x, y, n=layer: seen.update({(n, "k"): y.cpu().numpy()}))
            module.o_proj.register_forward_pre_hook(lambda m, x, n=layer: seen.update({(n, "o"): x[0].cpu().numpy()}))
        capture.run(
            np.random.default_rng(0).integers(3, 64, T).astype(np.int32), lambda s: samples.update({s.layer: s})
        )
    windows = {"windows, two kinds of RoPE": [WINDOW, WINDOW, 0], "softcap": [WINDOW, 0, WINDOW]}.get(name, [0] * 3)
    assert [samples[n].window for n in range(3)] == windows
    for layer, sample in samples.items():
        assert sample.q.shape == sample.q_rope.shape == (T, 4, D) and sample.v.shape == sample.k.shape == (T, 2, D)
        k = seen[layer, "k"]
        if name == "longrope, fused":
            k = k[..., 4 * D : 6 * D]
        elif k.ndim == 4 and k.shape[1] == 2:  # norms over [1, heads, T, d]
            k = k.transpose(0, 2, 1, 3)
        np.testing.assert_allclose(sample.k, k.reshape(T, 2, D)[..., order], rtol=1e-4, atol=1e-5)
        softcap = 5.0 if name == "softcap" else 0.0
        np.testing.assert_allclose(attended(sample, softcap), seen[layer, "o"].reshape(T, -1), rtol=1e-3, atol=1e-3)
        rotated = not (name == "no RoPE in one layer" and layer == 1)
        pairs = channels.pairing(sample.k, sample.k_rope, ROTATED.get(name, D))
        assert pairs == (interleaved if rotated else None)
        np.testing.assert_allclose(sample.k[..., ROTATED.get(name, D) :], sample.k_rope[..., ROTATED.get(name, D) :])
        lengths = [np.linalg.norm(x[..., rope_pairs(D, D, interleaved)], axis=-1) for x in (sample.q, sample.q_rope)]
        if rotated and name not in ROTATED:
            ratio = lengths[1] / lengths[0]  # the scale of attention, and YaRN's and longrope's magnitude
            np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-3)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "other", "default", seed=1)
    info = gguf_of(model, tmp_path / "model.gguf", "default", np.arange(D))
    checkpoint(tmp_path / "hf", "default")
    with pytest.raises(FormatError, match="not made from this checkpoint"):
        TransformersCapture(str(tmp_path / "hf"), info)
    with pytest.raises(FormatError, match="absent: transformers cannot load"):
        TransformersCapture(str(tmp_path / "absent"), info)


@pytest.mark.parametrize("device", DEVICES)
def test_text_is_tokenized_and_sampled_alike_every_time(tmp_path: Path, device: str) -> None:
    model = checkpoint(tmp_path / "hf", "default")
    info = gguf_of(model, tmp_path / "model.gguf", "default", np.arange(D))
    with TransformersCapture(str(tmp_path / "hf"), info, device) as capture:
        assert capture.tokenize("w7 w9 <s>").tolist()[:2] == [7, 9] and 1 not in capture.tokenize("w7 <s>")
        first, second = capture.sample(3, 20, seed=1), capture.sample(3, 20, seed=1)
    np.testing.assert_array_equal(first, second)
    assert (first[:, 0] == 1).all() and 2 not in first and len({row.tobytes() for row in first}) == 3


@pytest.mark.parametrize("device", DEVICES)
def test_the_convert_script_writes_a_calibration_of_the_gguf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    model = checkpoint(tmp_path / "hf", "QK-norm")
    order, interleaved = converted("QK-norm", move=True)
    info = gguf_of(model, tmp_path / "model.gguf", "QK-norm", order)
    words = np.random.default_rng(0).integers(3, 64, 600)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in words))
    script = Path(__file__).resolve().parents[2] / "convert" / "convert_hf_to_kvtc.py"
    arguments = [tmp_path / "hf", "--model", info.path, "-f", tmp_path / "text.txt", "-c", 256, "-t", 1]
    arguments += ["--statistics", tmp_path / "s.gguf", "--device", device]
    monkeypatch.setattr("sys.argv", [str(a) for a in (script, *arguments)])
    monkeypatch.setattr("sys.path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert not end.value.code
    calibration = read(tmp_path / "model.kvtc.gguf")
    assert calibration.fingerprint == fingerprint(info.path)
    assert (calibration.corpus, calibration.tokens, sorted(calibration.layers)) == ("text.txt", 512, [0, 1, 2])
    moments, keys = statistics_file.read(tmp_path / "s.gguf").moments, []
    with TransformersCapture(str(tmp_path / "hf"), info, device) as capture:
        assert capture.interleaved == interleaved
        for chunk in words[:512].reshape(2, 256).astype(np.int32):
            capture.run(chunk, lambda sample: keys.append((sample.layer, sample.k[SINKS:])))
    for layer in range(3):
        k = np.concatenate([k for n, k in keys if n == layer])
        for h in range(2):
            found = moments[layer]["k_plain"].head(h).covariance
            np.testing.assert_allclose(found, np.cov(k[:, h].T, bias=True), rtol=1e-3, atol=1e-4)
