"""The C codec against its numpy twin. Failures caught: a byte that differs, a value that decodes differently, a row
that depends on what was there before, input that is not finite getting through, a write to a row nobody named."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import ffi
import ggml_graph
import numpy as np
import pytest
import synthetic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kvtc_gguf.format import Calibration
from kvtc_gguf.layout import head_bytes, head_offsets, row_bytes
from kvtc_gguf.reference import decode_rows, encode_rows, transform

SHAPES = [(1, 8), (1, 16), (3, 16), (8, 64), (3, 64), (2, 72), (1, 80), (4, 96), (8, 128), (1, 256), (1, 512), (2, 512)]


def room(n_head: int, head_dim: int) -> tuple[int, ...]:
    """The budgets whose row has room for every head's gain code."""
    return tuple(b for b in range(1, 7) if row_bytes(n_head, head_dim, b) >= 4 * (n_head - 1) + 1)


@functools.lru_cache(maxsize=4)
def opened(n_head: int, head_dim: int, keep_norm: int = 0, seed: int = 0) -> tuple[Calibration, ffi.Native]:
    """A random calibration, and the same in C; keys and values have `keep_norm` as gain rule and its opposite."""
    calibration = synthetic.calibration(1, n_head, head_dim, bits=room(n_head, head_dim), seed=seed)
    calibration.layers[0]["k"].gain_rule[:] = keep_norm
    calibration.layers[0]["v"].gain_rule[:] = 1 - keep_norm
    with tempfile.TemporaryDirectory() as folder:
        return calibration, ffi.native(calibration, Path(folder))


def compare(n_head: int, head_dim: int, z: np.ndarray, bits: int, side: int, keep_norm: int = 0, seed: int = 0) -> None:
    """The same bytes, and the same values from them."""
    calibration, c = opened(n_head, head_dim, keep_norm, seed)
    pack = c.pack(0, bits, bits)
    own, index = calibration.layers[0]["kv"[side]], calibration.bits.index(bits)
    expected = encode_rows(own, index, z, bits)
    rows = ffi.encode_rows(pack, side, z, row_bytes(n_head, head_dim, bits))
    np.testing.assert_array_equal(rows, expected)
    values = decode_rows(own, index, expected)
    np.testing.assert_allclose(ffi.decode_rows(pack, side, rows, n_head, head_dim), values, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_bytes_and_values_agree(shape, bits):
    n_head, d = shape
    if bits not in room(n_head, d):
        with pytest.raises(ValueError, match="no room"):
            synthetic.calibration(1, n_head, d, bits=(bits,))
        return
    rng = np.random.default_rng(bits)
    calibration, _ = opened(n_head, d)
    for side in (ffi.K, ffi.V):
        compare(n_head, d, synthetic.draw(rng, calibration.layers[0]["kv"[side]], 300), bits, side)


@pytest.mark.parametrize("keep_norm", [0, 1])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-9, 1e-6, 1e-3, 1e3, 1e9, 1e30])
def test_any_magnitude(scale, keep_norm):
    calibration, _ = opened(2, 72, keep_norm)
    z = synthetic.draw(np.random.default_rng(1), calibration.layers[0]["k"], 100) * np.float32(scale)
    compare(2, 72, z, 3, ffi.K, keep_norm)
    compare(2, 72, z, 3, ffi.V, keep_norm)


@pytest.mark.parametrize("side", [ffi.K, ffi.V])
def test_zeros_outliers_and_levels_themselves(side):
    calibration, _ = opened(3, 64)
    own = calibration.layers[0]["kv"[side]]
    rng = np.random.default_rng(2)
    z = synthetic.draw(rng, own, 200)
    z[:20] = 0
    z[20:40, 1] = 0
    z[40:60, :, 5] *= 1000
    z[60:80] = -np.abs(z[60:80])
    z[80:100] = np.float32(1e-45)
    z[100:120, :, 1:] = 0
    z[120:140] = np.round(z[120:140])
    z[140:160] = -0.0
    for bits in calibration.bits:
        compare(3, 64, z, bits, side)


