"""The bench: ``python -m bench.run MATRIX --engine NAME=FOLDER …`` measures a matrix of models, caches and engines.

Every result is in the CSV as soon as it is there; the same command goes on where it was stopped. bench/README.md says
what matrices and results hold.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from bench import heldout, machine, matrix
from bench.engine import Engine
from bench.harness import Bench, Subject
from bench.logs import RunError
from bench.measure import memory, quality, speed
from bench.results import Results
from bench.retrieval import retrieval

MEASURES = {matrix.Quality: quality, matrix.Speed: speed, matrix.Memory: memory, matrix.Retrieval: retrieval}
WORK = Path("build/bench")


def subject(model: matrix.Model, folder: Path, work: Path) -> Subject:
    """The model's file: as given, else in the folder of models; a random one is made when it is not there.

    Raises:
        RunError: there is no such file or shape.
    """
    if model.random:
        return Subject(model.name, _random(model.random, work))
    for path in (Path(model.file), folder / model.file):
        if path.is_file():
            return Subject(model.name, path)
    raise RunError(f"{folder / model.file} does not exist; run `make models`, or set --models")


def _random(shape: str, work: Path) -> Path:
    from bench import random_model  # needs the calibration package

    if shape not in random_model.SHAPES:
        raise RunError(f"no random model '{shape}'; there are {', '.join(random_model.SHAPES)}")
    path = work / f"{shape}.gguf"
    if not path.with_suffix(".kvtc.gguf").exists():  # written last
        path.parent.mkdir(parents=True, exist_ok=True)
        random_model.main(shape, path)
    return path


def measure(bench: Bench, models: list[Subject]) -> None:
    """All cells of the matrix that have no result yet, model by model and test by test."""
    try:
        for model in models:
            for test in bench.matrix.tests:
                if not matrix.wants(test.models, model.name):
                    continue
                bench.console.print(f"[bold]{model.name}: {test.name}[/bold]")
                MEASURES[type(test)](bench, model, test)
    finally:
        bench.drop_base()


def asked(plan: matrix.Matrix, engines: list[Engine], model: matrix.Model, only: str) -> bool:
    """Whether a cell of the model is like this pattern: the files of others need not be there."""
    depths = {
        str(depth)
        for test in plan.tests
        for name in ("ctx", "depths", "contexts")
        for depth in np.atleast_1d(getattr(test, name, ()))
    }
    parts = (engines, plan.caches, plan.tests, depths)
    cells = (f"{e.name}/{model.name}/{c.cache.label}/{t.name}/{d}" for e, c, t, d in itertools.product(*parts))
    return any(matrix.wants((only,), cell) for cell in cells)


def prepare(
    path: Path,
    engines: list[str],
    results: Results,
    folder: Path,
    text: Path | None,
    work: Path,
    console: Console,
    only: str = "*",
) -> tuple[Bench, list[Subject]]:
    """A bench ready to measure. Raises RunError or OSError when something that it needs is not there."""
    plan = matrix.load(path)
    names = [Engine.parse(engine) for engine in engines]
    if len({engine.name for engine in names}) < len(names):
        raise RunError("two engines have the same name; give them as NAME=FOLDER")
    for entry in plan.caches:
        if not any(matrix.wants(entry.engines, engine.name) for engine in names):
            console.print(f"{entry.cache.label} is left out: it is for engines like {' or '.join(entry.engines)}")
    here = machine.find()
    models = [subject(model, folder, work) for model in plan.models if asked(plan, names, model, only)]
    source = heldout.find(work, text)
    return Bench(plan, names, results, here, source, work, console, plan.threads or here.cores), models


def main(
    path: Annotated[Path, typer.Argument(metavar="MATRIX", help="YAML: bench/matrices has some")],
    engine: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER of binaries, the first is the reference "
                                                     "[default: ours=build/bin]")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="results, without .csv [default: "
                                                "bench/results/MACHINE-MATRIX]")] = None,
    models: Annotated[Path, typer.Option(help="folder of models that are given by file name")] = Path("build/models"),
    text: Annotated[Path | None, typer.Option("-f", "--file", help="text of quality and haystacks "
                                              "[default: $KVTC_EVAL_TEXT]")] = None,
    threads: Annotated[int | None, typer.Option("-t", "--threads", min=1, help="[default: the matrix's, else the "
                                                "number of cores]")] = None,
    only: Annotated[str, typer.Option(help="only cells ENGINE/MODEL/CACHE/TEST/DEPTH like this pattern")] = "*",
    redo: Annotated[bool, typer.Option(help="measure again what has a result")] = False,
    compare: Annotated[Path | None, typer.Option(help="an older CSV: print what changed beyond its spread")] = None,
    work: Annotated[Path, typer.Option(help="folder of logs, logits and random models")] = WORK,
    report: Annotated[bool, typer.Option(help="write OUTPUT.md and the plots at the end")] = True,
) -> None:  # fmt: skip
    """Measure quality, speed, memory and retrieval of KV cache types, and write a CSV, a table and plots."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        stem = output or Path("bench/results") / f"{machine.find().slug}-{path.stem}"
        csv = stem.with_name(stem.name.removesuffix(".csv") + ".csv")
        results = Results(csv)
        old = Results(compare).rows if compare and compare.exists() else None
        if compare and old is None:
            raise RunError(f"{compare} does not exist")
        bench, subjects = prepare(path, engine or ["ours=build/bin"], results, models, text, work, console, only)
        bench.redo, bench.only, bench.threads = redo, only, threads or bench.threads
        measure(bench, subjects)
    except (RunError, OSError) as error:
        print(f"kvtc: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("kvtc: stopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    console.print(f"{len(bench.new)} cells measured; results in {csv}", markup=False)
    if not any(row["value"] for row in results.rows):
        print("kvtc: no cell has a result", file=sys.stderr)
        raise typer.Exit(1)
    if report:
        from bench import plot, table  # pandas and matplotlib take a second to import

        table.write(csv, csv.with_suffix(".md"))
        for image in plot.write(csv, csv.parent):
            console.print(f"wrote {image}", markup=False)
    if old is not None:
        from bench.compare import changes

        for line in changes(old, results.rows) or ["nothing changed by more than its spread"]:
            console.print(line, markup=False)


if __name__ == "__main__":
    typer.run(main)
