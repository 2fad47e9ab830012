"""Architectures and options around the cache. Failures caught: keys un-rotated wrongly where RoPE has several
positions, a recurrent layer that is asked for a calibration, a sliding window, an adapter or a placement of the cache
that kvtc ignores, a dry run that counts too little, a calibration of other keys than those that are stored."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic
import tools
from kvtc_gguf.capture.llama_cpp import LlamaCapture
from kvtc_gguf.format import write
from tools import EXACT, Base, complete

ROUNDING = 1e-4  # nats per token; stored logits alone make up to 1e-5

N_LAYER = 4
SHAPE = ("-c", 256, "-b", 256, "--chunks", 2)
KVTC = ("-ct", "kvtc-k2v4")
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
SPECIAL = ("lfm2", "qwen35", "qwen2vl", "qwen3vl", "qwen2vl-yarn", "qwen35-yarn", "gemma2")
OPTIONS = [("--no-kv-offload",), ("-fit", "on"), ("-fit", "on", "--no-kv-offload", "-ngl", 99)]


def model(folder: Path, name: str) -> Path:
    """A tiny model with a calibration for those of its layers that attend."""
    path, architecture = folder / f"architecture-{name}.gguf", name.split("-")[0]
    if path.exists():
        return path
    if architecture == "gemma2":
        return tools.adapted_model(path, architecture)
    synthetic.tiny_model(path, architecture, n_layer=N_LAYER, seed=1, extra=YARN if name.endswith("yarn") else None)
    attending = range(1, N_LAYER, 2) if architecture in synthetic.HYBRID else None
    write(tools.calibration_of(path, N_LAYER, only=attending), path.with_suffix(".kvtc.gguf"))
    return path


@pytest.fixture(scope="module", params=SPECIAL)
def special(request, folder) -> Path:
    """Recurrent layers (lfm2, qwen35), M-RoPE (qwen*), of a part of the channels (qwen35), YaRN, a sliding window."""
    return model(folder, request.param)


@pytest.fixture(scope="module")
def adapter(qwen2, folder) -> Path:
    """Changes queries, keys, values and outputs of `qwen2` so that the text is another one."""
    path = folder / "adapter.gguf"
    synthetic.lora_adapter(path, qwen2)
    return path


def answer(path: Path, *arguments: object) -> str:
    return complete(path, *arguments).out


def test_exact_tokens_that_differ_from_those_of_f16(special):
    assert answer(special, *KVTC, *EXACT) == answer(special, "-fa", "on")


def test_exact_logits_that_differ_from_those_of_f16(special, text, tmp_path):
    """Keys that come back at another angle, of one section of M-RoPE alone or of another magnitude."""
    base = Base(special, text, tmp_path / "base", SHAPE).save("-fa", "on")
    for n_ubatch in (32, 512):
        assert abs(base.compare(*KVTC, *EXACT, "-ub", n_ubatch).kld) <= ROUNDING, n_ubatch
    # six bits through the codes: what a wrong angle costs is far more
    none = ("--kvtc-window", 0, "--kvtc-sink", 0)
    assert base.compare("-ct", "kvtc-k6v6", *none).kld < base.compare("-ct", "kvtc-k1v6", *none).kld


def test_codes_that_depend_on_batches(special, text, tmp_path):
    base = Base(special, text, tmp_path / "base", (*SHAPE, *KVTC, "--kvtc-window", 16)).save("-ub", 64)
    assert abs(base.compare("-ub", 1).kld) <= ROUNDING


@pytest.mark.parametrize("name", ["lfm2", "qwen35"])
def test_recurrent_layers_that_are_counted_as_cached(name, folder):
    """Only layers 1 and 3 attend: neither codes nor a line of the log for the others."""
    log = complete(model(folder, name), *KVTC, n=1).log
    assert set(re.findall(r"layers (\d+) to (\d+): K kvtc2", log)) == {("1", "3")}
    assert set(re.findall(r"size = .*cells, +(\d+) layers.*K \(kvtc2\)", log)) == {"2"}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: " ".join(map(str, option)))
@pytest.mark.parametrize("name", ["qwen35", "gemma2"])
def test_option_that_changes_the_answer(name, option, folder):
    path = model(folder, name)
    assert answer(path, *KVTC, *EXACT, *option) == answer(path, "-fa", "on")
    assert answer(path, *KVTC, "--kvtc-window", 8, *option) == answer(path, *KVTC, "--kvtc-window", 8)


def test_full_window_cache_that_changes_the_answer(folder):
    path = model(folder, "gemma2")
    assert answer(path, *KVTC, *EXACT, "--swa-full") == answer(path, "-fa", "on", "--swa-full")


def test_fit_that_does_not_count_what_kvtc_adds(llama):
    """The dry run sizes a context without buffers; what it projects is what the run itself then takes."""

    def host(*arguments: object) -> list[int]:
        log = complete(llama, *KVTC, *arguments, "-c", 32768, "-fit", "on", "-lv", 5, n=1).log
        assert "successfully fit params" in log
        return [int(part) for part in re.findall(r"- Host +\| +\d+ = +\d+ \+ +(\d+) \+", log)]

    small, large = host(), host("--kvtc-window", 16000)
    assert len(small) == 2 and small[0] == small[1] > 0, small
    assert large[0] == large[1] >= small[0] + 7, large  # MiB: 16000 rows of 512 bytes


def test_adapter_that_kvtc_ignores(qwen2, adapter, text, tmp_path):
    """Keys and values come from adapted weights; the calibration is still that of the model."""
    base = Base(qwen2, text, tmp_path / "base", (*SHAPE, "--lora", adapter)).save("-fa", "on")
    assert abs(base.compare(*KVTC, *EXACT).kld) <= ROUNDING
    plain = Base(qwen2, text, base.path, SHAPE)
    assert plain.compare(*KVTC, *EXACT).kld > 0.1
    coded = Base(qwen2, text, tmp_path / "coded", (*base.arguments, *KVTC, "--kvtc-window", 16)).save("-ub", 64)
    assert abs(coded.compare("-ub", 1).kld) <= ROUNDING
    assert answer(qwen2, *KVTC, *EXACT, "--lora", adapter) == answer(qwen2, "-fa", "on", "--lora", adapter)


@pytest.mark.parametrize("name", ["lfm2", "qwen35", "qwen3vl", "maincoder"])
def test_calibration_of_keys_that_the_cache_does_not_see(name, folder, text, tmp_path):
    """Hybrids, M-RoPE, norms after RoPE: statistics of other keys than those stored are little better than none."""
    if name == "maincoder":
        path = tools.adapted_model(folder / "calibrated-maincoder.gguf", name)
    else:
        path = model(folder, name)
    output, corpus = tmp_path / "kvtc.gguf", tools.write_text(tmp_path / "corpus.txt", 20000)
    calibrate = (sys.executable, "-m", "kvtc_gguf.calibrate", path, "-f", corpus, "-o", output)
    options = ("--tokens", 2048, "-c", 256, "-t", 1)
    environment = {"KVTC_LIB_DIR": str(tools.BIN), **os.environ}
    command = [str(part) for part in (*calibrate, *options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2 * tools.LIMIT)
    assert done.returncode == 0, done.stderr
    base = Base(path, text, tmp_path / "base", SHAPE).save("-fa", "on")
    flags = ("-ct", "kvtc-k4v4", "--kvtc-window", 0)
    assert base.compare(*flags, "--kvtc-file", output).kld < min(0.05, base.compare(*flags).kld / 20)


def image_logits(path: Path, cache: str, window: int, n_ubatch: int) -> np.ndarray:
    """Log-probabilities f64 [24, n_vocab] of text after text and an image of 6 rows of 5 (random vectors)."""
    rng = np.random.default_rng(0)
    with LlamaCapture(path, 256, 1) as run:
        api = run.api
        tools.set_exact(api, 4, window)
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_threads = 256, 64, n_ubatch, 1
        options.type_k = options.type_v = {"f16": api.GGML_TYPE_F16, "kvtc6": 48}[cache]
        options.flash_attn_type = 1
        context = run.ctx = api.llama_init_from_model(run.model, options)
        assert context, run.errors

        def decode(positions: np.ndarray, **inputs: np.ndarray) -> None:
            """positions i32 [1 or 4, n]; inputs: token i32 [n], or embd f32 [n, n_embd]."""
            n = positions.shape[1]
            batch = api.llama_batch(n_tokens=n)
            keep = {"pos": np.ascontiguousarray(positions, np.int32), "logits": np.ones(n, np.int8), **inputs}
            for field, array in keep.items():
                setattr(batch, field, array.ctypes.data_as(dict(api.llama_batch._fields_)[field]))
            assert api.llama_decode(context, batch) == 0

        tokens = rng.integers(3, 250, (2, 24)).astype(np.int32)
        decode(np.arange(24)[None], token=tokens[0])
        row, column = np.divmod(np.arange(30), 5)
        place = np.stack([np.zeros(30), row, column, np.zeros(30)]) + [[24], [24], [24], [0]]
        decode(place, embd=rng.standard_normal((30, 128)).astype(np.float32) * 8)
        decode(np.arange(30, 54)[None], token=tokens[1])
        logits = np.ctypeslib.as_array(api.llama_get_logits(context), (24 * run.n_vocab,)).reshape(24, -1)
        logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", ["qwen2vl", "qwen3vl", "qwen35", "qwen2vl-yarn", "qwen35-yarn"])
def test_place_in_an_image_that_is_lost(name, folder, monkeypatch):
    """Tokens of an image share their temporal position; row and column turn sections of a key of their own."""
    monkeypatch.setenv("KVTC_LIB_DIR", str(tools.BIN))
    path = model(folder, name)

    def kld(first: np.ndarray, second: np.ndarray) -> float:
        return float((np.exp(first) * (first - second)).sum(-1).mean())

    exact = image_logits(path, "f16", 0, 64)
    assert kld(exact, image_logits(path, "kvtc6", 1000, 64)) <= ROUNDING
    assert kld(exact, image_logits(path, "kvtc6", 1000, 7)) <= ROUNDING
    coded = image_logits(path, "kvtc6", 0, 64)
    assert abs(kld(coded, image_logits(path, "kvtc6", 0, 7))) <= ROUNDING
    assert kld(exact, coded) > ROUNDING
