"""The fingerprint that ties a calibration to a model: names, types, shapes and samples of its q, k and v weights.

`ggml_kvtc/README.md`, "Fingerprint", is the definition; the C++ loader computes the same.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGUFValueType
from gguf.gguf_reader import ReaderTensor

from kvtc_gguf.gguf_io import Reader
from kvtc_gguf.layout import FormatError

WEIGHTS = (
    "attn_q.weight",
    "attn_q.bias",
    "attn_k.weight",
    "attn_k.bias",
    "attn_v.weight",
    "attn_v.bias",
    "attn_qkv.weight",
    "attn_qkv.bias",
    "attn_q_norm.weight",
    "attn_k_norm.weight",
)
WHOLE = 65536  # tensors up to this many bytes are hashed whole
PIECES, PIECE = 16, 4096  # of larger ones this many pieces of this many bytes are
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Fingerprint, 16 hex digits, of the model in a GGUF, or in the set of split GGUFs that `path` is one of.

    Raises FormatError if a file is absent or broken, or holds none of the weights.
    """
    readers = open_model(path)
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    text = "".join(_tensor_line(tensors[name]) for name in _weight_names(tensors))
    if not text:
        raise FormatError(f"{path}: holds no attention q, k or v weights, so it is no model that kvtc can serve")
    return f"{fnv1a_64((text + ''.join(_rope_lines(readers[0]))).encode()):016x}"


def open_model(path: str | os.PathLike[str]) -> list[Reader]:
    """All files of the model that `path` is or, if it is one of a split model, belongs to, in order.

    Raises FormatError if one is absent or broken.
    """
    reader = Reader(path)
    try:
        count = reader.value("split.count", GGUFValueType.UINT16) or 1
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    if count == 1:
        return [reader]
    path = Path(path)
    match = SPLIT_NAME.fullmatch(path.name)
    if not match or int(match[3]) != count:
        raise FormatError(
            f"{path}: one of {count} files of a split model, but not named like x-00001-of-{count:05d}.gguf"
        )
    return [Reader(path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.gguf")) for i in range(1, count + 1)]


def fnv1a_64(data: bytes) -> int:
    """FNV-1a hash, 64 bits."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def _weight_names(tensors: dict[str, ReaderTensor]) -> Iterator[str]:
    matches = (re.match(r"blk\.(\d{1,9})\.", name) for name in tensors)
    for layer in sorted({int(match[1]) for match in matches if match}):
        yield from (name for weight in WEIGHTS if (name := f"blk.{layer}.{weight}") in tensors)


def _tensor_line(tensor: ReaderTensor) -> str:
    dims = [int(n) for n in tensor.shape]
    while len(dims) > 1 and dims[-1] == 1:
        dims.pop()
    data = tensor.data.reshape(-1).view(np.uint8)
    crc = 0
    if data.size <= WHOLE:
        crc = zlib.crc32(data)
    else:
        for i in range(PIECES):
            start = i * (data.size - PIECE) // (PIECES - 1)
            crc = zlib.crc32(data[start : start + PIECE], crc)
    return f"{tensor.name} {int(tensor.tensor_type)} {','.join(map(str, dims))} {crc:08x}\n"


def _rope_lines(reader: Reader) -> Iterator[str]:
    try:
        architecture = reader.value("general.architecture", GGUFValueType.STRING)
        base = reader.value(f"{architecture}.rope.freq_base", GGUFValueType.FLOAT32)
        count = reader.value(f"{architecture}.rope.dimension_count", GGUFValueType.UINT32)
    except FormatError as error:
        raise FormatError(f"{reader.path}: {error}") from error
    if base is not None:
        yield f"rope.freq_base {base:.9g}\n"
    if count is not None:
        yield f"rope.dimension_count {count}\n"
