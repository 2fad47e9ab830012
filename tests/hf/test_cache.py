"""Failures caught: a transformers cache (`kvtc_gguf.hf`) whose bytes, logits or error differ from llama.cpp's by one
calibration, on any device (`torch_devices`), that depends on how a text is cut into calls, or takes another model's.
Needs the `hf` extra."""

from __future__ import annotations

from pathlib import Path

import driver
import numpy as np
import pytest
import synthetic
import tools
import torch_devices
from kvtc_gguf.format import write
from kvtc_gguf.layout import FormatError
from kvtc_gguf.reference import decode_rows, encode_rows

torch = pytest.importorskip("torch", reason="needs the hf extra")
transformers = pytest.importorskip("transformers", reason="needs the hf extra")

from kvtc_gguf.hf import KVTCCache, everywhere  # noqa: E402
from kvtc_gguf.hf.attention import attend  # noqa: E402
from kvtc_gguf.hf.codec import SideCodec  # noqa: E402

torch.set_num_threads(1)
N, SINK, WINDOW = 96, 4, 16


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def gguf(request, tmp_path_factory) -> Path:
    """Keys of a llama come in another order of channels in the GGUF, those of a qwen2 do not."""
    return tools.calibrated_model(tmp_path_factory.mktemp("hf") / f"{request.param}.gguf", request.param)


@pytest.fixture(scope="module", params=torch_devices.devices())
def model(request, gguf):
    options = {"gguf_file": gguf.name, "dtype": torch.float32}
    return transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options).eval().to(request.param)


def logits(model, tokens: list[int], cache: object = None, cuts: tuple[int, ...] = ()) -> np.ndarray:
    """f32 [n, n_vocab] of the tokens, in several calls if there are cuts."""
    parts, ends = [], [*cuts, len(tokens)]
    with torch.inference_mode():
        for start, end in zip([0, *cuts], ends, strict=True):
            ids = torch.tensor([tokens[start:end]], device=model.device)
            parts.append(model(ids, past_key_values=cache, use_cache=cache is not None).logits[0].cpu().numpy())
    return np.concatenate(parts)


@pytest.mark.parametrize("device", torch_devices.devices())
@pytest.mark.parametrize("bits", [1, 2, 4, 6])
def test_rows_are_those_of_the_numpy_twin(bits, device) -> None:
    calibration, rng = synthetic.calibration(1, 3, 64), np.random.default_rng(bits)
    for name in "kv":
        side, index = calibration.layers[0][name], calibration.bits.index(bits)
        z = synthetic.draw(rng, side, 60)
        z[0], z[1, 1], z[2, 0, 0] = 0, 1e-30, np.nan
        codec = SideCodec(side, index, bits, torch.device(device))
        rows = codec.encode(torch.from_numpy(z).to(device))
        assert rows.device.type == torch.device(device).type
        np.testing.assert_array_equal(rows.cpu().numpy(), encode_rows(side, index, z, bits))
        expected = decode_rows(side, index, rows.cpu().numpy())
        np.testing.assert_allclose(codec.decode(rows).cpu().numpy(), expected, rtol=1e-5)


def test_logits_and_error_are_those_of_llama_cpp(gguf, model) -> None:
    tokens, loaded = driver.text(N), driver.Model(gguf)
    theirs = {}
    for name, cache in (("f16", ("f16", "f16")), ("kvtc", ("kvtc2", "kvtc4"))):
        context = driver.Context(loaded, cache, sink=SINK, window=WINDOW)
        theirs[name] = context.decode(tokens, 0)
        context.close()
    ours = {"f16": logits(model, tokens)}
    ours["kvtc"] = logits(model, tokens, KVTCCache(model, gguf, sink=SINK, window=WINDOW))
    klds = [driver.kld(x["f16"], x["kvtc"]) for x in (theirs, ours)]
    assert klds[1] == pytest.approx(klds[0], rel=0.05)
    assert driver.kld(theirs["kvtc"], ours["kvtc"]) < 0.02 * klds[0]


def test_cuts_into_calls_change_nothing(gguf, model) -> None:
    tokens, cache = driver.text(N), KVTCCache(model, gguf, sink=SINK, window=WINDOW)
    whole = logits(model, tokens, cache)
    for cuts in ((50,), (1, 2, 60, 61, 95), tuple(range(1, N))):
        # Products of other shapes round otherwise, and a code may fall on the other side of a midpoint.
        assert driver.kld(whole, logits(model, tokens, cache.fresh(), cuts)) < 1e-5


def test_cache_is_as_small_as_its_type(gguf, model) -> None:
    cache = KVTCCache(model, gguf, cache_type="kvtc-k2v4", sink=0, window=0)
    logits(model, driver.text(N), cache)
    assert {x.device.type for layer in cache.layers for x in layer.rows} == {model.device.type}
    values = N * tools.N_LAYER * tools.N_HEAD_KV * tools.HEAD_DIM
    assert cache.nbytes == values * (2 + 4) // 8
    assert cache.get_seq_length() == N


def test_generation_and_calls_without_a_cache(gguf, model) -> None:
    ids, options = torch.tensor([driver.text(40)], device=model.device), {"max_new_tokens": 8, "do_sample": False}
    exact = KVTCCache(model, gguf, window=1 << 20)
    assert torch.equal(
        model.generate(ids, past_key_values=exact, **options), model.generate(ids, use_cache=False, **options)
    )
    cache = KVTCCache(model, gguf, sink=SINK, window=WINDOW)
    tokens = driver.text(N)
    expected, plain = logits(model, tokens, cache.fresh()), logits(model, tokens)
    with everywhere(cache, model):
        assert np.array_equal(logits(model, tokens), expected)
        own = transformers.DynamicCache()  # one that a caller passes stays
        logits(model, tokens, own)
        assert own.get_seq_length() == N
    assert np.array_equal(logits(model, tokens), plain)


@pytest.mark.parametrize("device", torch_devices.devices())
def test_a_sinks_logit_takes_its_share_and_gives_nothing(device) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 5, 8, device=device) for heads in (4, 2, 2))
    sinks = torch.tensor([-1.0, 0.0, 1.0, 3.0], device=device)
    got, _ = attend(torch.nn.Module(), q, k, v, None, s_aux=sinks)
    plain, _ = attend(torch.nn.Module(), q, k, v, None)
    logits = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5).tril()
    own = logits.exp().tril().sum(-1)
    share = own / (own + sinks.exp()[None, :, None])
    torch.testing.assert_close(got, plain * share.transpose(1, 2)[..., None])


def test_what_does_not_belong_together_is_refused(gguf, model, tmp_path) -> None:
    other = tools.calibrated_model(tmp_path / "other.gguf", gguf.stem, seed=5)
    with pytest.raises(FormatError, match="not made from this checkpoint"):
        KVTCCache(model, other)
    with pytest.raises(FormatError, match="belongs to another model"):
        KVTCCache(model, gguf, other.with_suffix(".kvtc.gguf"))
    with pytest.raises(FormatError, match="cache_type takes"):
        KVTCCache(model, gguf, cache_type="q8_0")
    write(tools.calibration_of(gguf, bits=(2, 3)), tmp_path / "few.kvtc.gguf")
    with pytest.raises(FormatError, match=r"not kvtc4"):
        KVTCCache(model, gguf, tmp_path / "few.kvtc.gguf")
