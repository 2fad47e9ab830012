"""What `calibrate` prints at its end: a table of the layers."""

from __future__ import annotations

from collections import Counter

from rich.table import Table

from kvtc_gguf.fit import SCORE_BITS, Fitter, Side
from kvtc_gguf.format import Calibration, SideCalibration

TABLE_BITS = (2, 4)


def table(calibration: Calibration, fitter: Fitter) -> Table:
    """Per layer: the transforms chosen, the widths of the 2- and 4-bit budgets and the predicted error."""
    out = Table(
        title=f"{calibration.architecture}: {len(calibration.layers)} layers, {calibration.tokens} tokens",
        caption=f"error: held out, {SCORE_BITS[0]} bits, relative: keys of the logit, values of the attention output",
    )
    out.add_column("layer", justify="right")
    for side in ("K", "V"):
        out.add_column(f"{side} transform")
        for bits in TABLE_BITS:
            out.add_column(f"{side} widths @{bits}")
        out.add_column(f"{side} error", justify="right")
    for layer, sides in sorted(calibration.layers.items()):
        cells = [str(layer)]
        for name in ("k", "v"):
            side: Side = fitter.layers[layer][name]
            counts = Counter(sides[name].transforms)
            cells.append(", ".join(t if len(counts) == 1 else f"{n} {t}" for t, n in counts.items()))
            cells += [widths_text(sides[name], calibration.bits.index(bits)) for bits in TABLE_BITS]
            cells.append(f"{fitter.predicted(side)[0]:.1%}")
        out.add_row(*cells)
    return out


def widths_text(side: SideCalibration, budget: int) -> str:
    """One digit per group, one line per kv head; for more than 4 heads the mean over the heads, marked ~."""
    widths = side.widths[:, budget]
    if len(widths) > 4:
        return "~" + "".join(str(round(float(w))) for w in widths.mean(axis=0))
    return "\n".join("".join(map(str, row)) for row in widths)
