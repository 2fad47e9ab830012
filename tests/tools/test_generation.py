"""The tools with a kvtc cache, on tiny models. Failures caught: an exact token that is read from its codes or comes
back rotated to another place, a result that depends on how a text was cut into batches, sequences that mix, a
calibration from elsewhere than the log says, a flag that a tool ignores, a cache of another size than the log says.
"""

from __future__ import annotations

import json
import re
import shutil

import pytest
import synthetic
import tools
from kvtc_gguf.embed import embed
from kvtc_gguf.format import read, write
from tools import EXACT, Base, complete, perplexity, succeed

from bench.logs import parse_sizes

ROUNDING = 1e-4  # nats per token; stored logits alone make up to 1e-5
SHAPE = ("-c", 256, "-b", 256, "--chunks", 3)
YARN = ("--rope-scaling", "yarn", "--rope-scale", 4, "--yarn-orig-ctx", 64)


def source(log: str) -> str:
    found = set(re.findall(r"calibration from (.*)", log))
    assert len(found) == 1, log
    return found.pop()


def ppl(run: tools.Run) -> float:
    found = re.search(r"Final estimate: PPL = ([\d.]+)", run.log)
    assert found, run.log
    return float(found[1])


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("cache", ["kvtc-k6v6", "kvtc-k1v1"])
def test_text_of_an_exact_cache_is_that_of_f16(name, cache, request):
    model = request.getfixturevalue(name)
    assert complete(model, "-ct", cache, *EXACT).out == complete(model, "-fa", "on").out


def test_calibration_is_the_same_wherever_it_comes_from(llama, folder, tmp_path):
    """And the log names it: the sidecar, the model's metadata (which win over a sidecar), --kvtc-file (which wins)."""
    beside = complete(llama, "-ct", "kvtc-k2v4", "--kvtc-window", 8)
    sidecar = llama.with_suffix(".kvtc.gguf")
    assert source(beside.log) == f"{sidecar} (sidecar)"

    embed(llama, read(sidecar), tmp_path / "embedded.gguf")
    synthetic.tiny_model(tmp_path / "other.gguf", seed=9)
    write(tools.calibration_of(tmp_path / "other.gguf"), tmp_path / "embedded.kvtc.gguf")
    embedded = complete(tmp_path / "embedded.gguf", "-ct", "kvtc-k2v4", "--kvtc-window", 8)
    assert source(embedded.log) == f"{tmp_path / 'embedded.gguf'} (embedded)"

    shutil.copy(llama, tmp_path / "alone.gguf")
    files = f"{tmp_path / 'embedded.kvtc.gguf'},{sidecar}"
    named = complete(tmp_path / "alone.gguf", "-ct", "kvtc-k2v4", "--kvtc-window", 8, "--kvtc-file", files)
    assert source(named.log) == f"{sidecar} (--kvtc-file)"
    assert beside.out == embedded.out == named.out
    assert beside.out != complete(llama, "-fa", "on").out  # so the texts above do depend on the calibration


def test_log_names_types_sizes_and_flash_attention(llama):
    log = complete(llama, "-ct", "kvtc-k2v4", n=1).log
    assert "layers 0 to 1: K kvtc2 (2.00 bpv), V kvtc4 (4.00 bpv)" in log
    assert re.search(r"flash_attn since kvtc", log)
    assert "4 sinks, window 128, rollback 64, 196 slots" in log
    assert parse_sizes(log).bpv == 3.0
    values = tools.N_LAYER * tools.N_HEAD_KV * tools.HEAD_DIM
    codes = values * (2 + 4) / 8 * 256 / 2**20
    exact = values * 2 * 2 * 196 / 2**20  # K and V in f16
    bases = float(re.findall(r"bases ([\d.]+) MiB", log)[-1])
    assert f"codes {codes:.2f} MiB, exact rows {exact:.2f} MiB" in log
    assert bases >= values * 2 * tools.HEAD_DIM * 4 / 2**20  # in f32; decoding and codebooks come on top
    assert parse_sizes(log).cache == pytest.approx(codes + exact + bases, abs=0.01)


def test_window_beyond_the_context_takes_no_more_than_the_context(llama):
    assert "256 slots" in complete(llama, "-ct", "kvtc-k2v4", "--kvtc-window", 999999999, n=1).log


@pytest.mark.parametrize(
    "variables",
    [
        {"LLAMA_ARG_CACHE_TYPE": "kvtc-k2v4"},
        {"LLAMA_ARG_CACHE_TYPE_K": "kvtc2", "LLAMA_ARG_CACHE_TYPE_V": "kvtc4"},
    ],
    ids=["both", "each"],
)
def test_environment_chooses_the_cache(llama, variables):
    variables = {**variables, "LLAMA_ARG_KVTC_WINDOW": "7", "LLAMA_ARG_KVTC_SINK": "3"}
    log = complete(llama, n=1, env=variables).log
    assert "K kvtc2 (2.00 bpv), V kvtc4 (4.00 bpv)" in log and "3 sinks, window 7" in log
    file = str(llama.with_suffix(".kvtc.gguf"))
    assert source(complete(llama, n=1, env={**variables, "LLAMA_ARG_KVTC_FILE": file}).log) == f"{file} (--kvtc-file)"


@pytest.mark.parametrize("flags", [["-ct", "kvtc-k2v4"], ["-ctk", "kvtc2", "-ctv", "kvtc4"]], ids=["both", "each"])
def test_bench_reports_the_types_it_ran(llama, flags):
    shape = ("-p", 8, "-n", 4, "-r", 1, "-t", 1, "--no-warmup", "-o", "json")
    window = ("--kvtc-window", 8) if flags[0] == "-ct" else ()
    rows = json.loads(succeed("llama-bench", "-m", llama, *flags, *window, *shape).out)
    assert [(row["type_k"], row["type_v"]) for row in rows] == [("kvtc2", "kvtc4")] * 2
    assert all(row["avg_ts"] > 0 for row in rows)


