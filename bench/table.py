"""Results as Markdown: ``python -m bench.table results.csv``, and with ``--compare old.csv`` what changed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from bench.compare import changes
from bench.frame import load, results, wide
from bench.logs import RunError
from bench.matrix import TASKS
from bench.results import read
from bench.verdict import verdicts


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]], numbers: int) -> str:
    """A table whose first columns are text and whose last `numbers` ones are numbers."""
    names = list(head)
    marks = ["---"] * (len(names) - numbers) + ["---:"] * numbers
    lines = [names, marks, *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def report(found: pd.DataFrame) -> str:
    """All tables of a results file, what they were measured on first, failures and sentences last."""
    parts = [_heading(found), *_quality(found), *_speeds(found), *_memory(found), *_retrieval(found), *_failures(found)]
    if told := verdicts(found):
        parts.append("## In words\n" + "".join(f"- {line}\n" for line in told))
    return "\n".join(parts)


def _heading(found: pd.DataFrame) -> str:
    def all_of(name: str) -> str:
        return ", ".join(str(x) for x in dict.fromkeys(found[name]) if str(x) not in ("", "nan"))

    lines = [f"{all_of('cpu')}; {all_of('machine')}; {found['threads'].iloc[0]:.0f} threads"]
    lines += [all_of("gpu")] if all_of("gpu") else []
    for engine, rows in found.groupby("engine", sort=False):
        first = rows.iloc[0]
        lines.append(f"engine {engine}: commit {first.commit or '-'}, llama.cpp {first.upstream or '-'}, {first.build}")
    return f"# Measured {all_of('date')}\n" + "".join(f"- {line}\n" for line in lines)


def _types(row: pd.Series) -> str:
    return f"{row.type_k} / {row.type_v}" + (" unrotated" if row.cache.endswith(" unrotated") else "")


def _exact(row: pd.Series) -> str:
    return "-" if not (row.sinks > 0 or row.window > 0) else f"{row.sinks:.0f} + {row.window:.0f}"


def _within(value: float, spread: float, digits: int) -> str:
    told = f"{round(value, digits) + 0.0:.{digits}f}"
    return told if pd.isna(spread) else f"{told} ± {spread:.{digits}f}"


def _column(row: pd.Series, name: str) -> float:
    return row.get(name, float("nan"))


def _quality(found: pd.DataFrame) -> list[str]:
    parts, several = [], found["engine"].nunique() > 1
    rows = results(found, ("quality", "decode"))
    for (test, setting), cells in rows.groupby(["test", "setting"], sort=False):
        lines = []
        for _, row in wide(cells).iterrows():
            ppl = _within(row.ppl, _column(row, "ppl_spread"), 2)
            lines.append([row.model, *([row.engine] if several else []), _types(row),
                          f"{row.bpv:.4g}", _exact(row), _within(row.kld, _column(row, "kld_spread"), 4),
                          f"{row.kld_p999:.3f}", ppl, f"{row.top1:.1f}", f"{row.bytes / 2**20:.2f}"])  # fmt: skip
        title = "Quality, a token at a time" if test == "decode" else "Quality"
        head = ["model", *(["engine"] if several else []), "K / V", "bpv", "exact", "KLD", "KLD 99.9%", "PPL", "top-1",
                "MiB"]  # fmt: skip
        parts.append(f"## {title}\n{setting}; KLD in nats a token; MiB: codes, exact rows and bases\n\n"
                     + markdown(head, lines, 7))  # fmt: skip
    return parts


def _by_depth(rows: pd.DataFrame, told) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table with a line for each model and cache and a column for each depth."""
    depths = sorted(rows["depth"].unique())
    head = ["model", "cache", *(f"{depth:.0f}" for depth in depths)]
    lines = []
    for (model, who), cells in rows.groupby(["model", "who"], sort=False):
        at = {row.depth: told(row) for row in cells.itertuples()}
        lines.append([model, who, *(at.get(depth, "") for depth in depths)])
    return head, lines


