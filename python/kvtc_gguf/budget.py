"""Any budget: bits by layer, for K and V, that keep the predicted KLD least in so many bits a value.

Small errors of different layers add up in the KLD, so the KLD of a cache is predicted as the sum of what each layer and
side costs alone: measured at one budget (`sensitivity.measure`), and at the others in proportion to the error of
attention's output that fitting measured. Dynamic programming then finds the exact optimum of the prediction.

An optimum of noisy figures looks better than it is, so differences between layers count less the noisier they are, and
what is planned is measured on text that the layers were not measured on, beside the presets of that size: layers get
their own bits only where that is better by more than its standard error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvtc_gguf.format import SIDES, Calibration
from kvtc_gguf.layout import FormatError
from kvtc_gguf.sensitivity import LayerBits, Prober, measure, standard_error, uniform

PLANS = ((1.0, 1.0), (1.0, 3.0), (0.5, 3.0))
"""What is planned and then measured: (how far a plan follows the differences between layers, how much more keys count
than was measured). Keys' errors cost more on other and on longer text than values', which average out: SmolLM2 at 2
bits, WikiText-2, KLD 0.0168 with keys as measured on 768 tokens of prose, 0.0133 with three times that, k2v2 0.0170
(2 chunks, the ones that the factor was picked on, so that other text must confirm it)."""
PRESETS = 2  # of the presets of a size, those with the least predicted KLD are measured
CLEAR = 2.0  # standard errors by which a preset must be worse to be called so
SHARE_FLOOR = 0.05  # of the median of a side: what a layer is taken to cost at least, as its measured KLD is noisy


@dataclass(frozen=True)
class Choice:
    """bits by side and layer (0: no cache), predicted KLD in nats a token, bits per value over K and V, and a name."""

    bits: LayerBits
    kld: float
    bpv: float
    name: str = "bits by layer"


def costs(
    measured: np.ndarray,
    error: np.ndarray,
    curve: np.ndarray | None = None,
    spread: np.ndarray | None = None,
    trust: float = 1.0,
) -> np.ndarray:
    """KLD f64 [len(bits), layers] of one side: measured where it was (>= 0), else in proportion to error, same shape.

    curve [len(bits)]: measured KLD of the whole side at each budget (-1: not measured), which the layers then share:
    from 2 bits to 1 the KLD grows twice as much as the error does. spread, same shape: standard errors of measured,
    by which `damped` takes the layers for more alike. Raises ValueError for a layer without measurement.
    """
    out = np.full(measured.shape, np.nan)
    measured = damped(measured, np.zeros(measured.shape) if spread is None else spread, trust)
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


def damped(measured: np.ndarray, spread: np.ndarray, trust: float) -> np.ndarray:
    """What was measured of the layers at each budget, f64 [len(bits), layers], drawn towards their geometric mean.

    In the logarithm, each by the share that its standard error has in the variance of all layers, and by trust.
    """
    out = measured.astype(np.float64).copy()
    for row, errors in zip(out, spread, strict=True):
        known = row >= 0
        if known.sum() < 2 or not (row > 0).any():
            continue
        value = np.maximum(row[known], SHARE_FLOOR * np.median(row[known]) + 1e-30)
        log, noise = np.log(value), np.square(errors[known] / value)
        real = max(log.var() - float(np.median(noise)), 0.0)
        share = trust * real / np.maximum(real + noise, 1e-30) if spread.any() else trust
        row[known] = np.exp(log.mean() + share * (log - log.mean()))
    return out


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


def plan(calibration: Calibration, bpv: float, trust: float = 1.0, keys: float = 1.0) -> Choice:
    """The bits by layer of least predicted KLD at `bpv` bits a value, from the statistics `kld.*` and `error.{k,v}`.

    trust and keys: see PLANS; the prediction of the choice itself is made without them.

    Raises FormatError where they are missing or the budget is out of reach.
    """
    cost, values, layers = tables(calibration, trust)
    cost[:, :: len(SIDES)] *= keys
    if not calibration.bits[0] <= bpv <= calibration.bits[-1]:
        raise FormatError(f"{bpv:g} bits per value: must be {calibration.bits[0]} to {calibration.bits[-1]}")
    chosen = choose(cost, values, calibration.bits, bpv * values.sum())
    picked = np.array(calibration.bits)[chosen]
    bits = {side: [0] * calibration.block_count for side in SIDES}
    for i, layer in enumerate(layers):
        for s, side in enumerate(SIDES):
            bits[side][layer] = int(picked[2 * i + s])
    return Choice(bits, predicted(calibration, bits), float((picked * values).sum() / values.sum()))


def presets(calibration: Calibration, bpv: float) -> list[Choice]:
    """The uniform presets that take as much as `bpv` allows, by rising predicted KLD; none where bpv is below any."""
    total = math.floor(2 * bpv + 1e-9)
    pairs = [(k, total - k) for k in calibration.bits if total - k in calibration.bits]
    each = [(k, v, uniform(calibration, k, v)) for k, v in pairs]
    found = [Choice(bits, predicted(calibration, bits), total / 2, f"kvtc-k{k}v{v}") for k, v, bits in each]
    return sorted(found, key=lambda choice: choice.kld)


def best(prober: Prober, calibration: Calibration, bpv: float) -> tuple[Choice, list[tuple[Choice, np.ndarray]]]:
    """The choice that measures best on the prober's text, and all that were measured with their KLD by row.

    A preset, see `steadiest`, unless bits by layer are better than the best one by more than the standard error of the
    difference, row by row.
    """
    each = presets(calibration, bpv)[:PRESETS] + [plan(calibration, bpv, *options) for options in PLANS]
    unlike = [c for i, c in enumerate(each) if all(c.bits != other.bits for other in each[:i])]
    measured = [(choice, prober.kld(choice.bits)) for choice in unlike]
    uniform_ones, own = ([m for m in measured if (m[0].name == Choice.name) == kind] for kind in (False, True))
    preset, planned = (min(group, key=lambda m: m[1].mean(), default=None) for group in (uniform_ones, own))
    if preset is None or planned is None:
        return (planned or preset)[0], measured
    gain = preset[1] - planned[1]
    # Bits that no preset takes up are no reason to leave them unused.
    clear = planned[0].bpv > preset[0].bpv + 1e-9 or gain.mean() > standard_error(gain)
    return planned[0] if clear and gain.mean() > 0 else steadiest(uniform_ones), measured


def steadiest(measured: list[tuple[Choice, np.ndarray]]) -> Choice:
    """Of presets with their KLD by row [rows]: of the best and those not clearly worse, that with most key bits."""
    least = min((rows for _, rows in measured), key=np.mean)
    # A tie on the text at hand is none on longer and other text, where keys' errors cost more (see PLANS).
    near = [c for c, rows in measured if (rows - least).mean() <= CLEAR * standard_error(rows - least)]
    return max(near, key=lambda choice: sum(choice.bits["k"]))


def predicted(calibration: Calibration, bits: LayerBits) -> float:
    """The predicted KLD, in nats a token, of any bits by layer."""
    cost, _, layers = tables(calibration)
    flat = [calibration.bits.index(bits[side][layer]) for layer in layers for side in SIDES]
    return float(cost[flat, np.arange(len(flat))].sum())


def tables(calibration: Calibration, trust: float = 1.0) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(cost f64 [len(bits), 2 L], values of a token i64 [2 L], the L layers); items are K, V of the first layer, ..."""
    stats, layers = calibration.stats, sorted(calibration.layers)
    missing = [n for s in SIDES for n in (f"kld.{s}", f"error.{s}") if n not in stats]
    if missing:
        raise FormatError(f"holds no kvtc.stats.{missing[0]}, so layers cannot be compared: calibrate with --bpv")
    each = [
        costs(
            stats[f"kld.{s}"][:, layers],
            stats[f"error.{s}"][:, layers].astype(np.float64),
            stats.get(f"kld.curve.{s}"),
            stats[f"kld.spread.{s}"][:, layers] if f"kld.spread.{s}" in stats else None,
            trust,
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

    chunks i32 [n, T] that fitting held out: the latter half measures the layers, the former what was planned. step is
    called after each run of `sensitivity.measure`. Returns what to tell: predicted and measured KLD of each choice.
    """
    half = len(chunks) // 2
    if "kld.k" not in calibration.stats:
        with Prober(model, calibration, chunks[half:], threads) as prober:
            calibration.stats |= measure(prober, step)
    background = float(calibration.stats["kld.background"][0])
    with Prober(model, calibration, chunks[:half] if half else chunks, threads) as prober:
        choice, measured = best(prober, calibration, bpv)
    lines = [
        f"{c.bpv:.3f} bits per value, {c.name}: KLD predicted {c.kld + background:.5f}, measured {rows.mean():.5f} "
        f"± {standard_error(rows):.5f}"
        for c, rows in measured
    ]
    asked = apply(calibration, choice)
    return "\n".join([*lines, f"best: {choice.name}; to use it: --cache-type kvtc-k{asked[0]}v{asked[1]}"])


def steps(calibration: Calibration) -> int:
    """How often `spend` calls step, where sensitivities are not known yet."""
    return 2 * (len(calibration.layers) + len(calibration.bits) - 1)


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
