"""A calibration as the C loader reads it, and packs: what the kernels read of one layer."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from kvtc_gguf.native.library import K, Library, NativeError, V, load
from kvtc_gguf.reference_rope import Rope, Turns

ERROR_SIZE = 1024
ROPE_NORMAL, ROPE_NEOX = 1, 2  # enum ggml_kvtc_rope_type


def fingerprint(path: str | os.PathLike[str], library: Library | None = None) -> str:
    """The C++ fingerprint of a model, 16 hex digits. Raises NativeError with the library's message."""
    lib = library or load()
    out, message = lib.ffi.new("char[17]"), lib.ffi.new(f"char[{ERROR_SIZE}]")
    if not lib.base.ggml_kvtc_fingerprint(os.fsencode(path), out, message, ERROR_SIZE):
        raise NativeError(lib.string(message))
    return lib.string(out)


class Calibration:
    """A calibration file, opened by the C loader; read only, so that threads may share it.

    Raises NativeError, with the loader's one line, for a file that it does not take.
    """

    def __init__(self, path: str | os.PathLike[str], library: Library | None = None) -> None:
        self.library = lib = library or load()
        message = lib.ffi.new(f"char[{ERROR_SIZE}]")
        handle = lib.base.ggml_kvtc_calibration_open(os.fsencode(path), message, ERROR_SIZE)
        if not handle:
            raise NativeError(lib.string(message))
        self.handle = lib.ffi.gc(handle, lib.base.ggml_kvtc_calibration_free)

    @property
    def fingerprint(self) -> str:
        """Of the model it was made for."""
        return self.library.string(self.library.base.ggml_kvtc_calibration_fingerprint(self.handle))

    @property
    def hash(self) -> int:
        """Names the calibration itself: saved states of one mean nothing under another."""
        return self.library.base.ggml_kvtc_calibration_hash(self.handle)

    @property
    def bits(self) -> list[int]:
        """The budgets it serves, in bits a value."""
        text = self.library.string(self.library.base.ggml_kvtc_calibration_bits(self.handle))
        return [int(bits) for bits in text.split(",")]

    def shape(self, layer: int, side: int) -> tuple[int, int] | None:
        """(kv heads, head_dim), None where the file has no such layer."""
        n_head, head_dim = self.library.ffi.new("int *"), self.library.ffi.new("int *")
        found = self.library.base.ggml_kvtc_calibration_shape(self.handle, layer, side, n_head, head_dim)
        return (n_head[0], head_dim[0]) if found else None

    def layer_bits(self, layer: int, side: int, bits: int) -> int:
        """The bits that a layer keeps where `bits` are asked for, 0 where the file cannot serve that."""
        return self.library.base.ggml_kvtc_calibration_layer_bits(self.handle, layer, side, bits)

    def encode_matrix(self, layer: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        """f32 [H, d, d] and bias f32 [H, d]: z = encode @ x + bias."""
        n_head, d = self._shape(layer, side)
        encode, bias = np.empty((n_head, d, d), np.float32), np.empty((n_head, d), np.float32)
        pointers = (self.library.pointer(array, "float *") for array in (encode, bias))
        self.library.base.ggml_kvtc_encode_matrix(self.handle, layer, side, *pointers)
        return encode, bias

    def transform(self, layer: int, side: int, x: np.ndarray) -> np.ndarray:
        """z f32 [n, H, d] of keys before RoPE, or values, x f32 [n, H, d]: what a row codes."""
        encode, bias = self.encode_matrix(layer, side)
        return np.einsum("hcd,nhd->nhc", encode, x, optimize=True).astype(np.float32) + bias

    def pack(self, layer: int, bits_k: int, bits_v: int) -> Pack:
        """What the CPU's kernels read of a layer whose sides have these bits (see `layer_bits`); 0: of another type.

        Raises NativeError for a layer or bits that the file does not hold.
        """
        for side, bits in ((K, bits_k), (V, bits_v)):
            if bits:
                self._shape(layer, side)
                if not self.library.base.ggml_kvtc_calibration_has_bits(self.handle, bits):
                    raise NativeError(f"{'KV'[side]} of layer {layer} has no {bits} bits")
        memory = aligned(self.library.base.ggml_kvtc_pack_size(self.handle, layer, bits_k, bits_v))
        self.library.base.ggml_kvtc_pack_write(self.handle, layer, bits_k, bits_v, self.library.pointer(memory))
        shapes = (self.shape(layer, K) or (0, 0), self.shape(layer, V) or (0, 0))
        return Pack(self.library, memory, (bits_k, bits_v), shapes)

    def _shape(self, layer: int, side: int) -> tuple[int, int]:
        shape = self.shape(layer, side)
        if shape is None:
            raise NativeError(f"the calibration has no {'KV'[side]} of layer {layer}")
        return shape


class Pack:
    """One layer's tables for the CPU's kernels. Encoding, decoding and attention only read it.

    memory: u8 [n] at a multiple of 64. bits: of K and V, 0 for a side of another type. shapes: (kv heads, head_dim).
    """

    def __init__(self, library: Library, memory: np.ndarray, bits: tuple[int, int], shapes: Any) -> None:
        self.library, self.memory, self.bits, self.shapes = library, memory, bits, shapes

    def type(self, side: int) -> int:
        """The ggml type of a coded side."""
        return self.library.base.ggml_kvtc_type_from_name(f"kvtc{self.bits[side]}".encode())

    def row_bytes(self, side: int) -> int:
        """Bytes of a token's row."""
        n_head, d = self.shapes[side]
        return self.library.base.ggml_row_size(self.type(side), n_head * d)

    def encode(self, side: int, z: np.ndarray) -> np.ndarray:
        """Rows u8 [n, row_bytes] of z f32 [n, H, d]. Raises ValueError for another shape."""
        self._check(side, z.shape[1:])
        return encode_rows(self.library, self.memory, side, z, self.row_bytes(side))

    def decode(self, side: int, rows: np.ndarray) -> np.ndarray:
        """z f32 [n, H, d] of rows u8 [n, row_bytes]. Raises ValueError for another size of rows."""
        self._check(side, tuple(self.shapes[side]))
        if rows.shape[1:] != (self.row_bytes(side),):
            raise ValueError(f"rows of {'KV'[side]} have {self.row_bytes(side)} bytes, not {rows.shape[1:]}")
        return decode_rows(self.library, self.memory, side, rows, *self.shapes[side])

    def set_rope(self, rope: Rope | Turns) -> None:
        """Give the pack the rotation of the model's keys; attention applies it. Not while another thread attends.

        Raises NativeError for what is no rotation of these heads by one position.
        """
        if not self.bits[K] or rope.n_dims % 2 or not 0 < rope.n_dims <= self.shapes[K][1]:
            raise NativeError(f"a rotation of {rope.n_dims} channels does not fit K of this pack: {self._side(K)}")
        set_rope(self.library, self.memory, rope)

    def _check(self, side: int, shape: tuple[int, ...]) -> None:
        if not self.bits[side] or shape != tuple(self.shapes[side]):
            raise ValueError(f"{'KV'[side]} of this pack: {self._side(side)}, not {shape}")

    def _side(self, side: int) -> str:
        return f"{self.bits[side]} bits, heads and head_dim {self.shapes[side]}"


def aligned(size: int) -> np.ndarray:
    """u8 [size] that starts at a multiple of 64, filled with 0xAA."""
    memory = np.full(size + 64, 0xAA, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def encode_rows(lib: Library, pack: np.ndarray, side: int, z: np.ndarray, row_bytes: int) -> np.ndarray:
    """Rows u8 [n, row_bytes] of z f32 [n, H, d]; what they held before is 0xFF."""
    rows = np.full((len(z), row_bytes), 0xFF, np.uint8)
    z = np.ascontiguousarray(z, np.float32)
    lib.cpu.ggml_kvtc_cpu_encode(
        lib.pointer(pack), side, len(z), lib.pointer(z, "float *"), lib.pointer(rows, "uint8_t *")
    )
    return rows


def decode_rows(lib: Library, pack: np.ndarray, side: int, rows: np.ndarray, n_head: int, d: int) -> np.ndarray:
    """z f32 [n, H, d] of rows u8 [n, row_bytes]."""
    rows = np.ascontiguousarray(rows, np.uint8)
    z = np.full((len(rows), n_head, d), np.nan, np.float32)
    lib.cpu.ggml_kvtc_cpu_decode(
        lib.pointer(pack), side, len(rows), lib.pointer(rows, "uint8_t *"), lib.pointer(z, "float *")
    )
    return z


def rope_struct(lib: Library, rope: Rope | Turns) -> Any:
    """struct ggml_kvtc_rope of a rotation; a Rope goes by op_params, as of ggml's ROPE node. Raises NativeError."""
    if isinstance(rope, Turns):
        if rope.n_offs:
            raise NativeError("this is no rotation of a head's first channels")
        kind = ROPE_NEOX if rope.neox else ROPE_NORMAL
        table = {"type": kind, "n_rot": rope.n_dims, "mscale": rope.scale, "inv_freq": rope.frequencies.tolist()}
        return lib.ffi.new("struct ggml_kvtc_rope *", table)
    floats = [rope.freq_base, rope.freq_scale, rope.ext_factor, rope.attn_factor, rope.beta_fast, rope.beta_slow]
    params = np.zeros(16, np.int32)
    params[[1, 2, 4]] = rope.n_dims, 2 if rope.neox else 0, rope.n_ctx_orig
    params[5:11] = np.array(floats, np.float32).view(np.int32)
    factors = None if rope.freq_factors is None else np.ascontiguousarray(rope.freq_factors, np.float32)
    result = lib.ffi.new("struct ggml_kvtc_rope *")
    given = lib.ffi.NULL if factors is None else lib.pointer(factors, "float *")
    if not lib.base.ggml_kvtc_rope_from_params(lib.pointer(params, "int32_t *"), given, result):
        raise NativeError("this is no rotation by one position")
    return result


def set_rope(lib: Library, pack: np.ndarray, rope: Rope | Turns) -> None:
    """Give a pack in the CPU's layout a rotation."""
    lib.base.ggml_kvtc_pack_set_rope(lib.pointer(pack), rope_struct(lib, rope))
