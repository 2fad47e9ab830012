"""The demo's table: ``python -m bench.demo`` measures every cache type on two small models, into build/demo.csv."""

from __future__ import annotations

import csv
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import heldout
from bench.perplexity import Cache, Perplexity, RunError, Statistics

COLUMNS = ("model", "cache_type_k", "cache_type_v", "sink", "window", "bpv", "kv_mib", "ppl", "kld", "kld_p999", "top1")
SINK, WINDOW = 4, 128  # tokens: the flags' defaults
KVTC = ("kvtc-k2v2", "kvtc-k2v4", "kvtc-k3v4", "kvtc-k4v4")
STOCK = ("f16", "q8_0", "q4_0")


@dataclass(frozen=True)
class Subject:
    """A model and the caches that it is measured with. The f16 logits are the base of every row."""

    file_name: str
    caches: tuple[Cache, ...]
    optional: bool = False  # measured only when asked for by name


SUBJECTS = (
    Subject(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (
            *(Cache(name) for name in STOCK),
            *(Cache(name, SINK, WINDOW) for name in KVTC),
            *(Cache(name, SINK, 0) for name in KVTC),
        ),
    ),
    Subject(
        "gemma-3-270m-q4_k_m.gguf",
        (Cache("f16"), Cache("q4_0"), Cache("kvtc-k2v4", SINK, WINDOW)),
    ),
    # made by bench.float_copy: without 8-bit activations, whose roundings put a floor under every KLD of the first
    Subject(
        "SmolLM2-135M-Instruct.f32.gguf",
        (*(Cache(name) for name in STOCK), *(Cache(name, SINK, WINDOW) for name in KVTC)),
        optional=True,
    ),
)


def row(model: Path, cache: Cache, found: Statistics) -> dict[str, str | int]:
    """One line of the table, by column."""
    key, value = cache.types
    return {
        "model": model.stem,
        "cache_type_k": key,
        "cache_type_v": value,
        "sink": cache.sink,
        "window": cache.window,
        "bpv": f"{found.bpv or cache.bpv:.4g}",
        "kv_mib": f"{found.kv_mib:.2f}",
        "ppl": f"{found.ppl:.4f}",
        "kld": f"{round(found.kld, 6) + 0.0:.6f}",  # rounding leaves f16 at -0.000000 without the sum
        "kld_p999": f"{found.kld_p999:.6f}",
        "top1": f"{found.top1:.3f}",
    }


def write_csv(rows: list[dict[str, str | int]], path: Path) -> None:
    """Write the table, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as output:
        writer = csv.DictWriter(output, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def render(rows: list[dict[str, str | int]], caption: str) -> Table:
    """The table as people read it, with a rule between models and between settings of the exact tokens."""
    table = Table(title="What a KV cache type costs and what it loses", caption=caption, caption_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "model" or name.startswith("cache") else "right")
    for index, line in enumerate(rows):
        following = rows[index + 1] if index + 1 < len(rows) else line
        ends = any(line[name] != following[name] for name in ("model", "sink", "window"))
        table.add_row(*(str(line[name]) for name in COLUMNS), end_section=ends)
    return table


def select(types: str | None, models: str | None) -> list[Subject]:
    """The subjects whose file names contain one of ``models``, with the caches named in ``types`` (commas between)."""
    chosen = []
    for subject in SUBJECTS:
        named = models and any(part.lower() in subject.file_name.lower() for part in models.split(","))
        if not named and (models or subject.optional):
            continue
        caches = tuple(cache for cache in subject.caches if not types or cache.name in types.split(","))
        if caches:
            chosen.append(replace(subject, caches=caches))
    return chosen


def main(
    build: Path = typer.Option(Path("build"), help="build tree: bin/ and models/ are read, demo.csv is written"),
    binary: Path | None = typer.Option(None, help="llama-perplexity to run [default: BUILD/bin/llama-perplexity]"),
    model_dir: Path | None = typer.Option(None, help="folder of the models [default: BUILD/models]"),
    text: Path | None = typer.Option(None, "-f", "--file", help="text to evaluate on [default: $KVTC_EVAL_TEXT]"),
    ctx: int = typer.Option(1024, "-c", "--ctx-size", help="tokens in a chunk", min=128),
    chunks: int = typer.Option(8, help="chunks to evaluate", min=1),
    output: Path | None = typer.Option(None, "-o", "--output", help="CSV to write [default: BUILD/demo.csv]"),
    threads: int | None = typer.Option(None, "-t", "--threads", help="threads [default: llama.cpp's choice]"),
    types: str | None = typer.Option(None, help="only these cache types, commas between"),
    models: str | None = typer.Option(None, help="only models whose names contain one of these, commas between"),
) -> None:
    """Measure KLD, PPL and top-1 agreement of every cache type against f16, in one run."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    suffix = ".exe" if os.name == "nt" else ""
    binary = binary or build / "bin" / f"llama-perplexity{suffix}"
    rows: list[dict[str, str | int]] = []
    try:
        build.mkdir(parents=True, exist_ok=True)
        subjects = select(types, models)
        if not subjects:
            raise RunError("no cache type or model of that name is in the table")
        source = heldout.find(build, text)
        total = sum(len(subject.caches) + 1 for subject in subjects)
        # The f16 logits of a large vocabulary take gigabytes: they go as soon as a model is done.
        with tempfile.TemporaryDirectory(dir=build, prefix="demo-") as scratch, _progress(console) as progress:
            task = progress.add_task("", total=total)
            for subject in subjects:
                model = (model_dir or build / "models") / subject.file_name
                if not model.is_file():
                    raise RunError(f"{model} does not exist; run `make models`")
                base = Path(scratch) / "base.kld"
                run = Perplexity(binary, model, source.path, base, ctx, chunks, threads)
                progress.update(task, description=f"{model.stem}: f16 logits")
                run.save_base()
                progress.advance(task)
                for cache in subject.caches:
                    progress.update(task, description=f"{model.stem}: {cache.name}")
                    started = time.monotonic()
                    found = run.measure(cache)
                    seconds = time.monotonic() - started
                    rows.append(row(model, cache, found))
                    exact = f"{cache.sink}+{cache.window} exact"
                    progress.print(f"{model.stem}  {cache.name}  {exact}: KLD {found.kld:.6f} ({seconds:.0f} s)")
                    progress.advance(task)
                base.unlink()
        output = output or build / "demo.csv"
        write_csv(rows, output)
    except (RunError, OSError) as error:
        print(f"kvtc: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    caption = (
        f"{source.title}, {chunks} chunks of {ctx} tokens, second half of each scored; KLD against the f16 cache, "
        f"nats/token; kv_mib at {ctx} tokens. q8_0 and q4_0 with llama.cpp's Hadamard rotation."
    )
    console.print(render(rows, caption))
    console.print(f"written to {output}")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


if __name__ == "__main__":
    typer.run(main)
