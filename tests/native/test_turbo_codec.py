"""The turbo types in C against their numpy twin. Failures caught: another rotation, codebook or row than the README's,
a norm read from the wrong place, attention that rotates keys or takes one type's rows for another's.
"""

from __future__ import annotations

import ffi
import ggml_graph
import numpy as np
import pytest
import synthetic
from attention_case import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from kvtc_gguf import reference_turbo as turbo
from kvtc_gguf.layout import row_bytes, turbo_row_bytes
from kvtc_gguf.reference import decode_rows, encode_rows, transform
from kvtc_gguf.reference_rope import Rope
from test_attention import check
from test_codec import opened

SHAPES = [(1, 8), (1, 64), (3, 64), (5, 80), (1, 80), (3, 96), (8, 128), (4, 256), (1, 512), (2, 24), (7, 40)]


def native(n_head: int, d: int, bits: int) -> ffi.Native:
    """Both sides of layer 0 of type turbo<bits>."""
    return ffi.Native.empty().with_turbo(ffi.K, bits, n_head, d).with_turbo(ffi.V, bits, n_head, d)


def compare(z: np.ndarray, bits: int, side: int = ffi.K) -> None:
    """The same bytes, and the same values from them."""
    _, n_head, d = z.shape
    pack, own = native(n_head, d, bits).pack(0, bits, bits), turbo.side(n_head, d, bits)
    rows = ffi.encode_rows(pack, side, z, turbo_row_bytes(n_head, d, bits))
    np.testing.assert_array_equal(rows, encode_rows(own, 0, z, bits))
    np.testing.assert_array_equal(ffi.decode_rows(pack, side, rows, n_head, d), decode_rows(own, 0, rows))


@pytest.mark.parametrize("bits", turbo.BITS)
@pytest.mark.parametrize(("n_head", "d"), SHAPES)
def test_bytes_and_values_agree(n_head, d, bits):
    z = np.random.default_rng(d).standard_normal((200, n_head, d)).astype(np.float32)
    for side in (ffi.K, ffi.V):
        compare(z, bits, side)


@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", turbo.BITS)
def test_outliers_zeros_and_what_is_not_finite(bits, d):
    rng = np.random.default_rng(d)
    z = rng.standard_normal((240, 3, d)).astype(np.float32)
    z[:20] = 0
    z[20:40, 1] = 0
    z[40:60, :, 5] *= 1000
    z[60:80, :, 1:] = 0
    z[80:100] *= np.float32(1e-7)
    z[100:120] *= np.float32(1e6)
    z[120:130, 1, 3], z[130:140, 0, 7], z[140:150, 2, 0] = np.nan, np.inf, -np.inf
    z[150:160] *= np.float32(1e30)
    z[160:170] = np.float32(1e-45)
    z[170:180] = -0.0
    compare(z, bits)


@settings(max_examples=60, deadline=None)
@given(
    head=st.lists(st.floats(width=32), min_size=24, max_size=24),
    magnitude=st.floats(-12, 8),
    bits=st.sampled_from(turbo.BITS),
)
def test_bytes_agree_for_any_vector(head, magnitude, bits):
    z = np.random.default_rng(0).standard_normal((2, 3, 24)) * 10**magnitude
    z[0, 1] = head
    with np.errstate(over="ignore"):
        compare(z.astype(np.float32), bits)


@pytest.mark.parametrize(("n_head", "d"), SHAPES)
def test_encode_matrix_is_the_rotation(n_head, d):
    encode, bias = native(n_head, d, 3).encode_matrix(0, ffi.V)
    x = np.random.default_rng(0).standard_normal((20, n_head, d)).astype(np.float32)
    z = transform(turbo.side(n_head, d, 3), x)
    np.testing.assert_allclose(np.einsum("hci,nhi->nhc", encode, x), z, atol=1e-5 * np.abs(z).max())
    assert not bias.any()


