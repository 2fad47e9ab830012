"""Everything to know of a new GPU: ``python -m bench.gpu_check --bin build-cuda/bin``.

Each step writes a log to the output folder and one line to `steps.csv`; a step that fails is a row with its reason, and
the script then exits with 1. What could not be run is named at the end. Targets that are missed are told, not failures.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer
from kvtc_gguf.fingerprint import fingerprint
from kvtc_gguf.format import read, write
from rich.console import Console

from bench import nsight
from bench.caches import Cache
from bench.float_copy import float_copy
from bench.gpu_memory import watched
from bench.gpu_verdict import ratios, verdicts
from bench.heldout import find
from bench.logs import parse_sizes
from bench.perplexity import Perplexity
from bench.speed import Speed, parse_bench

TYPES = "f16,kvtc-k2v4,q8_0,q4_0,kvtc-k3v4,kvtc-k1v3,kvtc-k4v4"  # a run that is cut short has the first ones
DEPTHS = "0,4096,16384,32768,65536,131072"
SANITIZERS = (["--tool", "memcheck", "--report-api-errors", "no"], ["--tool", "racecheck"])
OPERATIONS = ("KVTC_SET_ROWS", "KVTC_ATTN")


class StepError(Exception):
    """A step failed; the message is one line for the user."""


class NotRun(Exception):
    """A step cannot be run here; the message says what is missing."""


@dataclass
class Check:
    """What the steps share."""

    binaries: Path
    device: str
    out: Path
    quick: bool
    shapes: list[str]
    types: list[str]
    depths: str
    models: list[Path]
    text: Path | None
    limit: int = 1800  # seconds of one command
    speeds: list[Speed] = field(default_factory=list)

    def run(self, name: str, *command: object) -> str:
        """The output of a command, which also goes to `name`.log. Raises StepError."""
        environment = os.environ | {
            "KVTC_LIB_DIR": str(self.binaries),
            "KVTC_BIN": str(self.binaries),
            "KVTC_TEST_DEVICE": self.device,
        }
        words = [str(word) for word in command]
        try:
            result = subprocess.run(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                timeout=self.limit, env=environment, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as error:
            raise StepError(f"{words[0]}: {error.strerror}; build with `make cuda`, or set --bin") from error
        except subprocess.TimeoutExpired as error:
            raise StepError(f"{words[0]} ran longer than {self.limit} s") from error
        (self.out / f"{name}.log").write_text(result.stdout, encoding="utf-8")
        if result.returncode != 0:
            last = [line for line in result.stdout.splitlines() if line.strip()][-1:] or ["no output"]
            raise StepError(f"{Path(words[0]).name} exited with {result.returncode}: {last[0][:200]} ({name}.log)")
        return result.stdout


def check_kernels(c: Check) -> str:
    return c.run("check", sys.executable, "-m", "tests.cuda.check", "--device", c.device,
                 *(["--quick"] if c.quick else [])).splitlines()[-1]  # fmt: skip


def backend_operations(c: Check) -> str:
    tool = c.binaries / "test-backend-ops"
    if not tool.exists():
        raise NotRun("test-backend-ops is not built: cmake --build build-cuda --target test-backend-ops")
    logs = [c.run(f"ops-{name}", tool, "test", "-b", c.device, "-o", name) for name in OPERATIONS]
    return ", ".join(f"{name}: {log.count('OK')} lines OK" for name, log in zip(OPERATIONS, logs, strict=True))


def sanitize(c: Check) -> str:
    if not shutil.which("compute-sanitizer"):
        raise NotRun("compute-sanitizer is not on PATH")
    for arguments in SANITIZERS:
        check = (sys.executable, "-m", "tests.cuda.check", "--device", c.device, "--quick")
        c.run(f"sanitize-{arguments[1]}", "compute-sanitizer", "--error-exitcode", 9, *arguments, *check)
    return "memcheck and racecheck are clean"


def time_kernels(c: Check) -> str:
    for shape in c.shapes:
        c.run(f"kernels-{shape}", sys.executable, "-m", "bench.kernels", shape, "-o", c.out / f"kernels-{shape}.csv")
    return f"kernels-{{{','.join(c.shapes)}}}.csv"


def profile(c: Check) -> str:
    """Nsight Compute over the attention's kernels, of one token and of a prompt, at the deepest of two depths."""
    if not shutil.which("ncu"):
        raise NotRun("ncu (Nsight Compute) is not on PATH")
    depth, rows = "16384" if c.quick else "131072", []
    for shape in c.shapes:
        for tokens in ("1", "512"):
            timed = (sys.executable, "-m", "bench.kernels", shape, "--depths", depth, "--tokens", tokens)
            timed += ("--types", "k2v4", "--bandwidth", 1, "--rate", 1)
            log = c.run(f"nsight-{shape}-{tokens}", "ncu", *nsight.arguments(40), *timed)
            rows += [(shape, tokens, depth, *row) for row in nsight.parse(log)]
            write_csv(c.out / "nsight.csv", ("shape", "tokens", "depth", *nsight.COLUMNS), rows)
    return f"{len(rows)} kernels in nsight.csv"


def bench(c: Check) -> str:
    for shape in c.shapes:
        model = random_model(c, shape)
        for kind in c.types:
            log = c.run(f"bench-{shape}-{kind}", c.binaries / "llama-bench", "-m", model, "-ngl", 99, "-p", 512,
                        "-n", 32, "-r", 2, "-d", c.depths, "-o", "jsonl", *Cache(kind).arguments)  # fmt: skip
            c.speeds += parse_bench(log, shape, kind)
            write_speeds(c)
    return "; ".join(f"{'met' if met else 'NOT met'}: {text}" for text, met in verdicts(c.speeds)) or "bench.csv"


