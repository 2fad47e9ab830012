"""The tools with the data-free turbo types. Failures caught: a calibration asked for where none is needed, a size that
leaves out norms, keys rotated twice or not at all, results that depend on batches, sinks or a window nobody asked for,
one side's type that changes the other's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import synthetic
import tools
from tools import EXACT, Base, complete, perplexity, succeed

from bench.caches import Cache
from bench.logs import parse_sizes

ROUNDING = 1e-4  # nats per token, as in test_generation.py
SHAPE = ("-c", 256, "-b", 256, "--chunks", 3)
TURBO = ("turbo2", "turbo3", "turbo4")


@pytest.fixture(scope="module")
def plain(folder) -> Path:
    """A model without a calibration."""
    path = folder / "turbo.gguf"
    synthetic.tiny_model(path)
    return path


def test_no_calibration_is_needed_and_the_log_counts_every_byte(plain):
    log = complete(plain, "-ctk", "turbo4", "-ctv", "turbo2", n=1).log
    # two heads of 32: 2 * (16 + 2) and 2 * (8 + 2) bytes a row
    assert "layers 0 to 1: K turbo4 (4.50 bpv), V turbo2 (2.50 bpv)" in log
    assert "0 sinks, window 0, rollback 0, 0 slots" in log and "calibration" not in log
    assert parse_sizes(log).bpv == pytest.approx(3.5)
    assert re.search(r"K \(turbo4\): +0\.02 MiB, V \(turbo2\): +0\.01 MiB", log)
    codes = (36 + 20) * 256 * tools.N_LAYER / 2**20
    bases = float(re.findall(r"bases ([\d.]+) MiB", log)[-1])
    assert f"codes {codes:.2f} MiB, exact rows 0.00 MiB" in log
    assert parse_sizes(log).cache == pytest.approx(codes + bases, abs=0.01)


@pytest.mark.parametrize("heads", [1, 3])
def test_rows_that_fill_no_whole_block_are_counted_whole(tmp_path, heads):
    synthetic.tiny_model(tmp_path / "m.gguf", n_head=heads * 2, n_head_kv=heads, head_dim=40)
    log = complete(tmp_path / "m.gguf", "-ct", "turbo3", n=4).log
    size = -(-heads * (15 + 2) // 3) * 3
    assert f"K turbo3 ({size * 8 / heads / 40:.2f} bpv)" in log


@pytest.mark.parametrize("name", TURBO)
def test_names_work_in_every_tool(plain, text, name):
    assert f"K {name}" in complete(plain, "-ct", name, n=2).log
    assert f"V {name}" in perplexity(plain, text, *SHAPE, "-ct", name).log
    assert f"K {name}" in complete(plain, n=2, env={"LLAMA_ARG_CACHE_TYPE": name}).log
    for flags in (["-ct", name], ["-ctk", name, "-ctv", name]):
        shape = ("-p", 8, "-n", 4, "-r", 1, "-t", 1, "--no-warmup", "-o", "json")
        rows = json.loads(succeed("llama-bench", "-m", plain, *flags, *shape).out)
        assert [(row["type_k"], row["type_v"]) for row in rows] == [(name, name)] * 2
        assert all(row["avg_ts"] > 0 for row in rows)
    assert Cache(name).arguments[:2] == ["-ctk", name]


def test_more_bits_lose_less(plain, text, tmp_path):
    base = Base(plain, text, tmp_path / "base", SHAPE).save("-fa", "on")
    losses = [base.compare("-ct", name).kld for name in TURBO]
    assert losses[0] > 2 * losses[1] > 4 * losses[2] > 10 * ROUNDING
    # each side by its own bits
    mixed = base.compare("-ctk", "turbo4", "-ctv", "turbo2").kld
    assert losses[2] < mixed < losses[0]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "maincoder", "talkie", "gemma2"])
def test_exact_turbo_cache_is_that_of_f16(architecture, folder, text, tmp_path):
    """Keys after RoPE, and after a norm behind it, come back as they are; also in a sliding window."""
    model = folder / f"turbo-{architecture}.gguf"
    (tools.calibrated_model if architecture in ("llama", "qwen2") else tools.adapted_model)(model, architecture)
    base = Base(model, text, tmp_path / "base", SHAPE).save("-fa", "on")
    for n_ubatch in (32, 512):
        assert abs(base.compare("-ct", "turbo2", *EXACT, "-ub", n_ubatch).kld) <= ROUNDING
    assert base.compare("-ct", "turbo4").kld < base.compare("-ct", "turbo2").kld


@pytest.mark.parametrize("exact", [(), ("--kvtc-sink", 4, "--kvtc-window", 32)], ids=["none", "exact"])
def test_decoding_is_the_same_function_as_prefill(plain, text, tmp_path, exact):
    base = Base(plain, text, tmp_path / "base", (*SHAPE, "-ct", "turbo3", *exact)).save("-ub", 512)
    for n_ubatch in (1, 7):
        assert abs(base.compare("-ub", n_ubatch).kld) <= ROUNDING, n_ubatch


def test_sinks_and_window_are_there_when_asked_for_or_beside_kvtc(llama, text, tmp_path):
    assert "4 sinks, window 16" in complete(llama, "-ct", "turbo3", "--kvtc-sink", 4, "--kvtc-window", 16, n=1).log
    mixed = complete(llama, "-ctk", "kvtc2", "-ctv", "turbo3", n=1).log
    assert "4 sinks, window 128" in mixed and f"calibration from {llama.with_suffix('.kvtc.gguf')} (sidecar)" in mixed
    base = Base(llama, text, tmp_path / "base", SHAPE).save("-fa", "on")
    none, some = base.compare("-ct", "turbo2").kld, base.compare("-ct", "turbo2", "--kvtc-window", 64).kld
    assert 0 < some < 0.9 * none


@pytest.mark.parametrize(
    "types", [("turbo3", "f16"), ("f16", "turbo3"), ("turbo3", "q8_0"), ("q8_0", "turbo3")], ids="-".join
)
def test_turbo_on_one_side_leaves_the_other_as_it_is(plain, text, tmp_path, types):
    other = ["f16" if kind.startswith("turbo") else kind for kind in types]
    base = Base(plain, text, tmp_path / "base", SHAPE).save("-ctk", other[0], "-ctv", other[1], "-fa", "on")
    flags = ("-ctk", types[0], "-ctv", types[1])
    # a stock K of q8_0 is multiplied with queries in q8_0, by kvtc's operation with queries as they are
    assert base.compare(*flags, *EXACT).kld <= (1e-2 if types[0] == "q8_0" else ROUNDING)
    assert base.compare(*flags).kld > 1e-2


@pytest.mark.parametrize("types", [("kvtc3", "turbo3"), ("turbo3", "kvtc3")], ids="-".join)
def test_turbo_beside_kvtc(llama, text, tmp_path, types):
    base = Base(llama, text, tmp_path / "base", SHAPE).save("-fa", "on")
    flags = ("-ctk", types[0], "-ctv", types[1])
    assert base.compare(*flags, *EXACT).kld <= ROUNDING
    coded = Base(llama, text, tmp_path / "coded", (*SHAPE, *flags)).save("-ub", 512)
    assert abs(coded.compare("-ub", 7).kld) <= ROUNDING


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_every_head_dim(head_dim, text, tmp_path):
    model = tmp_path / "m.gguf"
    synthetic.tiny_model(model, n_head=2, n_head_kv=1, head_dim=head_dim)
    base = Base(model, text, tmp_path / "base", SHAPE).save("-fa", "on")
    assert base.compare("-ct", "turbo4", *EXACT).kld <= ROUNDING
    assert base.compare("-ct", "turbo4").kld < base.compare("-ct", "turbo3").kld


def test_head_dim_that_is_no_multiple_of_8_is_refused(text, tmp_path):
    """A block of turbo4 has 4 values, so llama.cpp itself does not object."""
    model = tmp_path / "m.gguf"
    synthetic.tiny_model(model, n_embd=80, head_dim=20)
    for name, words in (("turbo4", ("head_dim 20", "multiples of 8")), ("turbo3", ("turbo3", "20"))):
        result = tools.run("llama-perplexity", "-m", model, "-f", text, *SHAPE, "-ct", name)
        assert result.code == 1
        assert any(all(word in line for word in words) for line in tools.problems(result.err)), result.err


def test_context_that_cannot_shift_says_so(plain):
    """A completion beyond the context stops; it does not go on with keys at the wrong places."""
    keys = complete(plain, "--context-shift", "-ct", "turbo3", n=400)
    assert "KV cache shifting is not supported for this context" in keys.log
    assert "context full and context shift is disabled" in keys.log
    values = complete(plain, "--context-shift", "-ctv", "turbo3", n=400)
    assert "not supported" not in values.log and "context full" not in values.log