@pytest.mark.parametrize("bits", turbo.BITS)
@pytest.mark.parametrize(("n_head", "d"), SHAPES)
def test_a_row_is_what_ggml_allocates(n_head, d, bits):
    kind = ffi.turbo_type(bits)
    values = ffi.base.ggml_kvtc_row_values(kind, n_head, d)
    size = ffi.base.ggml_row_size(kind, values)
    assert size == turbo_row_bytes(n_head, d, bits)
    assert 0 <= size - n_head * (d * bits // 8 + 2) <= 2
    for budget in range(1, 7):
        assert ffi.base.ggml_kvtc_row_values(ffi.kvtc_type(budget), n_head, d) == n_head * d


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize(("n_head", "d", "bits"), [(3, 64, 2), (1, 80, 3), (8, 128, 4)])
def test_set_rows_writes_the_rows_it_is_told_and_no_other(n_head, d, bits, n_threads):
    rng = np.random.default_rng(7)
    n, cells, size = 37, 64, turbo_row_bytes(n_head, d, bits)
    index = rng.permutation(cells)[:n]
    index[rng.permutation(n)[:9]] = -1
    z = rng.standard_normal((n, n_head, d)).astype(np.float32)
    before = rng.integers(0, 256, (cells, size), np.uint8)
    kind = ffi.turbo_type(bits)
    with ggml_graph.graph() as g:
        cache = g.rows(kind, ffi.base.ggml_kvtc_row_values(kind, n_head, d), before)
        tensors = g.tensor(z.transpose(1, 0, 2)), g.tensor(index.astype(np.int64))
        pack = g.pack(native(n_head, d, bits).pack(0, bits, bits))
        result = ffi.base.ggml_kvtc_set_rows(g.ctx, cache, *tensors, pack, ffi.V)
        rows = g.compute(result, n_threads, poison=False).reshape(cells, size)
    expected = before.copy()
    expected[index[index >= 0]] = encode_rows(turbo.side(n_head, d, bits), 0, z[index >= 0], bits)
    np.testing.assert_array_equal(rows, expected)


def test_any_row_decodes_to_finite_values():
    """Rows of random bytes, as a damaged state may have them where no query looks."""
    rows = np.random.default_rng(5).integers(0, 256, (500, turbo_row_bytes(3, 64, 3)), np.uint8)
    z = ffi.decode_rows(native(3, 64, 3).pack(0, 3, 3), ffi.K, rows, 3, 64)
    assert np.isfinite(z).all()
    np.testing.assert_array_equal(z, decode_rows(turbo.side(3, 64, 3), 0, rows))


def test_sides_of_a_file_stay_as_they_are_beside_a_turbo_side():
    calibration, c = opened(3, 64)
    mixed = c.with_turbo(ffi.V, 3, 3, 64)
    z = synthetic.draw(np.random.default_rng(0), calibration.layers[0]["k"], 50)
    pack, plain = mixed.pack(0, 2, 3), c.pack(0, 2, 2)
    rows = ffi.encode_rows(pack, ffi.K, z, row_bytes(3, 64, 2))
    np.testing.assert_array_equal(rows, ffi.encode_rows(plain, ffi.K, z, row_bytes(3, 64, 2)))
    rows = ffi.encode_rows(pack, ffi.V, z, turbo_row_bytes(3, 64, 3))
    np.testing.assert_array_equal(rows, encode_rows(turbo.side(3, 64, 3), 0, z, 3))
    assert c.fingerprint == mixed.fingerprint and c.bits == mixed.bits


def test_calibrations_of_other_types_have_other_names():
    """What a saved state is checked by."""

    def name(c: ffi.Native) -> int:
        return ffi.base.ggml_kvtc_calibration_hash(c.handle)

    _, c = opened(3, 64)
    names = [name(c), *(name(c.with_turbo(side, bits, 3, 64)) for side in (ffi.K, ffi.V) for bits in turbo.BITS)]
    names += [name(native(3, 64, bits)) for bits in turbo.BITS]
    assert len(set(names)) == len(names)
    assert name(native(3, 64, 2)) == name(native(3, 64, 2))


@pytest.mark.parametrize("tokens", [1, 7, 130])
@pytest.mark.parametrize("exact", ["none", "some", "batch"])
@pytest.mark.parametrize("bits", turbo.BITS)
def test_attention(bits, exact, tokens):
    """Case's RoPE is there, but keys come rotated: the operation must not rotate them again."""
    check(Case(k=f"turbo{bits}", v=f"turbo{bits}", heads=3, tokens=tokens, n_kv=300, exact=exact))


@pytest.mark.parametrize("d", [8, 80, 96, 128, 256, 512])
def test_attention_of_every_head_dim(d):
    case = {"dk": d, "heads": 1, "rope": Rope(d, neox=True), "order": "shuffled", "exact": "some"}
    check(Case(k="turbo3", v="turbo2", **case), (2,))
    check(Case(k="turbo4", v="turbo3", streams=2, **case), (2,))


@pytest.mark.parametrize("turbo_side", ["k", "v"])
@pytest.mark.parametrize("other", [2, 4, "f16", "q8_0", "f32"])
def test_attention_with_another_type_beside(other, turbo_side):
    kinds = {"k": other, "v": other} | {turbo_side: "turbo3"}
    for tokens in (1, 40):
        check(Case(**kinds, heads=3, tokens=tokens, n_kv=200, exact="some", window=20), (2,))
