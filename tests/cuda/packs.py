"""Packs for CUDA devices as tests read them, without one (ggml_kvtc/kvtc-pack-cuda.h)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native"))

import ffi
from kvtc_gguf.reference_rope import Rope
from sides import coded_sides

HEADER, HEAD = 80, 3152
PLACES = {"payload": 0, "n_bytes": 1, "rank": 2, "keep_norm": 3, "mean": 11, "decode": 12}
PLACES |= {"levels_at": 6, "levels": 7, "codes": 13, "tables": 14, "n_tables": 15}
PLACES |= {"pair_codes": 16, "pairs": 17, "n_pairs": 18, "n_wide": 19}
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


def turned_pack(d: int, rope: Rope) -> np.ndarray:
    """A pack of two heads that has this rotation."""
    native, _ = coded_sides(2, ((2, d), (4, d)))
    pack = write_pack(native, 2, 4)
    ffi.base.ggml_kvtc_cuda_pack_set_rope(ffi.pointer(pack), ffi.codec.rope_struct(ffi.LIBRARY, rope))
    return pack


def operand_of(pack: np.ndarray, d: int, n_head: int, head: int) -> np.ndarray:
    """A head's operand f16 [d / 8 + 1, d columns, 8 components]."""
    size = (d // 8 + 1) * d * 16
    return at(pack, HEADER + 2 * n_head * HEAD + head * size, size // 2, np.float16).reshape(d // 8 + 1, d, 8)


def parts_of(pack: np.ndarray, d: int, n_head: int, head: int) -> np.ndarray:
    """The same as mma's operand, f16 [d / 8 + 1, d / 32, 8 components, 4, 4, 2]: of columns are all but the first and
    the third."""
    size = (d // 8 + 1) * d * 16
    start = HEADER + 2 * n_head * HEAD + (n_head + head) * size + 256 * 4 * (d // 2 + 16)
    return at(pack, start, size // 2, np.float16).reshape(d // 8 + 1, d // 32, 8, 4, 4, 2)