def memory(c: Check) -> str:
    """The cache's parts at the greatest depth, and what the device has in use; the target is a fifth of f16's cache."""
    depth, told, rows = max(map(int, c.depths.split(","))), [], []
    for shape in c.shapes:
        model = random_model(c, shape)
        caches = {}
        for kind in ("f16", "kvtc-k2v4"):
            with watched() as peak:
                log = c.run(f"memory-{shape}-{kind}", c.binaries / "llama-bench", "-m", model, "-ngl", 99, "-p", 0,
                            "-n", 1, "-r", 1, "-d", depth, "-v", *Cache(kind).arguments)  # fmt: skip
            found = parse_sizes(log)
            caches[kind] = found.cache
            parts = (found.codes, found.exact, found.bases, found.compute)
            rows.append((shape, kind, depth, found.cache, *parts, "" if peak.mib is None else peak.mib))
        told.append(f"{shape}: {caches['kvtc-k2v4']:.0f} MiB, f16 {caches['f16']:.0f} at {depth} tokens, "
                    f"{caches['f16'] / caches['kvtc-k2v4']:.2f} times less (wanted 5)")  # fmt: skip
    columns = ("cache_mib", "codes_mib", "exact_mib", "bases_mib", "compute_mib", "device_mib")
    write_csv(c.out / "memory.csv", ("model", "type", "tokens", *columns), rows)
    return "; ".join(told)


def random_model(c: Check, shape: str) -> Path:
    model = c.out / f"{shape}.gguf"
    if not model.exists():
        c.run(f"model-{shape}", sys.executable, "-m", "bench.random_model", shape, model)
    return model


def write_speeds(c: Check) -> None:
    over = ratios(c.speeds)
    rows = [(s.model, s.kind, s.test, s.depth, s.tokens_per_second, s.stddev, over.get(s, "")) for s in c.speeds]
    write_csv(c.out / "bench.csv", ("model", "type", "test", "depth", "tokens_per_second", "stddev", "over_f16"), rows)


def write_csv(path: Path, columns: tuple[str, ...], rows: list[tuple]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    partial.replace(path)


def quality(c: Check) -> str:
    """KLD on the device and on the CPU, on copies with f32 weights: quantised products round alike on neither."""
    if not c.models:
        raise NotRun("no --model with a calibration beside it was given")
    told, rows = [], []
    for model in c.models:
        copy = c.out / f"{model.stem}-f32.gguf"
        float_copy(model, copy)
        sidecar = read(model.with_name(f"{model.stem}.kvtc.gguf"))
        write(replace(sidecar, fingerprint=fingerprint(copy)), copy.with_name(f"{copy.stem}.kvtc.gguf"))
        text = find(c.out, c.text).path
        for ub in ("512", "1"):
            kld = {}
            for side, place in (("device", ("-ngl", "99")), ("cpu", ("-ngl", "0", "--device", "none"))):
                run = Perplexity(c.binaries / "llama-perplexity", copy, text, c.out / "base.bin", 1024,
                                 2 if c.quick or ub == "1" else 8, None, (*place, "-ub", ub))  # fmt: skip
                run.save_base()
                kld[side] = run.measure(Cache("kvtc-k2v4", 4, 128)).kld
            change = kld["device"] / kld["cpu"] - 1
            rows.append((model.stem, ub, kld["device"], kld["cpu"], change))
            told.append(f"{model.stem} -ub {ub}: {kld['device']:.5f}, CPU {kld['cpu']:.5f} ({change:+.1%})")
    write_csv(c.out / "quality.csv", ("model", "ubatch", "kld_device", "kld_cpu", "change"), rows)
    return "; ".join(told)


STEPS: dict[str, Callable[[Check], str]] = {
    "check": check_kernels,
    "backend-ops": backend_operations,
    "sanitize": sanitize,
    "kernels": time_kernels,
    "nsight": profile,
    "bench": bench,
    "memory": memory,
    "quality": quality,
}


def run_steps(c: Check, names: list[str]) -> bool:
    """Run the steps one after the other and write `steps.csv` after each; true if none failed."""
    console, rows = Console(), []
    for name in names:
        console.print(f"[bold]{name}[/bold]")
        try:
            state, text = "ok", STEPS[name](c)
        except NotRun as error:
            state, text = "not run", str(error)
        except Exception as error:  # a failed step must not keep the others from running
            state, text = "failed", " ".join(f"{error}".split()) or type(error).__name__
        rows.append((name, state, text))
        console.print(f"  {state}: {text}", markup=False)
        write_csv(c.out / "steps.csv", ("step", "state", "text"), rows)
    left = [f"{name} ({text})" for name, state, text in rows if state == "not run"]
    left += [f"{name} (not asked for)" for name in STEPS if name not in names]
    console.print(f"Not run: {', '.join(left) or 'nothing'}", markup=False)
    return all(state != "failed" for _, state, _ in rows)


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
) -> None:
    """Check and measure kvtc on a GPU."""
    names = only.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        raise typer.BadParameter(f"unknown step {unknown[0]}: use {', '.join(STEPS)}")
    out.mkdir(parents=True, exist_ok=True)
    check = Check(binaries.resolve(), device, out.resolve(), quick, shapes.split(","), types.split(","), depths,
                  model or [], text)  # fmt: skip
    if not run_steps(check, names):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
