"""GGUF reading and writing that neither trusts the file nor walks long arrays element by element.

The `gguf` package keeps one Python object per array element and reads past the end of a truncated file in silence.
`Reader` and `Writer` are its classes with arrays handled as blocks and every read checked against the file's size.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGUFValueType

from kvtc_gguf.layout import FormatError

NUMPY_TYPES = gguf.GGUFReader.gguf_scalar_to_np
GGUF_TYPES = {np.dtype(kind): value for value, kind in NUMPY_TYPES.items()}


class RawArray(NamedTuple):
    """A metadata array as its bytes in the file."""

    item_type: GGUFValueType
    count: int
    data: bytes

    @classmethod
    def of(cls, value: np.ndarray | list[str]) -> RawArray:
        """From numbers [n] or strings."""
        if isinstance(value, np.ndarray):
            little = value.astype(value.dtype.newbyteorder("<"), copy=False)
            return cls(GGUF_TYPES[value.dtype], value.size, little.tobytes())
        encoded = [text.encode() for text in value]
        return cls(GGUFValueType.STRING, len(value), b"".join(struct.pack("<Q", len(e)) + e for e in encoded))

    def values(self) -> np.ndarray | list[str]:
        if self.item_type != GGUFValueType.STRING:
            return np.frombuffer(self.data, NUMPY_TYPES[self.item_type])
        texts, at = [], 0
        for _ in range(self.count):
            (size,) = struct.unpack_from("<Q", self.data, at)
            texts.append(self.data[at + 8 : at + 8 + size].decode())
            at += 8 + size
        return texts


class Reader(gguf.GGUFReader):
    """A GGUF opened for reading, memory mapped. Raises FormatError for everything that is not a complete GGUF."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        try:
            with np.errstate(all="ignore"):
                super().__init__(path)
            if self.byte_order != "I":
                raise ValueError("big-endian files are not supported")
        except OSError as error:
            raise FormatError(f"{path}: cannot be opened: {error.strerror or error}") from error
        # the package answers broken files with anything from KeyError to struct.error
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise FormatError(f"{path}: not a complete GGUF: {reason}") from error

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if offset + np.dtype(dtype).itemsize * int(count) > self.data.size:
            raise ValueError(f"truncated, it ends at byte {self.data.size}")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item_type = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        if item_type in NUMPY_TYPES:
            part = self._get(start, NUMPY_TYPES[item_type], count)
            size = part.nbytes
        elif item_type == GGUFValueType.STRING:
            view, end = memoryview(self.data), start
            for _ in range(count):
                end += 8 + struct.unpack_from("<Q", view, end)[0]
            size = end - start
            part = self._get(start, np.uint8, size)
        else:
            raise ValueError(f"arrays of {item_type.name} are not supported")
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        return 12 + size, [*head, part], [2], [GGUFValueType.ARRAY, item_type]

    def raw(self, key: str) -> Any:
        """The value of a key as `Writer.add` takes it, bytes exact: RawArray, bytes (a string) or a number."""
        found = self.fields[key]
        if found.types[0] == GGUFValueType.ARRAY:
            return RawArray(found.types[1], int(found.parts[-2][0]), found.parts[-1].tobytes())
        return found.parts[-1].tobytes() if found.types[0] == GGUFValueType.STRING else found.parts[-1][0]

    def value(self, key: str, kind: GGUFValueType, item_kind: GGUFValueType | None = None) -> Any:
        """The value of a key, or None where the file has no such key.

        Strings come as str, arrays as numpy arrays or list[str], numbers as Python numbers.
        Raises FormatError if the key has another type than `kind` (arrays: of `item_kind`).
        """
        found = self.fields.get(key)
        if found is None:
            return None
        wanted = [kind] if item_kind is None else [kind, item_kind]
        if found.types != wanted:
            names = [" of ".join(t.name for t in types) for types in (found.types, wanted)]
            raise FormatError(f"{key} is {names[0]}, not {names[1]}")
        value = self.raw(key)
        try:
            if isinstance(value, RawArray):
                return value.values()
            return value.decode() if isinstance(value, bytes) else value.item()
        except UnicodeDecodeError as error:
            raise FormatError(f"{key} is not valid UTF-8") from error


class Writer(gguf.GGUFWriter):
    """A GGUF being written; metadata arrays may be RawArray, and nothing is added that the caller did not ask for."""

    def __init__(self, path: str | os.PathLike[str], alignment: int = gguf.GGUF_DEFAULT_ALIGNMENT) -> None:
        super().__init__(path, "")
        self.kv_data[0].clear()
        self.data_alignment = alignment

    def add(self, key: str, value: Any) -> None:
        """Add str, list[str], a numpy number or a numpy array of numbers; the GGUF type follows from the value's."""
        if isinstance(value, (str, bytes)):
            self.add_key_value(key, value, GGUFValueType.STRING)
        elif isinstance(value, RawArray):
            self.add_key_value(key, value, GGUFValueType.ARRAY)
        elif isinstance(value, (list, np.ndarray)):
            self.add_key_value(key, RawArray.of(value), GGUFValueType.ARRAY)
        else:
            self.add_key_value(key, value.item(), GGUF_TYPES[value.dtype.newbyteorder("=")])

    def _pack_val(self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: Any = None) -> bytes:
        if not isinstance(val, RawArray):
            return super()._pack_val(val, vtype, add_vtype, sub_type)
        head = struct.pack("<IQ", val.item_type, val.count)
        return (struct.pack("<I", vtype) if add_vtype else b"") + head + val.data

    def finish(self, tensors: list[tuple[str, np.ndarray, gguf.GGMLQuantizationType | None]]) -> None:
        """Write metadata and tensors (name, array, ggml type where the array holds its bytes), and close."""
        try:
            for name, array, kind in tensors:
                self.add_tensor_info(name, array.shape, array.dtype, array.nbytes, kind)
            self.write_header_to_file()
            self.write_kv_data_to_file()
            self.write_ti_data_to_file()
            for _, array, _ in tensors:
                self.write_tensor_data(np.ascontiguousarray(array))
            # the last tensor info may end between two alignments, and data starts there even when it is empty
            if not tensors and self.fout is not None:
                self.write_padding(self.fout[0], self.fout[0].tell())
        finally:
            self.close()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block succeeds, and vanishes when it does not."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
