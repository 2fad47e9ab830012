"""Packs for CUDA devices, read without one. Failures caught: turbo heads that do not find their codes, tables or
rotation, a table or matrix for each head where one serves all, an ordinary side whose values the last kernel changes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native"))

import ffi
from kvtc_gguf import reference, reference_turbo
from kvtc_gguf.layout import turbo_row_bytes
from sides import coded_sides

# ggml_kvtc/kvtc-pack-cuda.h
HEADER, HEAD = 80, 3152
PLACES = {"payload": 0, "n_bytes": 1, "rank": 2, "keep_norm": 3, "mean": 11, "decode": 12}
PLACES |= {"codes": 13, "tables": 14, "n_tables": 15, "n_pairs": 18}
K, V = ffi.K, ffi.V


def write_pack(native: ffi.Native, bits_k: int, bits_v: int) -> np.ndarray:
    """The pack of layer 0, u8."""
    pack = ffi.aligned(ffi.base.ggml_kvtc_cuda_pack_size(native.handle, 0, bits_k, bits_v))
    ffi.base.ggml_kvtc_cuda_pack_write(native.handle, 0, bits_k, bits_v, ffi.pointer(pack))
    return pack


def read_head(pack: np.ndarray, side: int, head: int) -> dict[str, int]:
    start = HEADER + (2 * head + side) * HEAD
    return {name: int(pack[start + 4 * i :][:4].view(np.uint32)[0]) for name, i in PLACES.items()}


def at(pack: np.ndarray, offset: int, count: int, kind: type) -> np.ndarray:
    size = count * np.dtype(kind).itemsize
    return pack[offset : offset + size].view(kind)


def decode_rows(pack: np.ndarray, side: int, rows: np.ndarray, n_head: int, d: int) -> np.ndarray:
    """z f32 [n, H, d] of turbo rows as the kernels read them: codes by the head's table, gains behind all codes."""
    z = np.empty((len(rows), n_head, d), np.float32)
    for h in range(n_head):
        head = read_head(pack, side, h)
        codes = at(pack, head["codes"], 2 * d // 8, np.uint32).reshape(-1, 2)
        gain_at = n_head * head["n_bytes"] + 2 * h
        gain = rows[:, gain_at : gain_at + 2].copy().view(np.float16).astype(np.float32)
        for g, (place, table) in enumerate(codes.tolist()):
            byte, width = place & 0xFFFF, place >> 16 & 0xFF
            assert place >> 24 == d // 8 - g and table == 0
            code = reference.unpack(rows[:, head["payload"] + byte :][:, :width], width)
            if width <= 3:  # pairs of components
                pairs = at(pack, head["tables"], 8 * 4**width, np.float16).reshape(4, 4**width, 2)
                values = [pairs[c // 2, code[:, c - c % 2] | code[:, c - c % 2 + 1] << width, c % 2] for c in range(8)]
            else:
                levels = at(pack, head["tables"], 8 * 2**width, np.float16).reshape(8, 2**width)
                values = [levels[c, code[:, c]] for c in range(8)]
            z[:, h, 8 * g : 8 * g + 8] = np.stack(values, 1).astype(np.float32) * gain
    return z


@pytest.mark.parametrize("bits", reference_turbo.BITS)
@pytest.mark.parametrize(("n_head", "d"), [(1, 64), (3, 80), (2, 96), (8, 128), (2, 256), (1, 512)])
def test_turbo_heads_find_codes_gains_and_rotation(n_head, d, bits):
    sides = ((f"turbo{bits}", d), (f"turbo{bits}", d))
    native, own = coded_sides(n_head, sides)
    pack = write_pack(native, bits, bits)
    z = np.random.default_rng(d).standard_normal((50, n_head, d)).astype(np.float32)
    rows = reference.encode_rows(own[0][0], 0, z, bits)
    rotation = reference_turbo.rotation(d)
    for side in (K, V):
        assert pack[16 + 16 * side :][:16].view(np.uint32).tolist() == [
            bits,
            n_head,
            d,
            turbo_row_bytes(n_head, d, bits),
        ]
        np.testing.assert_array_equal(
            decode_rows(pack, side, rows, n_head, d), reference.decode_rows(own[0][0], 0, rows)
        )
        heads = [read_head(pack, side, h) for h in range(n_head)]
        for head in heads:
            matrix = at(pack, head["decode"], d * d, np.float16).reshape(d, d)
            np.testing.assert_array_equal(matrix, rotation if side == K else rotation.T)
            assert not at(pack, head["mean"], d, np.float32).any()
            assert head["rank"] == d and head["keep_norm"] == 1
        assert len({head["decode"] for head in heads}) == 1 and heads[0]["n_pairs"] == 0
    assert pack.size < 2 * n_head * HEAD + 2 * (2 * d * d + 8192)  # nothing large for each head


@pytest.mark.parametrize("coded", ["turbo3", 2])
def test_values_of_an_ordinary_type_have_a_matrix_of_ones(coded):
    native, _ = coded_sides(3, ((coded, 64), ("f16", 64)))
    pack = write_pack(native, 3 if coded == "turbo3" else 2, 0)
    for h in range(3):
        head = read_head(pack, V, h)
        np.testing.assert_array_equal(at(pack, head["decode"], 64 * 64, np.float16).reshape(64, 64), np.eye(64))
        assert not at(pack, head["mean"], 64, np.float32).any() and head["n_tables"] == 0


def test_limits_are_those_of_coded_sides():
    native, _ = coded_sides(2, (("turbo3", 128), ("turbo4", 128)))
    limits = ffi.ffi.new("int32_t[6]")
    for bits_v, right in ((4, [48, 64, 1024, 256, 0, 0]), (0, [48, 0, 1024, 0, 0, 0])):
        pack = write_pack(native, 3, bits_v)
        ffi.base.ggml_kvtc_cuda_pack_limits(ffi.pointer(pack), limits)
        assert list(limits) == right
