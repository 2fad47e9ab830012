"""Calibrations damaged on purpose, and models cut in parts: for the tests of both readers, Python's and C's."""

from __future__ import annotations

import numpy as np
from kvtc_gguf.format import metadata_arrays
from kvtc_gguf.gguf_io import Reader, Writer


def write_embedded(calibration, path, **changed):
    """A GGUF without tensors that embeds the calibration, with some of its metadata changed (None: left out)."""
    writer = Writer(path)
    for key, value in {**metadata_arrays(calibration), **changed}.items():
        if value is not None:
            writer.add(key, value)
    writer.finish([])


def rewrite(path, out, change=None, drop=(), meta=None, tensors=None):
    """Copy a sidecar with `change` applied to its tensors by name, some dropped, some metadata replaced."""
    reader = Reader(path)
    writer = Writer(out)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in drop and key not in (meta or {}):
            writer.add_key_value(key, reader.raw(key), field.types[0])
    for key, value in (meta or {}).items():
        writer.add(key, value)
    change = change or {}
    kept = [(t.name, np.array(t.data)) for t in reader.tensors if t.name not in drop]
    writer.finish([(name, change[name](array) if name in change else array, None) for name, array in kept])


def with_value(index, value):
    def change(array):
        array = array.copy()
        array[index] = value
        return array

    return change


def with_widths(edit):
    def change(array):
        array = array.copy()
        edit(array)
        return array

    return change


def full_row(array):
    array[:, 0] = 8


def rising(array):
    array[0, 2] = np.sort(array[0, 2])
    array[0, 2, -1] = 8


def nearly_singular(array):
    array = array.copy()
    array[0, :, 1] = array[0, :, 0]
    array[0, 0, 1] += np.float16(1e-3)
    array[0, :, 2] = array[0, :, 1] * np.float16(2)
    return array


# what is wrong -> (tensor of a side, how to make it so), for the `sidecar` that both tests write
DAMAGES = {
    "mean is NaN": ("mean", with_value((0, 3), np.nan)),
    "scale is infinite": ("scale", with_value((0, 3), np.inf)),
    "scale is zero": ("scale", with_value((0, 3), 0)),
    "scale is negative": ("scale", with_value((0, 3), -1)),
    "gain base is zero": ("gain", with_value((0, 0), 0)),
    "gain base is huge": ("gain", with_value((0, 0), 3e38)),
    "gain base is NaN": ("gain", with_value((0, 0), np.nan)),
    "gain rule is 2": ("gain", with_value((0, 1), 2)),
    "gain rule is a half": ("gain", with_value((0, 1), 0.5)),
    "decode is NaN": ("decode", with_value((0, 0, 0), np.nan)),
    "decode has a row of zeros": ("decode", with_value((0, 0), 0)),
    "decode is nearly singular": ("decode", nearly_singular),
    "width is 7": ("widths", with_value((0, 0, 0), 7)),
    "width is negative": ("widths", with_value((0, 0, 0), -1)),
    "widths rise": ("widths", with_widths(rising)),
    "widths overflow the row": ("widths", with_widths(full_row)),
    "codebook is NaN": ("codebook", with_value(0, np.nan)),
    "codebook falls": ("codebook", with_value(0, 60000)),
    "codebook is too long": ("codebook", lambda a: np.append(a, np.float16(0))),
    "codebook is too short": ("codebook", lambda a: a[:-1].copy()),
}


def adaptive(calibration):
    """The calibration with layers that keep other bits than asked for: no two of a side in the same way."""
    bits = calibration.bits
    calibration.layer_bits = {
        side: [
            [
                bits[(i + layer * step) % len(bits)] * (layer in calibration.layers)
                for layer in range(calibration.block_count)
            ]
            for i in range(len(bits))
        ]
        for side, step in (("k", 1), ("v", 2))
    }
    return calibration


# what is wrong with a `kvtc.layer_bits` of i32 [n_bits * block_count] -> how to make it so; layer 1 has no cache
LAYER_BITS_DAMAGES = {
    "an entry is missing": lambda a: a[:-1].copy(),
    "an entry is too many": lambda a: np.append(a, a[-1:]),
    "it is empty": lambda a: a[:0].copy(),
    "it is i64": lambda a: a.astype(np.int64),
    "it is u32": lambda a: a.view(np.uint32).copy(),
    "it is text": lambda a: "2,4",
    "it is a number": lambda a: np.int32(2),
    "a layer keeps bits that the file does not serve": with_value(0, 3),
    "a layer keeps bits beyond any type": with_value(0, 7),
    "a layer keeps negative bits": with_value(0, -1),
    "a layer keeps the least number": with_value(0, -(2**31)),
    "a layer with a cache keeps nothing": with_value(0, 0),
    "a layer without a cache keeps something": with_value(1, 2),
}


def split_model(path, parts):
    """Cut a model into `<stem>-0000i-of-0000n.gguf` beside it, as llama-gguf-split names them."""
    reader = Reader(path)
    for i in range(parts):
        writer = Writer(path.with_name(f"{path.stem}-{i + 1:05d}-of-{parts:05d}.gguf"))
        writer.add("split.count", np.uint16(parts))
        for key, field in reader.fields.items():
            if i == 0 and not key.startswith("GGUF."):
                writer.add_key_value(key, reader.raw(key), field.types[0])
        writer.finish([(t.name, t.data, t.tensor_type) for t in reader.tensors[i::parts]])
