"""A calibration in memory, and its two homes: a GGUF of its own (sidecar) or the metadata of the model's GGUF.

Every key and tensor is described in `ggml_kvtc/README.md`, "Calibration file".
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFValueType
from gguf.gguf_reader import ReaderTensor

from kvtc_gguf.gguf_io import Reader, Writer, replacing
from kvtc_gguf.layout import GAIN_STEPS, GROUP, VERSION, WIDTHS, FormatError, join_codebooks, split_codebooks
from kvtc_gguf.validate import check_array, check_bits, check_calibration, check_shape, check_widths

if TYPE_CHECKING:
    from kvtc_gguf.reference import HeadPlan

__all__ = [
    "GAIN_STEPS",
    "GROUP",
    "VERSION",
    "WIDTHS",
    "Calibration",
    "FormatError",
    "SideCalibration",
    "metadata_arrays",
    "read",
    "write",
]

SIDES = ("k", "v")
# the arrays of one side in file order, with their types
PARTS = {"mean": "<f4", "scale": "<f4", "gain": "<f4", "decode": "<f2", "widths": "i1", "codebook": "<f2"}


@dataclass
class SideCalibration:
    """The K or the V of one layer: H kv heads, d head_dim, B budgets, G = d // 8 groups."""

    mean: np.ndarray  # f32 [H, d], subtracted before the transform
    scale: np.ndarray  # f32 [H, d], standard deviation of each component, > 0
    gain_base: np.ndarray  # f32 [H], > 0
    gain_rule: np.ndarray  # i32 [H], 0 unbiased, 1 norm keeping
    decode: np.ndarray  # f16 [H, d, d], x_i = sum_c decode[h, i, c] z_c + mean_i
    widths: np.ndarray  # i8 [H, B, G], never rising along G
    codebooks: dict[tuple[int, int, int], np.ndarray]  # (head, group, width) -> f16 [8, 2**width], rising levels
    transforms: list[str]  # name per head, informative
    turbo: bool = False  # rows of a turbo type (`reference_turbo`); no file holds such a side

    @property
    def n_head(self) -> int:
        return int(self.mean.shape[0])

    @property
    def head_dim(self) -> int:
        return int(self.mean.shape[1])

    def head_plan(self, head: int, budget_index: int) -> HeadPlan:
        """What encoding and decoding one head at one budget needs (a `reference.HeadPlan`)."""
        from kvtc_gguf.reference import HeadPlan

        return HeadPlan.of(self, head, budget_index)


@dataclass
class Calibration:
    """Everything a kvtc cache needs to know about a model."""

    fingerprint: str  # 16 hex digits, see `kvtc_gguf.fingerprint`
    architecture: str
    block_count: int
    bits: list[int]  # budgets, rising; index into SideCalibration.widths
    layers: dict[int, dict[str, SideCalibration]]  # layer -> {"k": ..., "v": ...}
    corpus: str = ""
    tokens: int = 0
    tool: str = ""
    date: str = ""
    # side -> [B][block_count]: the bits that each layer keeps when a budget is asked for, 0 for layers without a cache;
    # without an entry for the side, every layer keeps what was asked for
    layer_bits: dict[str, list[list[int]]] = field(default_factory=dict)
    stats: dict[str, np.ndarray] = field(default_factory=dict)  # tensor name after "kvtc.stats." -> array, sidecar only

    def kept_bits(self, layer: int, side: str, bits: int) -> int:
        """The bits that a layer with a cache keeps of its K or V ("k", "v") when the user asks for `bits`."""
        table = self.layer_bits.get(side)
        return table[self.bits.index(bits)][layer] if table else bits


def write(
    calibration: Calibration, path: str | os.PathLike[str], check: Callable[[Path], None] = lambda path: None
) -> None:
    """Write a sidecar; `path` is replaced whole or not at all. Raises FormatError if the calibration is not valid.

    check: sees the finished file before it takes its place, which it does not if this raises.
    """
    check_calibration(calibration)
    tensors: list[tuple[str, np.ndarray, None]] = []
    for layer, sides in sorted(calibration.layers.items()):
        for name in SIDES:
            parts = zip(PARTS, _side_arrays(sides[name]), strict=True)
            tensors += [(f"kvtc.blk.{layer}.{name}.{part}", array, None) for part, array in parts]
    tensors += [(f"kvtc.stats.{name}", array, None) for name, array in calibration.stats.items()]
    with replacing(path) as temporary:
        writer = Writer(temporary)
        writer.add("general.type", "kvtc")
        for key, value in _header(calibration).items():
            writer.add(key, value)
        writer.finish(tensors)
        check(temporary)


