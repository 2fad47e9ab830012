"""The figures of a calibration's report, as SVG. None stands for one whose data the file does not hold."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from kvtc_gguf.fit import SCORE_BITS
from kvtc_gguf.format import SIDES, Calibration
from kvtc_gguf.layout import GAIN_BYTES, GROUP, head_bytes, row_bytes

STYLE = {"svg.hashsalt": "kvtc", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.25}
COLORS = {"k": "tab:blue", "v": "tab:orange"}
MAPPED_BITS = (2, 4)  # budgets whose widths are drawn
VARIANCE = 0.9  # share that the number of directions is counted for


def svg(figure: Figure, number: int) -> str:
    """The figure as an element of a page; number keeps its ids apart from those of other figures."""
    with matplotlib.rc_context(STYLE), io.StringIO() as out:
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        text = out.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>f{number}-", text)


def _axes(rows: int, columns: int, height: float = 3.2):
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, height * rows), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False)


def budget(calibration: Calibration) -> Figure:
    """What a row's bits go to, for each budget, and what each layer keeps."""
    figure, axes = _axes(2, 2)
    for axis, side in zip(axes[0], SIDES, strict=True):
        shares = np.zeros((3, len(calibration.bits)))
        for layer, sides in calibration.layers.items():
            one = sides[side]
            for i, asked in enumerate(calibration.bits):
                kept = calibration.kept_bits(layer, side, asked)
                widths, row = one.widths[:, calibration.bits.index(kept)], row_bytes(one.n_head, one.head_dim, kept)
                gains = one.n_head * GAIN_BYTES
                codes = int(head_bytes(widths).sum()) - gains
                shares[:, i] += codes, gains, row - codes - gains
        values = sum(s[side].n_head * s[side].head_dim for s in calibration.layers.values())
        bottom, names = np.zeros(len(calibration.bits)), [f"kvtc{b}" for b in calibration.bits]
        parts = (("codes", COLORS[side]), ("gains", "black"), ("padding", "lightgray"))
        for share, (what, color) in zip(8 * shares / values, parts, strict=True):
            axis.bar(names, share, bottom=bottom, label=what, color=color, width=0.6)
            bottom += share
        axis.set(
            title=f"{side.upper()}: bits of a value, mean of all layers",
            ylabel="bits per value",
            ylim=(0, 1.05 * calibration.bits[-1]),
        )
        axis.legend()
    for axis, side in zip(axes[1], SIDES, strict=True):
        layers = sorted(calibration.layers)
        for asked in calibration.bits:
            kept = [calibration.kept_bits(layer, side, asked) for layer in layers]
            axis.step(layers, kept, where="mid", label=f"kvtc{asked}", linewidth=1.2)
        axis.set(title=f"{side.upper()}: bits that each layer keeps", xlabel="layer", ylabel="bits per value")
        axis.legend(ncols=3, fontsize=7)
    return figure


def spectra(calibration: Calibration) -> Figure | None:
    """Eigenvalues of the keys' covariance before RoPE and after it, and how many directions hold most of them."""
    found = {n: calibration.stats.get(f"blk.{n}.k.spectra") for n in sorted(calibration.layers)}
    if any(array is None for array in found.values()):
        return None
    figure, ((left, right),) = _axes(1, 2, 3.6)
    share = {n: a.mean(axis=1) / np.maximum(a.mean(axis=1).sum(axis=1, keepdims=True), 1e-30) for n, a in found.items()}
    for i, (what, color) in enumerate((("before RoPE", "tab:blue"), ("after RoPE", "tab:red"))):
        for values in share.values():
            left.semilogy(np.maximum(values[i], 1e-7), color=color, alpha=0.25, linewidth=0.7)
        if len({len(values[i]) for values in share.values()}) == 1:
            left.semilogy(np.median([np.maximum(v[i], 1e-7) for v in share.values()], axis=0), color=color, label=what)
        counts = [int((np.cumsum(v[i]) < VARIANCE).sum()) + 1 for v in share.values()]
        right.plot(list(share), counts, "o-", color=color, markersize=3, label=what)
    left.set(title="keys: share of the variance, by direction", xlabel="direction", ylabel="share, mean of the heads")
    right.set(title=f"directions that hold {VARIANCE:.0%} of the keys' variance", xlabel="layer", ylim=(0, None))
    for axis in (left, right):
        axis.legend()
    return figure


