"""Any budget: bits by layer, for K and V, that keep the predicted KLD least in so many bits a value.

Small errors of different layers add up in the KLD, so the KLD of a cache is predicted as the sum of what each layer and
side costs alone: measured at one budget (`sensitivity.measure`), and at the others in proportion to the error of
attention's output that fitting measured. Dynamic programming then finds the exact optimum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvtc_gguf.format import Calibration
from kvtc_gguf.layout import FormatError
from kvtc_gguf.sensitivity import SIDES, LayerBits, Prober, measure, uniform

SHARE_FLOOR = 0.05  # of the median of a side: what a layer is taken to cost at least, as its measured KLD is noisy


@dataclass(frozen=True)
class Choice:
    """bits by side and layer (0: no cache), the predicted KLD in nats a token, and bits per value over K and V."""

    bits: LayerBits
    kld: float
    bpv: float


def costs(measured: np.ndarray, error: np.ndarray, curve: np.ndarray | None = None) -> np.ndarray:
    """KLD f64 [len(bits), layers] of one side: measured where it was (>= 0), else in proportion to error, same shape.

    curve [len(bits)]: measured KLD of the whole side at each budget (-1: not measured), which the layers then share:
    from 2 bits to 1 the KLD grows twice as much as the error does. Raises ValueError for a layer without measurement.
    """
    out = np.full(measured.shape, np.nan)
    for layer in range(measured.shape[1]):
        known = np.flatnonzero(measured[:, layer] >= 0)
        if not known.size:
            raise ValueError(f"nothing was measured of layer {layer}")
        scale = measured[known, layer].sum() / max(error[known, layer].sum(), 1e-30)
        out[:, layer] = scale * error[:, layer]
        out[known, layer] = measured[known, layer]
    if curve is not None:
        known = curve >= 0
        total = np.maximum(out.sum(axis=1), 1e-30)
        out[known] *= (curve[known] / total[known])[:, None]
    floor = SHARE_FLOOR * np.median(out, axis=1, keepdims=True)
    return np.minimum.accumulate(np.maximum(out, floor), axis=0)


def choose(cost: np.ndarray, values: np.ndarray, bits: list[int], budget: float) -> np.ndarray:
    """Index into bits of each of n items, i64 [n], of least summed cost f64 [len(bits), n], within `budget` bits.

    values [n]: how many values an item has. Exact. Raises ValueError where even the least bits do not fit.
    """
    unit = math.gcd(*(int(v) * b for v in values for b in bits))
    size = np.array([[int(v) * b // unit for v in values] for b in bits])
    room = int(budget * (1 + 1e-9) // unit)
    if size[0].sum() > room:
        raise ValueError(f"{bits[0]} bits a value are the least there is")
    room = min(room, int(size[-1].sum()))
    best, taken = np.zeros(room + 1), []
    for item in range(len(values)):
        total, index = np.full(room + 1, np.inf), np.zeros(room + 1, np.int64)
        for k in range(len(bits)):
            if size[k, item] <= room:
                here = np.full(room + 1, np.inf)
                here[size[k, item] :] = best[: room + 1 - size[k, item]] + cost[k, item]
                better = here < total
                total, index = np.where(better, here, total), np.where(better, k, index)
        best = total
        taken.append(index)
    chosen, left = np.zeros(len(values), np.int64), room
    for item in range(len(values) - 1, -1, -1):
        chosen[item] = taken[item][left]
        left -= size[chosen[item], item]
    return chosen


def plan(calibration: Calibration, bpv: float) -> Choice:
    """The best bits by layer at `bpv` bits a value, from the statistics `kld.{k,v}` and `error.{k,v}` of a calibration.

    Raises FormatError where they are missing or the budget is out of reach.
    """
    cost, values, layers = tables(calibration)
    if not calibration.bits[0] <= bpv <= calibration.bits[-1]:
        raise FormatError(f"{bpv:g} bits per value: must be {calibration.bits[0]} to {calibration.bits[-1]}")
    chosen = choose(cost, values, calibration.bits, bpv * values.sum())
    picked = np.array(calibration.bits)[chosen]
    bits = {side: [0] * calibration.block_count for side in SIDES}
    for i, layer in enumerate(layers):
        for s, side in enumerate(SIDES):
            bits[side][layer] = int(picked[2 * i + s])
    kld = float(cost[chosen, np.arange(len(chosen))].sum())
    return Choice(bits, kld, float((picked * values).sum() / values.sum()))


def predicted(calibration: Calibration, bits: LayerBits) -> float:
    """The predicted KLD, in nats a token, of any bits by layer."""
    cost, _, layers = tables(calibration)
    flat = [calibration.bits.index(bits[side][layer]) for layer in layers for side in SIDES]
    return float(cost[flat, np.arange(len(flat))].sum())


def tables(calibration: Calibration) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(cost f64 [len(bits), 2 L], values of a token i64 [2 L], the L layers); items are K, V of the first layer, ..."""
    stats, layers = calibration.stats, sorted(calibration.layers)
    missing = [n for s in SIDES for n in (f"kld.{s}", f"error.{s}") if n not in stats]
    if missing:
        raise FormatError(f"holds no kvtc.stats.{missing[0]}, so layers cannot be compared: calibrate with --bpv")
    each = [
        costs(
            stats[f"kld.{s}"][:, layers], stats[f"error.{s}"][:, layers].astype(np.float64), stats.get(f"kld.curve.{s}")
        )
        for s in SIDES
    ]
    sides = [[calibration.layers[layer][s] for layer in layers] for s in SIDES]
    values = np.array([[x.n_head * x.head_dim for x in row] for row in sides])
    return np.stack(each, axis=2).reshape(len(calibration.bits), -1), values.T.reshape(-1), layers