@pytest.mark.parametrize("side", [ffi.K, ffi.V])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38], ids=str)
def test_a_vector_that_is_not_finite_is_stored_as_zero(bad, side):
    """3e38 is finite, but whitened it leaves f32. Heads beside it keep their values."""
    calibration, c = opened(3, 64)
    own = calibration.layers[0]["kv"[side]]
    z = synthetic.draw(np.random.default_rng(3), own, 64)
    clean = z.copy()
    z[np.arange(64), 1, np.arange(64)] = bad
    compare(3, 64, z, 4, side)
    pack, size = c.pack(0, 4, 4), row_bytes(3, 64, 4)
    values = ffi.decode_rows(pack, side, ffi.encode_rows(pack, side, z, size), 3, 64)
    others = ffi.decode_rows(pack, side, ffi.encode_rows(pack, side, clean, size), 3, 64)
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(values[:, [0, 2]], others[:, [0, 2]])
    if not np.isfinite(bad):
        assert not values[:, 1].any()


def test_gaps_of_a_row_are_zero():
    calibration, c = opened(3, 64)
    for bits in calibration.bits:
        widths = calibration.layers[0]["k"].widths[:, calibration.bits.index(bits)]
        used = np.zeros(row_bytes(3, 64, bits), bool)
        for start, size in zip(head_offsets(widths), head_bytes(widths), strict=True):
            used[start : start + size] = True
        z = synthetic.draw(np.random.default_rng(4), calibration.layers[0]["k"], 50)
        rows = ffi.encode_rows(c.pack(0, bits, bits), ffi.K, z, used.size)  # 0xFF before
        assert not rows[:, ~used].any()
        assert rows[:, used].any()


def test_any_row_decodes():
    """Rows of random bytes: no code is out of range."""
    rng = np.random.default_rng(5)
    for n_head, d in ((3, 64), (1, 8)):
        calibration, c = opened(n_head, d)
        for i, bits in enumerate(calibration.bits):
            rows = rng.integers(0, 256, (200, row_bytes(n_head, d, bits)), np.uint8)
            z = ffi.decode_rows(c.pack(0, bits, 0), ffi.K, rows, n_head, d)
            np.testing.assert_allclose(z, decode_rows(calibration.layers[0]["k"], i, rows), rtol=1e-5, atol=0)


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
usual = st.floats(-4, 4, width=32)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    head=st.lists(st.one_of(usual, floats), min_size=24, max_size=24),
    other=st.integers(0, 2**32 - 1),
    bits=st.integers(2, 6),
    side=st.sampled_from([ffi.K, ffi.V]),
)
def test_bytes_agree_for_any_vector(head, other, bits, side):
    z = np.random.default_rng(other).standard_normal((1, 3, 24)).astype(np.float32)
    z[0, 1] = head
    compare(3, 24, z, bits, side)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 12), bits=st.integers(1, 6), keep_norm=st.integers(0, 1))
def test_bytes_agree_for_random_vectors(seed, spread, bits, keep_norm):
    rng = np.random.default_rng(seed)
    z = (rng.standard_normal((50, 2, 40)) * np.exp(rng.uniform(-spread, spread, (50, 2, 40)))).astype(np.float32)
    compare(2, 40, z, bits, ffi.K, keep_norm)


