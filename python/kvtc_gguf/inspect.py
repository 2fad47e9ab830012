"""Print what a calibration holds: `python -m kvtc_gguf.inspect file.gguf` (a sidecar, or a model that embeds one)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from kvtc_gguf.console import one_line_errors
from kvtc_gguf.format import SIDES, Calibration, SideCalibration, read
from kvtc_gguf.layout import VERSION, payload_bytes, row_bytes

app = typer.Typer(add_completion=False)


def describe(calibration: Calibration) -> dict[str, Any]:
    """Everything `inspect` knows, as JSON types."""
    layers = [
        {
            "layer": layer,
            "side": name,
            **_describe_side(sides[name], calibration.bits),
            "kept": [_kept(calibration, layer, name, b) for b in calibration.bits],
            **_measured(calibration, layer, name),
        }
        for layer, sides in sorted(calibration.layers.items())
        for name in SIDES
    ]
    return {
        "version": VERSION,
        "fingerprint": calibration.fingerprint,
        "architecture": calibration.architecture,
        "block_count": calibration.block_count,
        "bits": list(calibration.bits),
        "corpus": calibration.corpus,
        "tokens": calibration.tokens,
        "tool": calibration.tool,
        "date": calibration.date,
        "stats": {name: list(array.shape) for name, array in sorted(calibration.stats.items())},
        "adaptive": sorted(calibration.layer_bits),  # sides whose layers keep other bits than were asked for
        "bpv": {name: _mean_bpv(layers, name) for name in SIDES},
        "layers": layers,
    }


def _kept(calibration: Calibration, layer: int, side: str, asked: int) -> dict[str, Any]:
    """What the cache allocates for a side of a layer when `asked` bits are asked for."""
    bits, shape = calibration.kept_bits(layer, side, asked), calibration.layers[layer][side]
    row = row_bytes(shape.n_head, shape.head_dim, bits)
    return {"asked": asked, "type": f"kvtc{bits}", "bpv": 8 * row / (shape.n_head * shape.head_dim)}


def _measured(calibration: Calibration, layer: int, side: str) -> dict[str, Any]:
    """What the statistics say of a side of a layer: held-out error, KLD of it alone by budget; null: not said."""
    error, kld = calibration.stats.get(f"blk.{layer}.{side}.error"), calibration.stats.get(f"kld.{side}")
    return {
        "error": None if error is None else [float(x) for x in error],
        "kld": None if kld is None else [float(x) if x >= 0 else None for x in kld[:, layer]],
    }


def _mean_bpv(layers: list[dict[str, Any]], side: str) -> list[float]:
    """Bits per value of one side over all layers, for each budget that can be asked for."""
    rows = [row for row in layers if row["side"] == side]
    values = [row["n_head"] * row["head_dim"] for row in rows]
    bpv = np.array([[kept["bpv"] for kept in row["kept"]] for row in rows])
    return [float(mean) for mean in np.average(bpv, axis=0, weights=values)]


def _describe_side(side: SideCalibration, bits: list[int]) -> dict[str, Any]:
    values = side.n_head * side.head_dim
    budgets = [
        {
            "bits": b,
            "row_bytes": row_bytes(side.n_head, side.head_dim, b),
            "used_bytes": payload_bytes(side.widths[:, i]),
            "bpv": 8 * row_bytes(side.n_head, side.head_dim, b) / values,
            "code_bpv": float(side.widths[:, i].mean()),
            "widths": side.widths[:, i].tolist(),
        }
        for i, b in enumerate(bits)
    ]
    return {
        "n_head": side.n_head,
        "head_dim": side.head_dim,
        "transforms": list(side.transforms),
        "gain_base": [float(g) for g in side.gain_base],
        "gain_rule": ["norm keeping" if rule else "unbiased" for rule in side.gain_rule],
        "mean_removed": bool(np.any(side.mean)),
        "budgets": budgets,
    }


def widths_summary(widths: list[list[int]]) -> str:
    """Widest and narrowest group, and the mean bits of a code, of the heads' widths at one budget."""
    flat = [width for head in widths for width in head]
    return f"{max(flat)}…{min(flat)}\n{sum(flat) / len(flat):.2f}"


def _table(layers: list[dict[str, Any]], bits: list[int], adaptive: list[str]) -> Table:
    caption = (
        "kvtc columns: widest…narrowest group of 8 components; mean bits of a code (gains and padding take the rest)"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    for name in ("layer", "heads", "transforms", "gain base"):
        table.add_column(name)
    if adaptive:
        table.add_column("asked → kept", no_wrap=True)
    for b in bits:
        table.add_column(f"kvtc{b}")
    for row in layers:
        low, high = min(row["gain_base"]), max(row["gain_base"])
        kept = [f"kvtc{k['asked']} → {k['type']}" for k in row["kept"] if k["type"] != f"kvtc{k['asked']}"]
        table.add_row(
            f"{row['layer']} {row['side']}",
            f"{row['n_head']}×{row['head_dim']}",
            ", ".join(f"{name}×{n}" if n > 1 else name for name, n in Counter(row["transforms"]).items()),
            f"{low:.4g}" if low == high else f"{low:.4g}\n{high:.4g}",
            *(["\n".join(kept) or "as asked"] if adaptive else []),
            *(widths_summary(budget["widths"]) for budget in row["budgets"]),
        )
    return table


@app.command()
def main(
    file: Annotated[Path, typer.Argument(help="A calibration, or a model's GGUF that embeds one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Print what a calibration holds."""
    with one_line_errors():
        report = describe(read(file))
    if as_json:
        print(json.dumps(report, indent=1))
        return
    console = Console()
    served = len({row["layer"] for row in report["layers"]})
    console.print(f"[bold]{file.name}[/]: kvtc calibration, format version {report['version']}", highlight=False)
    for key in ("architecture", "fingerprint", "corpus", "tokens", "tool", "date"):
        console.print(f"  {key:<13}{report[key] or '-'}", highlight=False, markup=False)
    console.print(f"  {'layers':<13}{served} of {report['block_count']} have a cache", highlight=False)
    types = " ".join(f"kvtc{b}" for b in report["bits"])
    console.print(f"  {'cache types':<13}{types} (kvtcN: N bpv, gains and padding included)", highlight=False)
    console.print(f"  {'statistics':<13}{len(report['stats'])} tensors", highlight=False)
    for name in report["adaptive"]:
        kept = ", ".join(f"kvtc{b}: {bpv:.2f}" for b, bpv in zip(report["bits"], report["bpv"][name], strict=True))
        console.print(f"  {name.upper() + ' by layer':<13}{kept} bpv, the mean of all layers", highlight=False)
    console.print(_table(report["layers"], report["bits"], report["adaptive"]))


if __name__ == "__main__":
    app()