@pytest.mark.parametrize(
    "types", [("kvtc3", "f16"), ("f16", "kvtc3"), ("kvtc3", "q8_0"), ("q8_0", "kvtc3")], ids="-".join
)
def test_kvtc_on_one_side_leaves_the_other_as_it_is(llama, text, tmp_path, types):
    """With everything exact on kvtc's side, what is left is the other side's own loss."""
    other = ["f16" if kind.startswith("kvtc") else kind for kind in types]
    base = Base(llama, text, tmp_path / "base", SHAPE).save("-ctk", other[0], "-ctv", other[1], "-fa", "on")
    flags = ("-ctk", types[0], "-ctv", types[1])
    # a stock K of q8_0 is multiplied with queries in q8_0, by kvtc's operation with queries as they are
    assert base.compare(*flags, *EXACT).kld <= (1e-2 if types[0] == "q8_0" else ROUNDING)
    assert base.compare(*flags, "--kvtc-window", 0).kld > 1e-2


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_exact_cache_is_that_of_f16_and_exact_tokens_matter(name, text, tmp_path, request):
    base = Base(request.getfixturevalue(name), text, tmp_path / "base", SHAPE).save("-fa", "on")

    def kld(sink: int, window: int) -> float:
        return base.compare("-ct", "kvtc-k2v4", "--kvtc-sink", sink, "--kvtc-window", window).kld

    assert kld(4, 256) <= ROUNDING
    assert kld(256, 0) <= ROUNDING
    assert kld(0, 0) > kld(0, 128) > 10 * ROUNDING
    assert kld(0, 0) > kld(128, 0) > 10 * ROUNDING


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_decoding_is_the_same_function_as_prefill(name, text, tmp_path, request):
    cache = ("-ct", "kvtc-k2v4", "--kvtc-sink", 4, "--kvtc-window", 32)
    base = Base(request.getfixturevalue(name), text, tmp_path / "base", (*SHAPE, *cache)).save("-ub", 512)
    for n_ubatch in (1, 7):
        assert abs(base.compare("-ub", n_ubatch).kld) <= ROUNDING, n_ubatch


@pytest.mark.parametrize("window", [0, 32, 128])
def test_sequences_of_one_batch_do_not_mix(llama, text, tmp_path, window):
    cache = ("-ct", "kvtc-k2v4", "--kvtc-window", window)
    shape = (llama, text, "-c", 256, "--chunks", 4, *cache)
    one, four = perplexity(*shape, "-b", 256), perplexity(*shape, "-b", 1024)
    assert "1/1 seqs" in one.log and "4/4 seqs" in four.log
    assert ppl(four) == pytest.approx(ppl(one), rel=1e-3)
    base = Base(llama, text, tmp_path / "base", ("-c", 256, "--chunks", 4, *cache)).save("-b", 256)
    for n_ubatch in (64, 512):  # an ubatch within one sequence, and one of several
        assert abs(base.compare("-b", 1024, "-ub", n_ubatch).kld) <= ROUNDING


@pytest.mark.parametrize("rope", [(), YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("architecture", ["maincoder", "talkie", "llama", "qwen2"])
def test_keys_come_back_as_they_were(architecture, rope, folder, text, tmp_path, request):
    """maincoder and talkie norm keys after RoPE, so that it must be undone; YaRN scales what it rotates."""
    if architecture in ("llama", "qwen2"):
        model = request.getfixturevalue(architecture)
    else:
        model = folder / f"{architecture}.gguf"
        if not model.exists():
            tools.adapted_model(model, architecture)
    base = Base(model, text, tmp_path / "base", (*SHAPE, *rope)).save("-fa", "on")
    for n_ubatch in (32, 512):
        assert abs(base.compare("-ct", "kvtc-k2v4", *EXACT, "-ub", n_ubatch).kld) <= ROUNDING
    # six bits through the codes: what a wrong angle costs is far more
    assert base.compare("-ct", "kvtc-k6v6", "--kvtc-window", 0).kld < base.compare("-ct", "kvtc-k1v6").kld


@pytest.mark.parametrize("swa_full", [(), ("--swa-full",)], ids=["sliding", "full"])
def test_sliding_window_cache_reuses_its_cells(folder, text, tmp_path, swa_full):
    """A window of 64 tokens in a context of 768: cells are written over while others are still exact."""
    model = folder / "gemma2.gguf"
    if not model.exists():
        tools.adapted_model(model, "gemma2")
    base = Base(model, text, tmp_path / "base", ("-c", 768, "-b", 768, "--chunks", 2, *swa_full)).save("-ub", 32)
    exact = perplexity(model, text, *base.arguments, "-ub", 32, "-ct", "kvtc-k2v4", *EXACT)
    caches = re.findall(r"size = +[\d.]+ MiB \( *(\d+) cells, +2 layers, .*K \(kvtc2\)", exact.log)
    assert caches == ["768", "768" if swa_full else "256"]
    assert abs(base.compare("-ub", 32, "-ct", "kvtc-k2v4", *EXACT).kld) <= ROUNDING
    coded = Base(model, text, tmp_path / "coded", (*base.arguments, "-ct", "kvtc-k2v4", "--kvtc-window", 16)).save()
    for n_ubatch in (1, 7, 32):
        assert abs(coded.compare("-ub", n_ubatch).kld) <= ROUNDING, n_ubatch
    assert abs(coded.compare("-ub", 32).kld) < base.compare("-ub", 32, "-ct", "kvtc-k2v4").kld