def _speeds(found: pd.DataFrame) -> list[str]:
    parts, rows = [], results(found, "speed")
    ratios = {(r.model, r.who, r.metric, r.depth): r.value for r in rows[rows["unit"] == "ratio"].itertuples()}

    def told(row) -> str:
        over = ratios.get((row.model, row.who, f"{row.metric}/f16", row.depth))
        return _within(row.value, row.spread, 1) + (f" ({over:.2f})" if over else "")

    plain = rows[rows["unit"] == "t/s"]
    for metric, cells in plain.groupby("metric", sort=False):
        head, lines = _by_depth(cells, told)
        parts.append(f"## {metric} by depth\nTokens a second, median ± standard deviation of the repetitions, and the "
                     f"median ratio to f16 measured beside\n\n" + markdown(head, lines, len(head) - 2))  # fmt: skip
    over = rows[(rows["unit"] == "ratio") & ~rows["metric"].str.endswith("/f16")]
    for metric, cells in over.groupby("metric", sort=False):
        head, lines = _by_depth(cells, lambda row: _within(row.value, row.spread, 3))
        parts.append(f"## {metric}: an engine over another\nMedian ± standard deviation of the pairs\n\n"
                     + markdown(head, lines, len(head) - 2))  # fmt: skip
    return parts


def _memory(found: pd.DataFrame) -> list[str]:
    rows = results(found, "memory")
    if rows.empty:
        return []
    head, lines = _by_depth(rows[rows["metric"] == "total"], lambda row: f"{row.value:.2f}")
    cells = wide(rows[rows["depth"] == rows["depth"].max()])
    parts = [name for name in ("codes", "exact", "bases", "compute", "device") if name in cells]
    split = [[r.model, r.who, *(f"{_column(r, p):.2f}" for p in parts)] for _, r in cells.iterrows()]
    return [
        "## Memory by context\nMiB of a context's cache: codes, exact rows and bases\n\n"
        + markdown(head, lines, len(head) - 2),
        f"## Memory at {rows['depth'].max():.0f} tokens\nMiB; compute: llama.cpp's buffers\n\n"
        + markdown(["model", "cache", *parts], split, len(parts)),
    ]


def _retrieval(found: pd.DataFrame) -> list[str]:
    parts, rows = [], results(found, TASKS)
    for (test, setting), cells in rows[rows["metric"] == "right"].groupby(["test", "setting"], sort=False):
        head, lines = _by_depth(cells, lambda row: f"{row.value:.0%} of {row.n:.0f}")
        parts.append(
            f"## Retrieval: {test}\nRight answers by depth; {setting}\n\n" + markdown(head, lines, len(head) - 2)
        )
    return parts


def _failures(found: pd.DataFrame) -> list[str]:
    rows = found[found["error"] != ""]
    lines: dict[tuple[str, str, str], list[str]] = {}
    for row in rows.itertuples():
        tests = lines.setdefault((row.model, row.who, row.error), [])
        tests += [row.test] if row.test not in tests else []
    told = [(model, who, ", ".join(tests), error) for (model, who, error), tests in lines.items()]
    return ["## Not measured\n" + markdown(["model", "cache", "test", "why"], told, 0)] if told else []


def write(csv: Path, target: Path) -> None:
    """Write the report of a results file beside it."""
    target.write_text(report(load(csv)), encoding="utf-8")


def main(
    path: Annotated[Path, typer.Argument(metavar="CSV")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="file to write [default: print]")] = None,
    compare: Annotated[Path | None, typer.Option(help="an older CSV: print only what changed since")] = None,
) -> None:
    """Print the tables of a results file."""
    try:
        told = "\n".join(changes(read(compare), read(path)) or ["nothing changed by more than its spread"]) + "\n" \
            if compare else report(load(path))  # fmt: skip
    except RunError as error:
        print(f"kvtc: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if output:
        output.write_text(told, encoding="utf-8")
    else:
        print(told, end="")


if __name__ == "__main__":
    typer.run(main)