def bits(calibration: Calibration) -> Figure:
    """Bits of each component, by layer: mean over the heads."""
    drawn = [b for b in MAPPED_BITS if b in calibration.bits] or calibration.bits[:1]
    figure, axes = _axes(len(drawn), 2, 3.4)
    layers = sorted(calibration.layers)
    for row, b in zip(axes, drawn, strict=True):
        for axis, side in zip(row, SIDES, strict=True):
            most = max(sides[side].head_dim for sides in calibration.layers.values())
            image = np.full((len(layers), most), np.nan)
            for y, layer in enumerate(layers):
                one = calibration.layers[layer][side]
                kept = calibration.bits.index(calibration.kept_bits(layer, side, b))
                image[y, : one.head_dim] = np.repeat(one.widths[:, kept].mean(axis=0), GROUP)
            shown = axis.imshow(image, aspect="auto", vmin=0, vmax=8, cmap="viridis", interpolation="nearest")
            axis.set(title=f"{side.upper()} at kvtc{b}: bits of each component", xlabel="component", ylabel="layer")
            axis.set_yticks(range(0, len(layers), max(1, len(layers) // 8)), layers[:: max(1, len(layers) // 8)])
            axis.grid(False)
    figure.colorbar(shown, ax=axes, label="bits", shrink=0.8)
    return figure


def errors(calibration: Calibration) -> Figure | None:
    """Held-out error of each layer as the calibration measured it."""
    if any(f"blk.{n}.{side}.error" not in calibration.stats for n in calibration.layers for side in SIDES):
        return None
    figure, axes = _axes(1, 2)
    layers = sorted(calibration.layers)
    for axis, side in zip(axes[0], SIDES, strict=True):
        table = np.array([calibration.stats[f"blk.{n}.{side}.error"] for n in layers])
        for b, values in zip(SCORE_BITS, table.T, strict=False):
            axis.plot(layers, 100 * values, "o-", markersize=3, label=f"{b} bits", color=COLORS[side], alpha=2 / b)
        what = "logits" if side == "k" else "attention's output"
        axis.set(
            title=f"{side.upper()}: error of {what}, held out", xlabel="layer", ylabel="%, relative", ylim=(0, None)
        )
        axis.legend()
    return figure


def codebooks(calibration: Calibration) -> Figure | None:
    """Levels of some groups' codebooks against the histograms that they were fitted to; of head 0."""
    if any(f"blk.{n}.{side}.histogram" not in calibration.stats for n in calibration.layers for side in SIDES):
        return None
    layers = sorted(calibration.layers)
    chosen = list(dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1])))
    at = calibration.bits.index(MAPPED_BITS[0]) if MAPPED_BITS[0] in calibration.bits else 0
    figure, axes = _axes(len(chosen), 4, 2.2)
    for line, layer in zip(axes, chosen, strict=True):
        for (side, place), axis in zip([(s, p) for s in SIDES for p in ("first", "middle")], line, strict=True):
            one = calibration.layers[layer][side]
            coded = np.flatnonzero(one.widths[0, at])
            group = 0 if place == "first" or not coded.size else int(coded[len(coded) // 2])
            histogram = calibration.stats[f"blk.{layer}.{side}.histogram"][0, group]
            edges = np.linspace(-4, 4, len(histogram) + 1)
            axis.stairs(histogram, edges, fill=True, color=COLORS[side], alpha=0.4)
            width = int(one.widths[0, at, group])
            if width:
                scale = one.scale[0, group * GROUP : (group + 1) * GROUP, None]
                levels = (one.codebooks[0, group, width].astype(np.float32) / scale).mean(axis=0)
                axis.vlines(levels, 0, histogram.max(), color="black", linewidth=0.8)
            axis.set_title(f"layer {layer} {side.upper()}, group {group}: {width} bits", fontsize=8)
            axis.set_yticks([])
    return figure


def sensitivity(calibration: Calibration) -> Figure | None:
    """KLD with one layer's side coded and all else exact, where it was measured (-1: not)."""
    tables = {side: calibration.stats.get(f"kld.{side}") for side in SIDES}
    if not any(table is not None and (table >= 0).any() for table in tables.values()):
        return None
    figure, axes = _axes(1, 2)
    for axis, (side, table) in zip(axes[0], tables.items(), strict=True):
        for b, row in zip(calibration.bits, table if table is not None else (), strict=False):
            layers = np.flatnonzero(row >= 0)
            if layers.size:
                axis.semilogy(layers, np.maximum(row[layers], 1e-7), "o-", markersize=3, label=f"kvtc{b}")
        axis.set(title=f"{side.upper()}: KLD of one layer alone", xlabel="layer", ylabel="nats a token")
        if axis.lines:
            axis.legend()
    return figure


FIGURES: tuple[tuple[str, str, Callable[[Calibration], Figure | None]], ...] = (
    ("K/V budget", "Every row takes exactly its bits per value; gains and padding are part of them.", budget),
    (
        "Spectra before and after undoing RoPE",
        "Keys lie in fewer directions before RoPE than after it: that is why they are stored before.",
        spectra,
    ),
    ("Bits of each component", "Groups of 8 components share a width; heads of a layer share its budget.", bits),
    ("Error of each layer", "As attention sees it, on text that the codebooks have not seen.", errors),
    (
        "Codebooks and histograms",
        "Components of unit-norm vectors over their standard deviation; lines are the levels, means of a group.",
        codebooks,
    ),
    ("KLD of each layer", "Measured with only that layer's keys or values coded.", sensitivity),
)
