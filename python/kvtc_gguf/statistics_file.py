"""What a calibration run has gathered, as a GGUF of its own: to go on after an interruption, and to merge runs.

It holds the sums of pass 1 and the tokens they are of. Sums of several runs add up; pass 2, whose histograms depend on
what pass 1 of all of them gave, is run again over the tokens. `general.type = "kvtc-statistics"`, keys
`kvtc.statistics.version` (u32), `kvtc.model.fingerprint`, `kvtc.model.architecture` (strings),
`kvtc.statistics.texts` (names), `kvtc.statistics.done` (i32 per text: chunks that the sums hold); tensors `text.I`
i32 [n, ctx] and `blk.N.{k,v,k_plain,k_rope}.<sum>` f64, the names and shapes of `statistics.Moments`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

import numpy as np
from gguf import GGUFValueType

from kvtc_gguf.gguf_io import Reader, Writer, replacing
from kvtc_gguf.layout import FormatError
from kvtc_gguf.statistics import Moments
from kvtc_gguf.validate import MAX_BLOCKS, check_shape

TYPE = "kvtc-statistics"
VERSION = 1
# keys before RoPE (weighted), values; for reports alone, with all tokens counting alike: keys before and after RoPE
STREAMS = ("k", "v", "k_plain", "k_rope")


@dataclass
class Text:
    """Tokens of one run: chunks i32 [n, ctx], of which the first `done` are in the sums."""

    name: str
    chunks: np.ndarray
    done: int = 0


@dataclass
class Statistics:
    """Pass 1 of a model, whole or not: moments[layer][stream], and the texts they are of."""

    fingerprint: str
    architecture: str
    texts: list[Text] = field(default_factory=list)
    moments: dict[int, dict[str, Moments]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(text.chunks.size for text in self.texts)

    @property
    def corpus(self) -> str:
        return " + ".join(dict.fromkeys(text.name for text in self.texts))

    def of(self, layer: int, stream: str, heads: int, d: int) -> Moments:
        """The moments of a stream of a layer, made on first use."""
        streams = self.moments.setdefault(layer, {})
        if stream not in streams:
            streams[stream] = Moments(heads, d)
        return streams[stream]

    def merge(self, other: Statistics) -> None:
        """Adds another run over the same model. Raises FormatError if it is of another one."""
        if other.fingerprint != self.fingerprint:
            raise FormatError(f"statistics of model {other.fingerprint}, this one is {self.fingerprint}")
        for layer, streams in other.moments.items():
            for name, moments in streams.items():
                try:
                    self.of(layer, name, *moments.total.shape).merge(moments)
                except ValueError as error:
                    raise FormatError(f"layer {layer} {name}: {error}") from error
        self.texts += other.texts


def write(statistics: Statistics, path: str | os.PathLike[str]) -> None:
    """Write the file; `path` is replaced whole or not at all."""
    tensors: list[tuple[str, np.ndarray, None]] = [
        (f"text.{i}", text.chunks.astype(np.int32), None) for i, text in enumerate(statistics.texts)
    ]
    for layer, streams in sorted(statistics.moments.items()):
        for name, moments in sorted(streams.items()):
            tensors += [(f"blk.{layer}.{name}.{part}", getattr(moments, part), None) for part in Moments.SUMS]
    with replacing(path) as temporary:
        writer = Writer(temporary)
        writer.add("general.type", TYPE)
        writer.add("kvtc.statistics.version", np.uint32(VERSION))
        writer.add("kvtc.model.fingerprint", statistics.fingerprint)
        writer.add("kvtc.model.architecture", statistics.architecture)
        writer.add("kvtc.statistics.texts", [text.name for text in statistics.texts])
        writer.add("kvtc.statistics.done", np.array([text.done for text in statistics.texts], np.int32))
        writer.finish(tensors)


def read(path: str | os.PathLike[str]) -> Statistics:
    """The statistics in a file, checked. Raises FormatError, one line that starts with the path."""
    reader = Reader(path)
    try:
        return _read(reader)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def _read(reader: Reader) -> Statistics:
    if reader.value("general.type", GGUFValueType.STRING) != TYPE:
        raise FormatError("holds no calibration statistics; `--statistics FILE` of kvtc_gguf.calibrate writes them")
    version = reader.value("kvtc.statistics.version", GGUFValueType.UINT32)
    if version != VERSION:
        raise FormatError(f"statistics of version {version}, this kvtc reads {VERSION}: gather them again")
    arrays = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    names = reader.value("kvtc.statistics.texts", GGUFValueType.ARRAY, GGUFValueType.STRING)
    done = reader.value("kvtc.statistics.done", GGUFValueType.ARRAY, GGUFValueType.INT32)
    if names is None or done is None or len(names) != len(done):
        raise FormatError("names of texts and what is done of them do not agree")
    result = Statistics(
        reader.value("kvtc.model.fingerprint", GGUFValueType.STRING) or "",
        reader.value("kvtc.model.architecture", GGUFValueType.STRING) or "",
        [_text(arrays, i, name, int(done[i])) for i, name in enumerate(names)],
    )
    for match in filter(None, (re.fullmatch(r"blk\.(\d{1,5})\.(k|v|k_plain|k_rope)\.count", name) for name in arrays)):
        layer, stream = int(match[1]), match[2]
        if layer >= MAX_BLOCKS:
            raise FormatError(f"layer {layer}: no model has so many")
        result.moments.setdefault(layer, {})[stream] = _moments(arrays, f"blk.{layer}.{stream}")
    lacking = [layer for layer, streams in result.moments.items() if set(streams) != set(STREAMS)]
    if lacking:
        raise FormatError(f"layer {lacking[0]}: not all of {', '.join(STREAMS)} are there")
    return result


def _text(arrays: dict[str, np.ndarray], i: int, name: str, done: int) -> Text:
    chunks = arrays.get(f"text.{i}")
    if chunks is None or chunks.dtype != np.int32 or chunks.ndim != 2 or len(chunks) < 2 or (chunks < 0).any():
        raise FormatError(f"text.{i} is missing or holds no tokens i32 [n >= 2, ctx]")
    if not 0 <= done <= len(chunks):
        raise FormatError(f"text.{i}: {done} chunks done of {len(chunks)}")
    return Text(name, chunks, done)


def _moments(arrays: dict[str, np.ndarray], prefix: str) -> Moments:
    total = arrays.get(f"{prefix}.total")
    if total is None or total.ndim != 2:
        raise FormatError(f"{prefix}.total is missing or not [H, d]")
    check_shape(*total.shape)
    result = Moments(*total.shape)
    for name in Moments.SUMS:
        array, wanted = arrays.get(f"{prefix}.{name}"), getattr(result, name).shape
        if array is None or array.dtype != np.float64 or array.shape != wanted or not np.isfinite(array).all():
            raise FormatError(f"{prefix}.{name} is missing or not finite f64 {list(wanted)}")
        setattr(result, name, array)
    return result
