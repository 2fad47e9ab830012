"""The numpy twin of the C++ encoder and decoder: from the same transformed vector z both give the same bytes.

The steps are numbered as in `ggml_kvtc/README.md`, "Encoding one head vector". Written for reading, not for speed.
n tokens, H kv heads, d head_dim, G = d // 8 groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvtc_gguf.format import SideCalibration
from kvtc_gguf.layout import (
    GAIN_BYTES,
    GAIN_STEPS,
    GROUP,
    NORM_BYTES,
    head_bytes,
    head_offsets,
    row_bytes,
    turbo_row_bytes,
)
from kvtc_gguf.validate import inverse

SCALE_FLOOR = np.float32(1e-3)  # of the largest scale of the head
NORM_FLOOR = 1e-9  # vectors of a smaller whitened norm are stored as zero
MAX_F16 = 65504.0


@dataclass
class HeadPlan:
    """What encoding and decoding one head at one budget needs."""

    mean: np.ndarray  # f32 [d]
    scale: np.ndarray  # f32 [d]
    decode: np.ndarray  # f16 [d, d]
    gain_base: np.float32
    keep_norm: bool  # gain rule: False unbiased, True norm keeping
    widths: np.ndarray  # i8 [G]
    codebooks: list[np.ndarray | None]  # per group f32 [8, 2**width], None where the width is 0
    offset: int  # of the head's payload in the row, bytes; it starts with the gain code
    size: int  # of the payload without padding, bytes
    codes_at: int  # of the codes in the row, bytes
    turbo: bool = False  # an f16 gain at `offset`, apart from the codes

    @classmethod
    def of(cls, side: SideCalibration, head: int, budget_index: int) -> HeadPlan:
        """The plan of one head of a calibration."""
        widths = side.widths[head, budget_index]
        books = [side.codebooks[head, g, int(w)].astype(np.float32) if w else None for g, w in enumerate(widths)]
        size, offset = int(head_bytes(widths)), int(head_offsets(side.widths[:, budget_index])[head])
        codes_at = offset + GAIN_BYTES
        if side.turbo:
            size += NORM_BYTES - GAIN_BYTES
            codes_at = head * (size - NORM_BYTES)
            offset = side.n_head * (size - NORM_BYTES) + head * NORM_BYTES
        return cls(
            side.mean[head],
            side.scale[head],
            side.decode[head],
            side.gain_base[head],
            bool(side.gain_rule[head]),
            widths,
            books,
            offset,
            size,
            codes_at,
            side.turbo,
        )

    @cached_property
    def encode(self) -> np.ndarray:
        """f32 [d, d]: z = encode @ (x - mean)."""
        return inverse(self.decode[None])[0]


def transform(side: SideCalibration, x: np.ndarray) -> np.ndarray:
    """z f32 [n, H, d] of vectors x f32 [n, H, d]: keys before RoPE, values as they are."""
    return _per_head(inverse(side.decode), x.astype(np.float32) - side.mean)


def reconstruct(side: SideCalibration, z: np.ndarray) -> np.ndarray:
    """x f32 [n, H, d] of transformed vectors z [n, H, d]."""
    return (_per_head(side.decode.astype(np.float64), z.astype(np.float64)) + side.mean).astype(np.float32)


def encode_rows(side: SideCalibration, budget_index: int, z: np.ndarray, bits: int) -> np.ndarray:
    """Cache rows u8 [n, row_bytes] of transformed vectors z f32 [n, H, d], at the budget of `bits` bits per value."""
    size = (turbo_row_bytes if side.turbo else row_bytes)(side.n_head, side.head_dim, bits)
    rows = np.zeros((len(z), size), np.uint8)
    for head in range(side.n_head):
        plan = side.head_plan(head, budget_index)
        gain, codes = encode_head(plan, np.ascontiguousarray(z[:, head], np.float32))
        rows[:, plan.offset : plan.offset + gain.shape[1]] = gain
        at = plan.codes_at
        for group, width in enumerate(plan.widths.tolist()):
            rows[:, at : at + width] = pack(codes[:, group], width)
            at += width
    return rows


def decode_rows(side: SideCalibration, budget_index: int, rows: np.ndarray) -> np.ndarray:
    """Transformed vectors z f32 [n, H, d] that cache rows u8 [n, row_bytes] stand for."""
    z = np.zeros((len(rows), side.n_head, side.head_dim), np.float32)
    for head in range(side.n_head):
        plan = side.head_plan(head, budget_index)
        gain = decode_gain(plan, rows)
        at = plan.codes_at
        for group, width in enumerate(plan.widths.tolist()):
            book = plan.codebooks[group]
            if book is not None:
                codes = unpack(rows[:, at : at + width], width)
                z[:, head, group * GROUP : (group + 1) * GROUP] = book[np.arange(GROUP), codes] * gain[:, None]
            at += width
    return z


def encode_head(plan: HeadPlan, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the gains u8 [n, 1] (turbo: [n, 2]) and codes u8 [n, G, 8] of one head's z f32 [n, d]."""
    # 1. whitened, all in f32
    scale = np.maximum(plan.scale, SCALE_FLOOR * plan.scale.max())
    with np.errstate(all="ignore"):
        u = z * (np.float32(1) / scale)
        # 2. norm
        norm = np.sqrt(lane_dot(u, u) / z.shape[1])
        live = (norm >= NORM_FLOOR) & np.isfinite(norm)
        # 3. codes: midpoints below y
        y = z * np.where(live, 1 / np.where(live, norm, 1), 0).astype(np.float32)[:, None]
    codes = np.zeros((len(z), len(plan.widths), GROUP), np.uint8)
    levels = np.zeros_like(z)
    for group, book in enumerate(plan.codebooks):
        if book is None:
            continue
        middle = (book[:, :-1] + book[:, 1:]) * np.float32(0.5)
        for lane in range(GROUP):
            component = group * GROUP + lane
            codes[:, group, lane] = np.searchsorted(middle[lane], y[:, component], side="left")
            levels[:, component] = book[lane, codes[:, group, lane]]
    codes[~live] = 0
    # 4. gain
    with np.errstate(invalid="ignore"):
        power, dot, self_dot = lane_dot(z, z), lane_dot(z, levels), lane_dot(levels, levels)
    against = self_dot if plan.keep_norm else dot
    live &= against > 0
    gain = np.where(live, power, 0) / np.where(live, against, 1)
    if plan.keep_norm:
        gain = np.sqrt(gain)
    live &= gain > 0
    # 5. gain code; turbo: the gain in f16, by way of f32
    if plan.turbo:
        halves = np.minimum(np.where(live, gain, 0), MAX_F16).astype(np.float32).astype("<f2")
        return halves.view(np.uint8).reshape(-1, NORM_BYTES), codes
    steps = np.rint(GAIN_STEPS * np.log2(np.where(live, gain, 1) / np.float64(plan.gain_base)))
    return np.where(live, np.clip(steps, 1, 255), 0).astype(np.uint8)[:, None], codes