def metadata_arrays(calibration: Calibration) -> dict[str, Any]:
    """The metadata that embeds a calibration: key -> str, list[str], numpy number, i32 array, or u64 array per layer.

    Raises FormatError if the calibration is not valid. The statistics stay behind.
    """
    check_calibration(calibration)
    result = _header(calibration)
    for layer, sides in sorted(calibration.layers.items()):
        arrays = [_side_arrays(sides[name]) for name in SIDES]
        sizes = [(a[0].shape[1], a[0].shape[0], a[-1].size) for a in arrays]
        blocks = [np.array(sizes, "<u8").tobytes()]
        for array in (*arrays[0], *arrays[1]):
            data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
            blocks.append(data + bytes(-len(data) % 8))
        result[f"kvtc.blk.{layer}"] = np.frombuffer(b"".join(blocks), np.uint64)
    return result


def read(path: str | os.PathLike[str]) -> Calibration:
    """The calibration in a sidecar or embedded in a model's GGUF, fully checked.

    Raises FormatError, one line that starts with the path, for a file that is absent, broken, of another version, or
    holds anything that cannot be used.
    """
    reader = Reader(path)
    try:
        return _read(reader)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def _header(calibration: Calibration) -> dict[str, Any]:
    header: dict[str, Any] = {
        "kvtc.version": np.uint32(VERSION),
        "kvtc.model.fingerprint": calibration.fingerprint,
        "kvtc.model.architecture": calibration.architecture,
        "kvtc.block_count": np.uint32(calibration.block_count),
        "kvtc.bits": np.array(calibration.bits, np.int32),
        "kvtc.calibration.corpus": calibration.corpus,
        "kvtc.calibration.tokens": np.uint32(calibration.tokens),
        "kvtc.calibration.tool": calibration.tool,
        "kvtc.calibration.date": calibration.date,
    }
    for name, table in sorted(calibration.layer_bits.items()):
        header[f"kvtc.layer_bits.{name}"] = np.array(table, np.int32).reshape(-1)
    for layer, sides in sorted(calibration.layers.items()):
        for name in SIDES:
            header[f"kvtc.blk.{layer}.{name}.transforms"] = list(sides[name].transforms)
    return header


def _side_arrays(side: SideCalibration) -> tuple[np.ndarray, ...]:
    """The arrays of one side as the file holds them, in the order of PARTS."""
    gain = np.stack([side.gain_base, side.gain_rule.astype(np.float32)], axis=1)
    return side.mean, side.scale, gain, side.decode, side.widths, join_codebooks(side.widths, side.codebooks)


def _read(reader: Reader) -> Calibration:
    if "kvtc.version" not in reader.fields:
        raise FormatError("holds no kvtc calibration; make one with `python -m kvtc_gguf.calibrate model.gguf`")
    version = reader.value("kvtc.version", GGUFValueType.UINT32)
    if version != VERSION:
        hint = "update kvtc" if version > VERSION else "calibrate the model again"
        raise FormatError(f"format version {version}, this kvtc reads version {VERSION}: {hint}")
    bits = _required(reader, "kvtc.bits", GGUFValueType.ARRAY, GGUFValueType.INT32).tolist()
    check_bits(bits)
    sidecar = reader.value("general.type", GGUFValueType.STRING) == "kvtc"
    tensors = {t.name: t for t in reader.tensors}
    stats = {
        name.removeprefix("kvtc.stats."): _tensor(tensors, name) for name in tensors if name.startswith("kvtc.stats.")
    }
    calibration = Calibration(
        fingerprint=_required(reader, "kvtc.model.fingerprint", GGUFValueType.STRING),
        architecture=reader.value("kvtc.model.architecture", GGUFValueType.STRING) or "",
        block_count=_required(reader, "kvtc.block_count", GGUFValueType.UINT32),
        bits=bits,
        layers={},
        corpus=reader.value("kvtc.calibration.corpus", GGUFValueType.STRING) or "",
        tokens=reader.value("kvtc.calibration.tokens", GGUFValueType.UINT32) or 0,
        tool=reader.value("kvtc.calibration.tool", GGUFValueType.STRING) or "",
        date=reader.value("kvtc.calibration.date", GGUFValueType.STRING) or "",
        stats=stats if sidecar else {},
    )
    pattern = r"kvtc\.blk\.(0|[1-9]\d{0,8})" + (r"\.[kv]\.\w+" if sidecar else "")
    found = (re.fullmatch(pattern, name) for name in (tensors if sidecar else reader.fields))
    for layer in sorted({int(match[1]) for match in found if match}):
        arrays = _sidecar_layer(tensors, layer) if sidecar else _embedded_layer(reader, layer, len(bits))
        sides = {}
        for name in SIDES:
            key = f"kvtc.blk.{layer}.{name}.transforms"
            transforms = reader.value(key, GGUFValueType.ARRAY, GGUFValueType.STRING)
            try:
                sides[name] = _side(arrays[name], bits, transforms)
            except FormatError as error:
                raise FormatError(f"layer {layer} {name}: {error}") from error
        calibration.layers[layer] = sides
    calibration.layer_bits = _layer_bits(reader, calibration)
    check_calibration(calibration)
    return calibration


