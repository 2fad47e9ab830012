"""Plots of a results file: ``python -m bench.plot results.csv`` writes KLD over bpv, speed over depth, memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import matplotlib
import pandas as pd
import typer

from bench.frame import front, load, results, wide
from bench.logs import RunError

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.hashsalt": "kvtc", "svg.fonttype": "none", "font.size": 9})  # the same bytes each time

from matplotlib import pyplot as plt  # noqa: E402  the backend must be chosen first

FAMILIES = (("kvtc", "tab:blue"), ("turbo", "tab:orange"), ("", "tab:gray"))  # by how a type's name begins
LINES = ("-", "--", ":", "-.")  # by engine


def _color(cache: str) -> str:
    return next(color for prefix, color in FAMILIES if cache.startswith(prefix))


def _tokens(count: float) -> str:
    return f"{count / 1024:g}k" if count >= 1024 else f"{count:g}"


def _grid(rows: int, columns: int):
    figure, axes = plt.subplots(rows, columns, figsize=(6.4 * columns, 4.2 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.grid(True, which="both", alpha=0.25)
    return figure, axes


def quality(found: pd.DataFrame):
    """KLD over bpv for each model, the Pareto front as a line; hollow marks: no window of exact tokens."""
    rows = results(found, "quality")
    if rows.empty:
        return None
    cells = wide(rows)
    cells = cells[(cells["bpv"] < 16) & (cells["kld"] > 0)]  # what has 0 lies on no logarithmic axis
    cells = cells.drop_duplicates(["model", "cache", "bpv", "kld"])  # engines that agree to the last digit
    if cells.empty:
        return None
    figure, axes = _grid(1, cells["model"].nunique())
    for axis, (model, points) in zip(axes[0], cells.groupby("model", sort=False), strict=True):
        edge = front(points)
        axis.step(edge["bpv"], edge["kld"], where="post", color="black", linewidth=0.8, label="front")
        for row in points.itertuples():
            color = _color(row.cache)
            axis.plot(row.bpv, row.kld, "o", color=color, markerfacecolor=color if row.window > 0 else "none")
            axis.annotate(row.who, (row.bpv, row.kld), xytext=(4, 3), textcoords="offset points", fontsize=7)
        axis.set(yscale="log", xlabel="bits per value", ylabel="KLD from f16, nats a token", title=model)
        axis.margins(x=0.1)  # room for the names of the last points
    return figure


def speed(found: pd.DataFrame):
    """Tokens a second over depth, prompts and generation, with their spread."""
    rows = results(found, "speed")
    rows = rows[rows["unit"] == "t/s"]
    if rows.empty:
        return None
    models, metrics = list(dict.fromkeys(rows["model"])), list(dict.fromkeys(rows["metric"]))
    engines = list(dict.fromkeys(rows["engine"]))
    figure, axes = _grid(len(models), len(metrics))
    for model, line in zip(models, axes, strict=True):
        for metric, axis in zip(metrics, line, strict=True):
            cells = rows[(rows["model"] == model) & (rows["metric"] == metric)]
            depths = sorted(cells["depth"].unique())
            for (who, engine), x in cells.groupby(["who", "engine"], sort=False):
                x = x.sort_values("depth")
                style = {"marker": "o", "markersize": 3, "capsize": 2, "linestyle": LINES[engines.index(engine) % 4]}
                at = [depths.index(d) for d in x["depth"]]
                axis.errorbar(at, x["value"], x["spread"].fillna(0), label=who, **style)
            axis.set(xlabel="depth, tokens", ylabel="tokens a second", title=f"{model}: {metric}", ylim=(0, None))
            axis.set_xticks(range(len(depths)), [_tokens(n) for n in depths])
            axis.legend(fontsize=7)
    return figure


def memory(found: pd.DataFrame):
    """MiB of the cache over the context, everything counted."""
    rows = results(found, "memory")
    rows = rows[rows["metric"] == "total"]
    if rows.empty:
        return None
    figure, axes = _grid(1, rows["model"].nunique())
    for axis, (model, cells) in zip(axes[0], rows.groupby("model", sort=False), strict=True):
        for who, x in cells.groupby("who", sort=False):
            x = x.sort_values("depth")
            axis.plot(x["depth"], x["value"], marker="o", markersize=3, label=who)
        axis.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="MiB of the cache", title=model)
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts := sorted(cells["depth"].unique()), [_tokens(n) for n in contexts])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.legend(fontsize=7)
    return figure


PLOTS = {"kld": quality, "speed": speed, "memory": memory}


def write(csv: Path, folder: Path, kind: str = "svg") -> list[Path]:
    """Write every plot that the results have figures for; returns their paths. Raises RunError."""
    found, written = load(csv), []
    for name, draw in PLOTS.items():
        if (figure := draw(found)) is None:
            continue
        path = folder / f"{csv.stem}-{name}.{kind}"
        figure.savefig(path, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        plt.close(figure)
        written.append(path)
    return written


def main(
    path: Annotated[Path, typer.Argument(metavar="CSV")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="folder [default: the CSV's]")] = None,
    kind: Annotated[str, typer.Option("--format", help="svg, png or pdf")] = "svg",
) -> None:
    """Write the plots of a results file."""
    try:
        (output or path.parent).mkdir(parents=True, exist_ok=True)
        written = write(path, output or path.parent, kind)
        if not written:
            raise RunError(f"{path} has nothing to plot")
    except (RunError, OSError, ValueError) as error:
        print(f"kvtc: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    for image in written:
        print(image)


if __name__ == "__main__":
    typer.run(main)