def decode_gain(plan: HeadPlan, rows: np.ndarray) -> np.ndarray:
    """Gains f32 [n] of one head in rows u8 [n, row_bytes]."""
    if plan.turbo:
        gain = rows[:, plan.offset : plan.offset + NORM_BYTES].copy().view("<f2")[:, 0].astype(np.float32)
        return np.where(np.isfinite(gain), gain, np.float32(0))
    code = rows[:, plan.offset]
    return np.where(code > 0, plan.gain_base * 2.0 ** (code.astype(np.float64) / GAIN_STEPS), 0).astype(np.float32)


def _per_head(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """[n, H, d]: matrices [H, d, d] times vectors [n, H, d], head by head."""
    return (vectors.transpose(1, 0, 2) @ matrices.transpose(0, 2, 1)).transpose(1, 0, 2)


def lane_dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Scalar products f64 [n] of f32 [n, d]: summed over groups for each of 8 lanes, then over the lanes in order.

    A product of two f32 is exact in f64, so only the order of the sums matters, not fused multiply-adds.
    """
    lanes = np.zeros((len(a), GROUP))
    for start in range(0, a.shape[1], GROUP):
        lanes += a[:, start : start + GROUP].astype(np.float64) * b[:, start : start + GROUP]
    total = lanes[:, 0].copy()
    for lane in range(1, GROUP):
        total += lanes[:, lane]
    return total


def pack(codes: np.ndarray, width: int) -> np.ndarray:
    """Bytes u8 [n, width] of codes u8 [n, 8]: code i in bits [i * width, (i + 1) * width), little endian."""
    planes = (codes[:, :, None] >> np.arange(width, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(len(codes), GROUP * width), axis=1, bitorder="little")


def unpack(data: np.ndarray, width: int) -> np.ndarray:
    """Codes u8 [n, 8] of bytes u8 [n, width]."""
    planes = np.unpackbits(data, axis=1, bitorder="little").reshape(len(data), GROUP, width)
    return (planes << np.arange(width, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