def apply(calibration: Calibration, choice: Choice) -> tuple[int, int]:
    """Makes the layers of a calibration keep the bits of `choice`; returns the (K, V) budgets to ask for to get them.

    These are the ones nearest to each side's mean; other budgets stay as they are.
    """
    asked = []
    for side in SIDES:
        kept = [b for b in choice.bits[side] if b]
        near = min(calibration.bits, key=lambda b: abs(b - sum(kept) / len(kept)))
        row = [
            [b if layer in calibration.layers else 0 for layer in range(calibration.block_count)]
            for b in calibration.bits
        ]
        table = calibration.layer_bits.get(side, row)
        table[calibration.bits.index(near)] = choice.bits[side]
        calibration.layer_bits[side] = table
        asked.append(near)
    return asked[0], asked[1]


def spend(
    model: Path,
    calibration: Calibration,
    chunks: np.ndarray,
    bpv: float,
    threads: int,
    step: Callable[[], None] | None = None,
) -> str:
    """Measures the sensitivities where the calibration does not hold them, and gives its layers the best bits.

    chunks i32 [n, T] that fitting held out; step is called after each run of `sensitivity.measure`. Returns what to
    tell: predicted and measured KLD, beside those of the uniform preset that takes as much, or the next larger one.
    """
    with Prober(model, calibration, chunks, threads) as prober:
        if "kld.k" not in calibration.stats:
            measured, background = measure(prober, step)
            calibration.stats |= {f"kld.{side}": table for side, table in measured.items()}
            calibration.stats["kld.background"] = np.array([background], np.float32)
        background = float(calibration.stats["kld.background"][0])
        choice = plan(calibration, bpv)
        lines = [f"{choice.bpv:.3f} bits per value by layer: KLD predicted {choice.kld + background:.5f}"]
        lines[0] += f", measured {prober.kld(choice.bits):.5f}"
        total = math.ceil(2 * bpv - 1e-9)
        k = total // 2
        if k >= calibration.bits[0] and total - k <= calibration.bits[-1]:
            preset = uniform(calibration, k, total - k)
            expected = predicted(calibration, preset) + background
            lines.append(f"kvtc-k{k}v{total - k}, {total / 2:g} bits per value: predicted {expected:.5f}")
            lines[1] += f", measured {prober.kld(preset):.5f}"
    asked = apply(calibration, choice)
    lines.append(f"to use it: --cache-type kvtc-k{asked[0]}v{asked[1]}")
    return "\n".join(lines)


def bits_per_value(calibration: Calibration, size: int, tokens: int) -> float:
    """Bits per value, at most the widest, at which the codes of `tokens` tokens take `size` bytes.

    Exact rows and bases come on top.
    """
    values = sum(side.n_head * side.head_dim for sides in calibration.layers.values() for side in sides.values())
    return min(8 * size / (tokens * values), float(calibration.bits[-1]))


def parse_size(text: str) -> int:
    """Bytes of a size such as "4GiB", "512M" or "1000". Raises FormatError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise FormatError(f"{text}: no size, write it as 4GiB")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
