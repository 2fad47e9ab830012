"""The demo's table: ``python -m bench.demo`` measures every cache type on two small models, into build/demo.csv.

A bench (`bench.run`) of matrices/demo.yaml on one engine, with fewer columns.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from bench import heldout, machine
from bench.csv_file import write_csv
from bench.engine import Engine
from bench.harness import Bench
from bench.logs import RunError
from bench.matrix import Matrix, Quality, load
from bench.results import Results
from bench.run import measure, subject

COLUMNS = ("model", "cache_type_k", "cache_type_v", "sink", "window", "bpv", "kv_mib", "ppl", "kld", "kld_p999", "top1")
MATRIX = Path(__file__).parent / "matrices" / "demo.yaml"
OPTIONAL = "f32"  # models named so are measured only when asked for


def table_rows(results: list[dict[str, str]]) -> list[dict[str, str]]:
    """The demo's lines from the bench's rows, one for each cell.

    Raises:
        RunError: a cell failed; with its reason.
    """
    cells: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in results:
        if row["error"]:
            raise RunError(row["error"])
        cells.setdefault((row["model"], row["cache"]), {})[row["metric"]] = row
    lines = []
    for found in cells.values():
        first = found["kld"]
        lines.append(
            {
                "model": first["model"],
                "cache_type_k": first["type_k"],
                "cache_type_v": first["type_v"],
                "sink": first["sinks"],
                "window": first["window"],
                "bpv": f"{float(first['bpv']):.4g}",
                "kv_mib": f"{int(first['bytes']) / 2**20:.2f}",
                "ppl": f"{float(found['ppl']['value']):.4f}",
                "kld": f"{float(first['value']):.6f}",
                "kld_p999": f"{float(found['kld_p999']['value']):.6f}",
                "top1": f"{float(found['top1']['value']):.3f}",
            }
        )
    return lines


def render(rows: list[dict[str, str]], caption: str) -> Table:
    """The table as people read it, with a rule between models and between settings of the exact tokens."""
    table = Table(title="What a KV cache type costs and what it loses", caption=caption, caption_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "model" or name.startswith("cache") else "right")
    for index, line in enumerate(rows):
        following = rows[index + 1] if index + 1 < len(rows) else line
        ends = any(line[name] != following[name] for name in ("model", "sink", "window"))
        table.add_row(*(line[name] for name in COLUMNS), end_section=ends)
    return table


def select(matrix: Matrix, types: str | None, models: str | None) -> Matrix:
    """The models whose file names contain one of ``models``, the caches named in ``types`` (commas between).

    Raises:
        RunError: there are none.
    """
    wanted = [name.lower() for name in models.split(",")] if models else []
    chosen = tuple(
        model
        for model in matrix.models
        if (not wanted or any(name in model.file.lower() for name in wanted))
        and (OPTIONAL not in model.file or any(OPTIONAL in name for name in wanted))
    )
    caches = tuple(entry for entry in matrix.caches if not types or entry.cache.name in types.split(","))
    if not chosen or not caches:
        raise RunError("no cache type or model of that name is in the table")
    return replace(matrix, models=chosen, caches=caches)


def main(
    build: Path = typer.Option(Path("build"), help="build tree: bin/ and models/ are read, demo.csv is written"),
    binaries: Path | None = typer.Option(None, "--bin", help="folder of the tools [default: BUILD/bin]"),
    model_dir: Path | None = typer.Option(None, help="folder of the models [default: BUILD/models]"),
    text: Path | None = typer.Option(None, "-f", "--file", help="text to evaluate on [default: $KVTC_EVAL_TEXT]"),
    ctx: int = typer.Option(1024, "-c", "--ctx-size", help="tokens in a chunk", min=128),
    chunks: int = typer.Option(8, help="chunks to evaluate", min=1),
    output: Path | None = typer.Option(None, "-o", "--output", help="CSV to write [default: BUILD/demo.csv]"),
    threads: int | None = typer.Option(None, "-t", "--threads", help="threads [default: the number of cores]"),
    types: str | None = typer.Option(None, help="only these cache types, commas between"),
    models: str | None = typer.Option(None, help="only models whose names contain one of these, commas between"),
) -> None:
    """Measure KLD, PPL and top-1 agreement of every cache type against f16, in one run."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    try:
        matrix = select(load(MATRIX), types, models)
        tests = tuple(replace(test, ctx=ctx, chunks=chunks) for test in matrix.tests if isinstance(test, Quality))
        engine = Engine.parse(f"ours={binaries or build / 'bin'}")
        build.mkdir(parents=True, exist_ok=True)
        source, here = heldout.find(build, text), machine.find()
        with tempfile.TemporaryDirectory(dir=build, prefix="demo-") as scratch:
            subjects = [subject(model, model_dir or build / "models", Path(scratch)) for model in matrix.models]
            bench = Bench(replace(matrix, tests=tests), [engine], Results(None), here, source, Path(scratch), console,
                          threads or here.cores)  # fmt: skip
            measure(bench, subjects)
        rows = table_rows(bench.results.rows)
        output = output or build / "demo.csv"
        write_csv(output, COLUMNS, rows)
    except (RunError, OSError) as error:
        print(f"kvtc: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    caption = (
        f"{source.title}, {chunks} chunks of {ctx} tokens, second half of each scored; KLD against the f16 cache, "
        f"nats/token; kv_mib at {ctx} tokens. q8_0 and q4_0 with llama.cpp's Hadamard rotation."
    )
    console.print(render(rows, caption))
    console.print(f"written to {output}")


if __name__ == "__main__":
    typer.run(main)
