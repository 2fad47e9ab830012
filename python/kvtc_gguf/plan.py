"""How long a context fits: `python -m kvtc_gguf.plan model.gguf --vram 32GiB`, by cache type and number of slots."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from kvtc_gguf.console import one_line_errors
from kvtc_gguf.dry_run import PAD, DryRun, Sizes, types_of
from kvtc_gguf.layout import FormatError

CACHES = ("f16", "q8_0", "q4_0", "kvtc-k4v4", "kvtc-k3v4", "kvtc-k2v4", "kvtc-k2v2", "kvtc-k1v2")
SLOTS = (1, 4)
GPU_RESERVE = (
    1024.0  # MiB of a GPU that a plan leaves alone: the driver's, and scratch; llama.cpp's -fit leaves as much
)
UNITS = {"": 2**-20, "K": 2**-10, "M": 1.0, "G": 2.0**10, "T": 2.0**20}

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Row:
    """One line of a plan. ctx: tokens of all slots together, 0 where nothing fits; limited: by what the model can."""

    cache: str
    slots: int
    ctx: int
    limited: bool
    sizes: Sizes | None


def mib(text: str) -> float:
    """MiB of a size like `32GiB`, `24G`, `800MiB` or a number of bytes. Raises FormatError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise FormatError(f"{text!r} is no size; write it like 32GiB or 800MiB")
    return float(match[1]) * UNITS[match[2].upper()]


def longest(measure: Callable[[int], float], budget: float, most: int, step: int) -> int:
    """The largest multiple of `step` up to `most` whose measure is at most `budget`; 0 if none is.

    Sizes grow almost linearly with the context, so a straight line through two points lands next to the answer; what is
    returned was measured, and so was the next larger one. Every second guess halves what is left: a jump between the
    two points bends the line so much that it would go on by one step at a time.
    """
    low, high = 0, most // step + 1  # low fits, high does not (or is not allowed)
    known: dict[int, float] = {}

    def fits(n: int) -> bool:
        known[n] = measure(n * step)
        return known[n] <= budget

    guess = high - 1
    while high - low > 1:
        if fits(guess):
            low = guess
        else:
            high = guess
        points = sorted(known.items())[:: max(1, len(known) - 1)]
        if len(points) == 2 and points[1][1] > points[0][1] and (len(known) < 4 or len(known) % 2):
            (x0, y0), (x1, y1) = points
            guess = int(x0 + (budget - y0) * (x1 - x0) / (y1 - y0))
        else:
            guess = (low + high) // 2
        near = [n for n in (guess, guess + 1, guess - 1) if low < n < high and n not in known]
        guess = near[0] if near else (low + high) // 2
    return low * step


def plan(
    run: DryRun, caches: list[str], slots: list[int], budget: float, most: int, unified: bool, n_ubatch: int
) -> list[Row]:
    """A row for each cache type and number of slots. budget: MiB for everything; most: tokens a slot.

    Raises FormatError, with llama.cpp's reason, for a cache that the model cannot have.
    """
    rows = []
    for cache in caches:
        for n in slots:
            found: dict[int, Sizes] = {}

            def measure(n_ctx: int, cache: str = cache, n: int = n, found: dict[int, Sizes] = found) -> float:
                found[n_ctx] = run.sizes(cache, n_ctx, n, unified, n_ubatch)
                return found[n_ctx].total

            step = PAD if unified else PAD * n
            limit = (most if unified else most * n) // step * step
            ctx = longest(measure, budget, limit, step)
            rows.append(Row(cache, n, ctx, ctx == limit, found.get(ctx)))
    return rows


def table(rows: list[Row], budget: float, title: str) -> Table:
    """The plan for people; sizes in MiB."""
    caption = f"-c: tokens of all slots; *: all that the model was trained for; sizes in MiB, at most {budget:,.0f}"
    out = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", caption=caption, caption_justify="left")
    for name in ("cache type", "-np", "-c", "a slot", "weights", "codes", "exact rows", "bases", "compute", "total"):
        out.add_column(name, justify="left" if name == "cache type" else "right", no_wrap=True)
    for row in rows:
        if row.sizes is None:
            out.add_row(row.cache, str(row.slots), "does not fit", *[""] * 7)
            continue
        s = row.sizes
        cells = (s.weights, s.codes, s.exact, s.bases, s.compute, s.total)
        star = "*" if row.limited else ""
        shared = f"{row.ctx:,}{star}", f"{row.ctx // row.slots:,}"
        out.add_row(row.cache, str(row.slots), *shared, *(f"{cell:,.1f}" if cell else "–" for cell in cells))
    return out


@app.command()
def main(
    model: Annotated[Path, typer.Argument(help="The model's GGUF.")],
    vram: Annotated[str, typer.Option("--vram", help="Memory for everything, like 32GiB.")],
    caches: Annotated[
        list[str] | None,
        typer.Option("-ct", "--cache-type", help="f16, kvtc-k2v4, kvtc2/f16, …; several times for several."),
    ] = None,
    slots: Annotated[list[int] | None, typer.Option("-np", "--parallel", min=1, help="Slots, as llama-server.")] = None,
    ctx_max: Annotated[int, typer.Option(help="Tokens of a slot at most; 0: what the model was trained for.")] = 0,
    unified: Annotated[bool, typer.Option("--kv-unified", help="One cache for all slots, as llama-server.")] = False,
    n_ubatch: Annotated[int, typer.Option("-ub", "--ubatch-size", min=1, help="As llama-server.")] = 512,
    calibration: Annotated[Path | None, typer.Option("--kvtc-file", help="The calibration, if not beside.")] = None,
    sink: Annotated[int, typer.Option("--kvtc-sink", min=-1, help="As llama-server; -1: the default.")] = -1,
    window: Annotated[int, typer.Option("--kvtc-window", min=-1, help="As llama-server; -1: the default.")] = -1,
    reserve: Annotated[
        str | None, typer.Option(help="Left alone.  [default: 1GiB where the build has a GPU, else nothing]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, sizes in MiB.")] = False,
) -> None:
    """The longest context that fits, by cache type and number of slots; nothing is allocated."""
    with one_line_errors():
        if not model.is_file():
            raise FormatError(f"{model}: no such model file")
        wanted = list(caches or CACHES)
        for cache in wanted:
            types_of(cache)
        with DryRun(model, calibration, sink, window) as run:
            kept = mib(reserve) if reserve is not None else GPU_RESERVE * run.gpu
            budget, most = mib(vram) - kept, ctx_max or run.trained_ctx
            rows = plan(run, wanted, list(slots or SLOTS), budget, most, unified, n_ubatch)
            where = "the GPUs of this build" if run.gpu else "the CPU (this build has no GPU, whose buffers may differ)"
    if as_json:
        entries = [asdict(row) | {"total": row.sizes.total if row.sizes else None} for row in rows]
        print(json.dumps({"budget": budget, "gpu": run.gpu, "rows": entries}, indent=1))
        return
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows, budget, f"{model.name} on {where}"))


if __name__ == "__main__":
    app()