def test_encode_matrix_is_the_transform():
    calibration, c = opened(3, 64)
    rng = np.random.default_rng(6)
    for side in (ffi.K, ffi.V):
        own = calibration.layers[0]["kv"[side]]
        x = rng.standard_normal((40, 3, 64)).astype(np.float32)
        encode, bias = c.encode_matrix(0, side)
        z = np.einsum("hci,nhi->nhc", encode.astype(np.float64), x) + bias
        expected = transform(own, x)
        assert np.abs(z - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize(("n_head", "d", "bits"), [(3, 64, 2), (2, 72, 5), (1, 8, 1), (8, 128, 3)])
def test_set_rows_writes_the_rows_it_is_told_and_no_other(n_head, d, bits, n_threads):
    calibration, c = opened(n_head, d)
    rng = np.random.default_rng(7)
    n, cells, size = 37, 64, row_bytes(n_head, d, bits)
    index = rng.permutation(cells)[:n]
    index[rng.permutation(n)[:9]] = -1
    for side in (ffi.K, ffi.V):
        own = calibration.layers[0]["kv"[side]]
        z = synthetic.draw(rng, own, n)
        before = rng.integers(0, 256, (cells, size), np.uint8)
        with ggml_graph.graph() as g:
            cache = g.rows(ffi.kvtc_type(bits), n_head * d, before)
            # as the graph makes it: [head_dim, n_tokens, n_head]
            result = ffi.base.ggml_kvtc_set_rows(
                g.ctx,
                cache,
                g.tensor(z.transpose(1, 0, 2)),
                g.tensor(index.astype(np.int64)),
                g.pack(c.pack(0, bits, bits)),
                side,
            )
            rows = g.compute(result, n_threads, poison=False).reshape(cells, size)
        expected = before.copy()
        expected[index[index >= 0]] = encode_rows(own, calibration.bits.index(bits), z[index >= 0], bits)
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_set_rows_of_the_exact_store_rounds_to_f16(n_threads):
    calibration, c = opened(3, 64)
    rng = np.random.default_rng(8)
    z = rng.standard_normal((21, 3, 64)).astype(np.float32)
    index = rng.permutation(32)[:21].astype(np.int64)
    index[[2, 9]] = -1, -7
    before = rng.standard_normal((3, 32, 64)).astype(np.float16)
    with ggml_graph.graph() as g:
        store = g.tensor(before)
        tensors = g.tensor(z.transpose(1, 0, 2)), g.tensor(index), g.pack(c.pack(0, 2, 2))
        result = ffi.base.ggml_kvtc_set_rows(g.ctx, store, *tensors, ffi.K)
        after = g.compute(result, n_threads, poison=False).view(np.float16).reshape(before.shape)
    expected = before.copy()
    expected[:, index[index >= 0]] = z[index >= 0].astype(np.float16).transpose(1, 0, 2)
    np.testing.assert_array_equal(after.view(np.uint16), expected.view(np.uint16))


def test_set_rows_takes_a_view_of_z():
    """z as a graph may hold it: heads and tokens in the other order in memory."""
    calibration, c = opened(3, 64)
    own = calibration.layers[0]["k"]
    z = synthetic.draw(np.random.default_rng(9), own, 17)
    with ggml_graph.graph() as g:
        cache = g.rows(ffi.kvtc_type(3), 192, np.zeros((17, 72), np.uint8))
        view = ffi.base.ggml_permute(g.ctx, g.tensor(z), 0, 2, 1, 3)
        tensors = view, g.tensor(np.arange(17, dtype=np.int64)), g.pack(c.pack(0, 3, 3))
        rows = g.compute(ffi.base.ggml_kvtc_set_rows(g.ctx, cache, *tensors, ffi.K), 2, poison=False).reshape(17, 72)
    np.testing.assert_array_equal(rows, encode_rows(own, calibration.bits.index(3), z, 3))


def test_set_rows_keeps_six_tensors_and_says_when_there_is_no_room():
    _, c = opened(3, 64)
    with ggml_graph.graph() as g:
        z = g.tensor(np.zeros((3, 1, 64), np.float32))
        index = g.tensor(np.zeros(1, np.int64))
        store = g.tensor(np.zeros((3, 4, 64), np.float16))
        rows = ffi.base.ggml_kvtc_set_rows(g.ctx, store, z, index, g.pack(c.pack(0, 2, 2)), ffi.K)
        assert [ffi.base.ggml_kvtc_set_rows_keep(rows, z) for _ in range(7)] == [True] * 6 + [False]
        assert not g.compute(rows, 1, poison=False).any()


def test_type_names():
    for bits in range(1, 7):
        kind = ffi.kvtc_type(bits)
        assert ffi.base.ggml_kvtc_is_type(kind)
        assert ffi.base.ggml_kvtc_type_bits(kind) == bits
        assert ffi.ffi.string(ffi.base.ggml_type_name(kind)) == b"kvtc%d" % bits
        assert ffi.base.ggml_row_size(kind, 192) == row_bytes(3, 64, bits)
    for name in (b"kvtc0", b"kvtc7", b"kvtc8", b"kvtc", b"kvtc22", b"q8_0", b""):
        assert not ffi.base.ggml_kvtc_is_type(ffi.base.ggml_kvtc_type_from_name(name))
    for bits in (2, 3, 4):
        kind = ffi.turbo_type(bits)
        assert ffi.base.ggml_kvtc_is_type(kind) and ffi.base.ggml_kvtc_is_turbo(kind)
        assert not ffi.base.ggml_kvtc_is_turbo(ffi.kvtc_type(bits))
        assert ffi.base.ggml_kvtc_type_bits(kind) == bits
        assert ffi.ffi.string(ffi.base.ggml_type_name(kind)) == b"turbo%d" % bits
    for name in (b"turbo1", b"turbo5", b"turbo"):
        assert not ffi.base.ggml_kvtc_is_type(ffi.base.ggml_kvtc_type_from_name(name))
    assert ffi.base.ggml_kvtc_type_bits(ffi.F16) == 0
