"""Layers that keep other bits than asked for. Failures caught: a layer of another type than the calibration says, a log
or a buffer size that hides it, codes of one width read as another's, a state restored under other widths.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tools
from damage import rewrite
from kvtc_gguf.embed import embed
from kvtc_gguf.format import read, write
from test_bad_input import refused
from tools import EXACT, Base, complete

from bench.logs import parse_sizes

N_LAYER = 4
K, V = [6, 2, 2, 1], [4, 4, 4, 2]  # by layer, where kvtc-k2v4 is asked for
ASKED = ("-ct", "kvtc-k2v4")
RUNS = re.compile(r"layers (\d+) to (\d+): K kvtc(\d) \((\d)\.00 bpv\), V kvtc(\d) \((\d)\.00 bpv\)")


def with_bits(model: Path, path: Path, k: dict[int, list[int]], v: dict[int, list[int]]) -> Path:
    """The model's calibration at `path`, with other bits by layer for some of the budgets."""
    calibration = read(model.with_suffix(".kvtc.gguf"))
    for side, other in (("k", k), ("v", v)):
        calibration.layer_bits[side] = [other.get(b, [b] * calibration.block_count) for b in calibration.bits]
    write(calibration, path)
    return path


def runs(log: str) -> set[tuple[int, ...]]:
    """(first layer, last layer, type of K, its bpv, type of V, its bpv) of every line about layers."""
    return {tuple(map(int, groups)) for groups in RUNS.findall(log)}


@pytest.fixture(scope="module")
def model(folder):
    return tools.calibrated_model(folder / "adaptive.gguf", n_layer=N_LAYER)


@pytest.fixture(scope="module")
def adaptive(model):
    return with_bits(model, model.with_name("by-layer.kvtc.gguf"), {2: K}, {4: V})


def test_log_and_sizes_are_those_of_the_layers(model, adaptive, tmp_path):
    n_ctx = 4096
    log = complete(model, *ASKED, "--kvtc-file", adaptive, "-c", n_ctx, n=1).log
    assert runs(log) == {(0, 0, 6, 6, 4, 4), (1, 2, 2, 2, 4, 4), (3, 3, 1, 1, 2, 2)}
    mib = tools.N_HEAD_KV * tools.HEAD_DIM * sum(K + V) / 8 * n_ctx / 2**20
    assert re.findall(r"KV buffer size = +([\d.]+) MiB", log)[-1] == f"{mib:.2f}"
    assert f"codes {mib:.2f} MiB" in log
    assert parse_sizes(log).bpv == pytest.approx(np.mean(K + V), abs=1e-3)
    embed(model, read(adaptive), tmp_path / "embedded.gguf")
    assert runs(complete(tmp_path / "embedded.gguf", *ASKED, n=1).log) == runs(log)


def test_budgets_that_the_file_says_nothing_about_are_kept_by_all_layers(model, adaptive):
    log = complete(model, "-ct", "kvtc-k3v2", "--kvtc-file", adaptive, n=1).log
    assert runs(log) == {(0, N_LAYER - 1, 3, 3, 2, 2)}
    log = complete(model, "-ctk", "kvtc2", "-ctv", "f16", "--kvtc-file", adaptive, n=1).log
    assert "layers 1 to 2: K kvtc2 (2.00 bpv), V f16 (16.00 bpv)" in log


def test_layers_of_a_sliding_window_model_keep_their_own_bits(folder):
    """Two caches, each of every other layer."""
    path = folder / "gemma2.gguf"
    if not path.exists():
        tools.adapted_model(path, "gemma2")
    file = with_bits(path, folder / "gemma2-by-layer.kvtc.gguf", {2: K}, {4: V})
    log = complete(path, *ASKED, "--kvtc-file", file, n=1).log
    assert runs(log) == {(layer, layer, k, k, v, v) for layer, (k, v) in enumerate(zip(K, V, strict=True))}
    assert complete(path, *ASKED, "--kvtc-file", file, *EXACT).out == complete(path, "-fa", "on").out


def test_text_of_an_exact_cache_is_that_of_f16(model, adaptive):
    plain = complete(model, "-fa", "on").out
    assert complete(model, *ASKED, "--kvtc-file", adaptive, *EXACT).out == plain
    assert complete(model, *ASKED, "--kvtc-file", adaptive, "--kvtc-window", 0).out != plain


def test_each_layer_is_read_at_its_own_width(model, text, tmp_path):
    base = Base(model, text, tmp_path / "base", ("-c", 256, "-b", 256, "--chunks", 2)).save("-fa", "on")
    codes = ("--kvtc-sink", 0, "--kvtc-window", 0)

    def kld(bits: list[int]) -> float:
        file = with_bits(model, tmp_path / "a.kvtc.gguf", {1: bits}, {1: bits})
        return base.compare("-ct", "kvtc-k1v1", "--kvtc-file", file, *codes).kld

    wide = base.compare("-ct", "kvtc-k6v6", *codes).kld
    assert kld([6] * N_LAYER) == wide
    assert wide < kld([6, 6, 6, 1]) < kld([1] * N_LAYER)
    assert wide < kld([1, 6, 6, 6]) < kld([1] * N_LAYER)


def test_a_state_saved_at_other_widths_is_refused(model, adaptive, tmp_path):
    state = ("--prompt-cache", tmp_path / "state")
    plain = model.with_suffix(".kvtc.gguf")
    for made, read_by in ((plain, adaptive), (adaptive, plain)):
        first = complete(model, *ASKED, *state, "--kvtc-file", made)
        again = complete(model, *ASKED, *state, "--prompt-cache-ro", "--kvtc-file", made)
        assert "exact match for prompt" in again.log and again.out == first.out
        flags = ("-no-cnv", "-p", tools.PROMPT, "-n", 1, "-c", 256, "-t", 1, *ASKED, *state)
        other = tools.run("llama-completion", "-m", model, *flags, "--kvtc-file", read_by)
        assert other.code == 1
        about = [line for line in tools.problems(other.err) if "kvtc: " in line]
        assert len(about) == 1 and f"saved under another calibration than {read_by}" in about[0], other.err
        (tmp_path / "state").unlink()


def test_bits_that_no_layer_can_keep_are_refused(model, adaptive, text, tmp_path):
    key = "kvtc.layer_bits.v"
    rewrite(adaptive, tmp_path / "b.kvtc.gguf", meta={key: np.full(6 * N_LAYER, 7, np.int32)})
    words = (f"calibration {tmp_path / 'b.kvtc.gguf'}", f"{key}: 7 bits for layer 0 are none of kvtc.bits")
    refused(text, model, *ASKED, "--kvtc-file", tmp_path / "b.kvtc.gguf", words=words)


def test_a_budget_that_the_file_lacks_is_named_as_it_was_asked_for(model, text, tmp_path):
    calibration = tools.calibration_of(model, N_LAYER, bits=(1, 2))
    calibration.layer_bits = {"k": [[2] * N_LAYER, [1] * N_LAYER]}
    write(calibration, tmp_path / "few.kvtc.gguf")
    words = ("serves kvtc{1,2}, not kvtc4",)
    refused(text, model, *ASKED, "--kvtc-file", tmp_path / "few.kvtc.gguf", words=words, which=("llama-completion",))
