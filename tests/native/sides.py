"""What K or V may be in the tests: bits of a kvtc type, "turbo<bits>", or an ordinary type's name."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import ffi
import synthetic
from kvtc_gguf import reference_turbo
from kvtc_gguf.format import Calibration, SideCalibration
from kvtc_gguf.layout import row_bytes, turbo_row_bytes

PLAIN = {"f32": ffi.F32, "f16": ffi.F16, "q8_0": ffi.Q8_0}


def is_turbo(kind: int | str) -> bool:
    return isinstance(kind, str) and kind.startswith("turbo")


def bits_of(kind: int | str) -> int:
    """Bits of a coded side's type, 0 for an ordinary one."""
    return kind if isinstance(kind, int) else int(kind[-1]) if is_turbo(kind) else 0


def type_of(kind: int | str) -> int:
    """The ggml type of a side's rows."""
    bits = bits_of(kind)
    return ffi.turbo_type(bits) if is_turbo(kind) else ffi.kvtc_type(bits) if bits else PLAIN[kind]


def size_of(kind: int | str, heads: int, d: int) -> int:
    """Bytes of a row of a coded side."""
    return (turbo_row_bytes if is_turbo(kind) else row_bytes)(heads, d, bits_of(kind))


@functools.lru_cache(maxsize=8)
def calibrated(heads: int, dk: int, dv: int) -> tuple[Calibration, ffi.Native]:
    room = [b for b in range(1, 7) if row_bytes(heads, min(dk, dv), b) >= 4 * (heads - 1) + 1]
    calibration = synthetic.calibration(1, heads, dk, dv, bits=tuple(room))
    with tempfile.TemporaryDirectory() as folder:
        return calibration, ffi.native(calibration, Path(folder))


def coded_sides(
    heads: int, sides: tuple[tuple[int | str, int], ...]
) -> tuple[ffi.Native, list[tuple[SideCalibration, int] | None]]:
    """A calibration of layer 0 for K and V of these kinds and head_dims; the coded sides and their budgets' indices."""
    calibration, native = calibrated(heads, sides[0][1], sides[1][1])
    own: list[tuple[SideCalibration, int] | None] = []
    for side, (kind, d) in enumerate(sides):
        if is_turbo(kind):
            native = native.with_turbo(side, bits_of(kind), heads, d)
            own.append((reference_turbo.side(heads, d, bits_of(kind)), 0))
        elif bits_of(kind):
            own.append((calibration.layers[0]["kv"[side]], calibration.bits.index(kind)))
        else:
            own.append(None)
    return native, own
