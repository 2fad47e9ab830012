"""The entropy coder of the built library, for states of real sizes; `reference_rows.py` is its numpy twin."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from kvtc_gguf.capture import library
from kvtc_gguf.layout import FormatError
from kvtc_gguf.reference_rows import Run


class _Run(ctypes.Structure):
    _fields_ = [("bits", ctypes.c_uint8), ("kind", ctypes.c_uint8), ("count", ctypes.c_uint16)]


def _base() -> ctypes.CDLL:
    base = library.load()[1]
    pointer, size, rows = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    for name, arguments, result in (
        ("rows_fit", [ctypes.POINTER(_Run), ctypes.c_int, pointer, rows], pointer),
        ("rows_write", [pointer, pointer, size], size),
        ("rows_read", [ctypes.c_char_p, size], pointer),
        ("rows_free", [pointer], None),
        ("rows_bound", [pointer, rows], size),
        ("rows_encode", [pointer, pointer, rows, pointer], size),
        ("rows_decode", [pointer, ctypes.c_char_p, size, pointer, rows], ctypes.c_bool),
    ):
        function = getattr(base, f"ggml_kvtc_{name}")
        function.argtypes, function.restype = arguments, result
    return base


class Codec:
    """A model of the library's. Raises FormatError from `coder` and `fit` where there is no library."""

    def __init__(self, pointer: int, row_bytes: int) -> None:
        self._base, self._pointer, self.row_bytes = _base(), pointer, row_bytes

    def to_bytes(self) -> bytes:
        out = ctypes.create_string_buffer(self._base.ggml_kvtc_rows_write(self._pointer, None, 0))
        self._base.ggml_kvtc_rows_write(self._pointer, out, len(out))
        return out.raw

    def encode(self, rows: np.ndarray) -> bytes | None:
        """The block of rows u8 [n, row_bytes], None if the model cannot code one of them."""
        rows = np.ascontiguousarray(rows, np.uint8)
        out = ctypes.create_string_buffer(self._base.ggml_kvtc_rows_bound(self._pointer, len(rows)))
        n = self._base.ggml_kvtc_rows_encode(self._pointer, rows.ctypes.data, len(rows), out)
        return out.raw[:n] or None

    def decode(self, data: bytes, n_rows: int) -> np.ndarray:
        """Rows u8 [n_rows, row_bytes]. Raises FormatError unless `data` is a whole block of so many."""
        rows = np.zeros((n_rows, self.row_bytes), np.uint8)
        if not self._base.ggml_kvtc_rows_decode(self._pointer, data, len(data), rows.ctypes.data, n_rows):
            raise FormatError("block of rows: damaged")
        return rows


@contextmanager
def reading(data: bytes, row_bytes: int) -> Iterator[Codec]:
    """The codec of a model's bytes, which `RowModel.from_bytes` has taken."""
    pointer = _base().ggml_kvtc_rows_read(data, len(data))
    if not pointer:
        raise FormatError("row model: damaged")
    try:
        yield Codec(pointer, row_bytes)
    finally:
        _base().ggml_kvtc_rows_free(pointer)


@contextmanager
def fitting(runs: list[Run], rows: np.ndarray) -> Iterator[Codec]:
    """The codec that suits rows u8 [n, row_bytes]."""
    rows = np.ascontiguousarray(rows, np.uint8)
    array = (_Run * len(runs))(*((run.bits, run.kind, run.count) for run in runs))
    pointer = _base().ggml_kvtc_rows_fit(array, len(runs), rows.ctypes.data, len(rows))
    try:
        yield Codec(pointer, rows.shape[1])
    finally:
        _base().ggml_kvtc_rows_free(pointer)
