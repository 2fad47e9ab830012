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
