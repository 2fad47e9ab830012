"""The entropy coder of rows (ggml_kvtc/kvtc-rows.h), for states of real sizes; `reference_rows.py` is its twin."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvtc_gguf.layout import FormatError
from kvtc_gguf.native.library import load
from kvtc_gguf.reference_rows import Run


class RowCodec:
    """A row model of the library's. Raises NativeError where there is no library."""

    def __init__(self, pointer: Any) -> None:
        library = load()
        self._ffi, self._base = library.ffi, library.base
        self._pointer = self._ffi.gc(pointer, self._base.ggml_kvtc_rows_free)
        self.row_bytes = self._base.ggml_kvtc_row_bytes(self._pointer)

    @classmethod
    def read(cls, data: bytes) -> RowCodec:
        """The codec of a model's bytes. Raises FormatError if they are none."""
        library = load()
        pointer = library.base.ggml_kvtc_rows_read(library.ffi.from_buffer("uint8_t[]", data), len(data))
        if not pointer:
            raise FormatError("row model: damaged")
        return cls(pointer)

    @classmethod
    def fit(cls, runs: list[Run], rows: np.ndarray) -> RowCodec:
        """The codec that suits rows u8 [n, row_bytes] made of these runs, which `RowModel` has taken."""
        library, rows = load(), np.ascontiguousarray(rows, np.uint8)
        array = library.ffi.new("struct ggml_kvtc_run[]", [(run.bits, run.kind, run.count) for run in runs])
        return cls(library.base.ggml_kvtc_rows_fit(array, len(runs), library.pointer(rows, "uint8_t *"), len(rows)))

    def to_bytes(self) -> bytes:
        out = self._ffi.new("uint8_t[]", self._base.ggml_kvtc_rows_write(self._pointer, self._ffi.NULL, 0))
        self._base.ggml_kvtc_rows_write(self._pointer, out, len(out))
        return bytes(out)

    def encode(self, rows: np.ndarray) -> bytes | None:
        """The block of rows u8 [n, row_bytes], None if the model cannot code one of them."""
        rows = np.ascontiguousarray(rows, np.uint8)
        out = self._ffi.new("uint8_t[]", self._base.ggml_kvtc_rows_bound(self._pointer, len(rows)))
        source = self._ffi.from_buffer("uint8_t[]", rows)
        n = self._base.ggml_kvtc_rows_encode(self._pointer, source, len(rows), out)
        return bytes(out[0:n]) or None

    def decode(self, data: bytes, n_rows: int) -> np.ndarray:
        """Rows u8 [n_rows, row_bytes]. Raises FormatError unless `data` is a whole block of so many."""
        rows = np.zeros((n_rows, self.row_bytes), np.uint8)
        source = self._ffi.from_buffer("uint8_t[]", data)
        into = self._ffi.from_buffer("uint8_t[]", rows, require_writable=True)
        if not self._base.ggml_kvtc_rows_decode(self._pointer, source, len(data), into, n_rows):
            raise FormatError("block of rows: damaged")
        return rows
