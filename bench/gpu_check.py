"""Everything to know of a GPU: ``python -m bench.gpu_check --bin build-cuda/bin``.

Each step writes logs and tables to the output folder and one line to `steps.csv`; a step that fails is a row with its
reason, and the script then exits with 1. What has passed on this build is not run again (`--redo`), so that it may be
run in several calls (`--seconds`). At the end stands a table of all targets: met, not met, not run.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench import gpu_verdict
from bench.csv_file import write_csv
from bench.gpu_run import NotRun, Runner
from bench.gpu_steps import STEPS, TIMED, Check

TYPES = "f16,kvtc-k2v4,q8_0,q4_0,kvtc-k3v4,kvtc-k1v3,kvtc-k4v4"  # a run that is cut short has the first ones
DEPTHS = "0,4096,16384,32768,65536,131072"
# steps whose state is the answer
ANSWERS = {
    "check": "kernels equal their numpy twins",
    "backend-ops": "test-backend-ops passes",
    "memcheck": "memcheck is clean",
    "racecheck": "racecheck is clean",
    "nsight": "Nsight Compute's figures",
}


def run_steps(c: Check, names: list[str]) -> bool:
    """Run the steps one after the other and write `steps.csv` after each; true if none failed."""
    console, path = Console(), c.out / "steps.csv"
    old = {row["step"]: row for row in gpu_verdict.read_rows(path) if row.get("build") == c.runner.build}
    rows = {name: (row["state"], row["text"], row["seconds"]) for name, row in old.items() if name in STEPS}
    failed = False
    for name in names:
        console.print(f"[bold]{name}[/bold]")
        c.runner.timed, c.runner.again, began = name in TIMED, 0, time.monotonic()
        try:
            state, text = "ok", STEPS[name](c)
        except NotRun as error:
            state, text = "not run", str(error)
        except Exception as error:  # a failed step must not keep the others from running
            state, text = "failed", " ".join(f"{error}".split()) or type(error).__name__
        failed = failed or state == "failed"
        seconds, again = time.monotonic() - began, f", {c.runner.again} commands had passed" if c.runner.again else ""
        rows[name] = (state, text, f"{seconds:.0f}")
        console.print(f"  {state} ({seconds:.0f} s{again}): {text}", markup=False)
        ordered = [(step, *rows[step], c.runner.build, c.runner.card) for step in STEPS if step in rows]
        write_csv(path, ("step", "state", "text", "seconds", "build", "card"), ordered)
    tell_targets(c, {name: (state, text) for name, (state, text, _) in rows.items()})
    left = [f"{name} ({text})" for name, (state, text, _) in rows.items() if state == "not run"]
    left += [f"{name} (not asked for)" for name in STEPS if name not in rows]
    console.print(f"Not run: {', '.join(left) or 'nothing'}", markup=False, soft_wrap=True)
    return not failed


def tell_targets(c: Check, states: dict[str, tuple[str, str]]) -> None:
    """Print all targets, those of steps that ran before too, and write `targets.csv`."""

    def rows(step: str, name: str) -> list[dict[str, str]]:  # not those of another build
        return gpu_verdict.read_rows(c.out / name) if step in states else []

    found = gpu_verdict.steps(states, ANSWERS)
    measured = gpu_verdict.read_speeds(c.out / "bench.csv") if "bench" in states else []
    for shape in c.shapes:
        found += gpu_verdict.speeds(measured, shape)
        found += gpu_verdict.floors(rows("kernels", f"kernels-{shape}.csv"), shape)
        found += gpu_verdict.memories(rows("memory", "memory.csv"), shape)
    found += gpu_verdict.qualities(rows("quality", "quality.csv"), [model.stem for model in c.models])
    write_csv(c.out / "targets.csv", ("model", "target", "verdict", "text"),
              [(t.model, t.name, t.verdict, t.text) for t in found])  # fmt: skip
    table = Table("model", "target", "verdict", "figures")
    for t in found:
        table.add_row(t.model, t.name, t.verdict, t.text, style={True: "", False: "red", None: "dim"}[t.met])
    Console().print(table)
    counts = [
        f"{sum(t.met is met for t in found)} {word}"
        for met, word in ((True, "met"), (False, "not met"), (None, "not run"))
    ]
    Console().print(f"{len(found)} targets: {', '.join(counts)}", markup=False)


def main(
    binaries: Annotated[Path, typer.Option("--bin", help="folder of libraries and tools")] = Path("build-cuda/bin"),
    device: Annotated[str, typer.Option(help="the device's name")] = "CUDA0",
    out: Annotated[Path, typer.Option(help="folder of logs and tables")] = Path("build/gpu_check"),
    only: Annotated[str, typer.Option(help="steps, with commas")] = ",".join(STEPS),
    shapes: Annotated[str, typer.Option(help="random models")] = "llama-8b,qwen2.5-7b,gemma3-4b",
    types: Annotated[str, typer.Option(help="cache types")] = TYPES,
    depths: Annotated[str, typer.Option(help="tokens before the measured ones")] = DEPTHS,
    model: Annotated[list[Path] | None, typer.Option(help="a model with a calibration beside it")] = None,
    text: Annotated[Path | None, typer.Option("-f", help="text for the quality step")] = None,
    quick: Annotated[bool, typer.Option(help="fewer cases")] = False,
    redo: Annotated[bool, typer.Option(help="run again what has passed on this build")] = False,
    seconds: Annotated[float, typer.Option(help="begin nothing after so many; the next call goes on; 0: no end")] = 0,
) -> None:
    """Check and measure kvtc on a GPU."""
    names = only.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        raise typer.BadParameter(f"unknown step {unknown[0]}: use {', '.join(STEPS)}")
    runner = Runner(binaries.resolve(), out.resolve(), device, redo, seconds)
    check = Check(runner, quick, shapes.split(","), types.split(","), depths, model or [], text)
    if not run_steps(check, names):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
