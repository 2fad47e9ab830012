"""Failures caught: errors that verify reports for another code or another attention than the cache's, layers of other
bits coded by other tables, numpy in place of the library without a word, a calibration that llama.cpp refuses and that
is written all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import synthetic
from kvtc_gguf import coder, native, reference, verify
from kvtc_gguf.capture import LayerSample
from kvtc_gguf.format import Calibration, write
from kvtc_gguf.libraries import NativeError
from kvtc_gguf.reference_rope import Turns

HEADS, DIM, TOKENS = 2, 64, 300


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    result = synthetic.calibration(2, HEADS, DIM)
    # layer 1 keeps one bit more of its keys than asked for
    result.layer_bits["k"] = [[bits, min(bits + 1, max(result.bits))] for bits in result.bits]
    return result


@pytest.fixture(scope="module")
def source(calibration, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("coder") / "c.kvtc.gguf"
    write(calibration, path)
    return path


@pytest.fixture
def no_library(monkeypatch) -> None:
    def missing() -> None:
        raise NativeError("the patched llama.cpp was not found: run `make build`")

    monkeypatch.setattr(native, "load", missing)


def test_library_and_twin_give_the_same_vectors_back(calibration, source) -> None:
    said: list[str] = []
    used = coder.open_coder(source, calibration, said.append)
    assert isinstance(used, coder.NativeCoder) and not said
    twin, rng = coder.NumpyCoder(calibration), np.random.default_rng(0)
    for layer in calibration.layers:
        for side in "kv":
            x = rng.standard_normal((50, HEADS, DIM)).astype(np.float32)
            errors = {}
            for asked in (1, 2, 4):
                bits = calibration.kept_bits(layer, side, asked)
                got, expected = (c.coded(layer, side, x, bits) for c in (used, twin))
                # z comes from another matrix product: a component near a midpoint may get the next code
                assert ((got - expected) ** 2).mean() < 1e-4 * (expected**2).mean()
                errors[asked] = ((got - x) ** 2).mean()
            assert errors[4] < errors[2] < errors[1]


def sample(calibration: Calibration, turns: Turns, window: int) -> LayerSample:
    """A layer's attention inputs, of keys and values as the calibration expects them; three query heads a kv head."""
    rng, own = np.random.default_rng(1), calibration.layers[1]
    k, v = (reference.reconstruct(own[side], synthetic.draw(rng, own[side], TOKENS)) for side in "kv")
    q = rng.standard_normal((TOKENS, 3 * HEADS, DIM)).astype(np.float32)
    q_rope, k_rope = (turns.rotate(x, np.arange(TOKENS)).astype(np.float32) for x in (q, k))
    return LayerSample(1, q, k, v, q_rope / np.float32(DIM), k_rope, window)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("window", [0, 200])
@pytest.mark.parametrize("neox", [False, True])
def test_library_and_twin_attend_alike(calibration, source, neox, window, softcap) -> None:
    turns = Turns(100.0 ** -np.linspace(0, 1, DIM // 4), neox, scale=1.2)  # half of a head's channels
    rows, given = np.arange(132, TOKENS, 7), sample(calibration, turns, window)
    used, twin = coder.open_coder(source, calibration, pytest.fail), coder.NumpyCoder(calibration)
    bits = (calibration.kept_bits(1, "k", 2), calibration.kept_bits(1, "v", 4))
    got, expected = (c.attend(given, rows, bits, turns, softcap) for c in (used, twin))
    assert got.shape == (len(rows), 3 * HEADS, DIM)
    plain = verify.exact_output(given, rows, softcap)
    coding = ((got - plain) ** 2).mean()
    assert 1e-5 < coding / (plain**2).mean() < 0.1
    # z comes from another matrix product: a component near a midpoint may get the next code
    assert ((got - expected) ** 2).mean() < 0.02 * coding


def test_numpy_codes_where_there_is_no_library_and_says_so(calibration, source, no_library) -> None:
    said: list[str] = []
    used = coder.open_coder(source, calibration, said.append)
    assert isinstance(used, coder.NumpyCoder)
    assert len(said) == 1 and "codes are numpy's" in said[0] and "make build" in said[0]


def test_check_that_is_left_out_is_named(calibration, source, no_library) -> None:
    said: list[str] = []
    coder.library_check(calibration, said.append)(source)
    assert len(said) == 1 and "llama.cpp's own check of the calibration is left out" in said[0]


def test_file_that_the_loader_refuses_is_not_written(calibration, tmp_path, monkeypatch) -> None:
    check = coder.library_check(calibration, pytest.fail)
    write(calibration, tmp_path / "good.kvtc.gguf", check)
    foreign = synthetic.calibration(1, HEADS, DIM)  # has no layer 1
    with pytest.raises(NativeError, match="no K of layer 1"):
        write(foreign, tmp_path / "bad.kvtc.gguf", check)
    assert [path.name for path in tmp_path.iterdir()] == ["good.kvtc.gguf"]