def _required(reader: Reader, key: str, *kinds: GGUFValueType) -> Any:
    value = reader.value(key, *kinds)
    if value is None:
        raise FormatError(f"{key} is missing")
    return value


def _layer_bits(reader: Reader, calibration: Calibration) -> dict[str, list[list[int]]]:
    result, size = {}, len(calibration.bits) * calibration.block_count
    for name in SIDES:
        key = f"kvtc.layer_bits.{name}"
        array = reader.value(key, GGUFValueType.ARRAY, GGUFValueType.INT32)
        if array is None:
            continue
        if len(array) != size:
            raise FormatError(f"{key} has {len(array)} entries where budgets and layers ask for {size}")
        result[name] = array.reshape(len(calibration.bits), -1).tolist()
    return result


def _tensor(tensors: dict[str, ReaderTensor], name: str) -> np.ndarray:
    if name not in tensors:
        raise FormatError(f"tensor {name} is missing")
    tensor = tensors[name]
    if tensor.tensor_type.name not in ("F16", "F32", "F64", "I8", "I16", "I32", "I64"):
        raise FormatError(f"tensor {name} is {tensor.tensor_type.name}")
    return np.array(tensor.data)


def _sidecar_layer(tensors: dict[str, ReaderTensor], layer: int) -> dict[str, list[np.ndarray]]:
    return {name: [_tensor(tensors, f"kvtc.blk.{layer}.{name}.{part}") for part in PARTS] for name in SIDES}


def _embedded_layer(reader: Reader, layer: int, n_bits: int) -> dict[str, list[np.ndarray]]:
    """Take the array of one layer apart; its sizes are checked before anything is indexed by them."""
    key = f"kvtc.blk.{layer}"
    data = reader.value(key, GGUFValueType.ARRAY, GGUFValueType.UINT64).tobytes()
    if len(data) < 48:
        raise FormatError(f"{key} is too short")
    sizes = np.frombuffer(data, "<u8", 6).tolist()
    at, result = 48, {}
    for name, (d, n_head, n_codebook) in zip(SIDES, (sizes[:3], sizes[3:]), strict=True):
        check_shape(n_head, d)
        shapes = [(n_head, d), (n_head, d), (n_head, 2), (n_head, d, d), (n_head, n_bits, d // GROUP), (n_codebook,)]
        result[name] = []
        for kind, shape in zip(PARTS.values(), shapes, strict=True):
            size = math.prod(shape) * np.dtype(kind).itemsize
            if at + size > len(data):
                raise FormatError(f"{key} is too short")
            result[name].append(np.frombuffer(data[at : at + size], kind).reshape(shape))
            at += size + (-size % 8)
    if at != len(data):
        raise FormatError(f"{key} has {len(data)} bytes, its sizes ask for {at}")
    return result


def _side(arrays: list[np.ndarray], bits: list[int], transforms: list[str] | None) -> SideCalibration:
    mean, scale, gain, decode, widths, codebook = arrays
    if mean.ndim != 2:
        raise FormatError("mean is not an array [H, d]")
    n_head, head_dim = mean.shape
    check_shape(n_head, head_dim)
    check_array("gain", gain, np.float32, (n_head, 2))
    check_widths(widths, n_head, head_dim, bits)
    rule = gain[:, 1].astype(np.int32) if np.isin(gain[:, 1], (0, 1)).all() else np.full(n_head, -1, np.int32)
    check_array("codebook", codebook, np.float16, (codebook.size,))
    books = split_codebooks(widths, codebook)
    names = transforms if transforms is not None else ["?"] * n_head
    return SideCalibration(mean, scale, gain[:, 0].copy(), rule, decode, widths, books, names)
