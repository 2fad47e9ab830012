"""The steps of `bench.gpu_check`: what each runs, and the table that it leaves."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvtc_gguf.fingerprint import fingerprint
from kvtc_gguf.format import read, write

from bench import nsight
from bench.caches import Cache
from bench.csv_file import write_csv
from bench.float_copy import float_copy
from bench.gpu_run import DEVICE_LINE, NotRun, Runner, StepError
from bench.gpu_verdict import ratios
from bench.heldout import find
from bench.logs import TRACE, parse_sizes
from bench.perplexity import parse_statistics
from bench.speed import Speed, parse_bench

OPERATIONS = ("KVTC_SET_ROWS", "KVTC_ATTN")
PARTS = min(6, os.cpu_count() or 1)  # of the cases, side by side: most of their time is numpy's and the sanitizer's
MEMORY = ("model", "type", "tokens", "cache_mib", "codes_mib", "exact_mib", "bases_mib", "compute_mib", "host_mib")
MEMORY += ("weights_mib", "device_mib", "rest_mib")
REPETITIONS = 5  # of llama-bench, which keeps the state at a depth; two leave a spread of 20% in a short prompt
DIRECT = 512  # context of the quality of one token at a time, which takes the CPU a second for 30


@dataclass
class Check:
    """What the steps share."""

    runner: Runner
    quick: bool
    shapes: list[str]
    types: list[str]
    depths: str
    models: list[Path]
    text: Path | None
    speeds: list[Speed] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.runner.out

    def run(self, name: str, *command: object, **more) -> str:
        return self.runner.run(name, *command, **more)

    def tool(self, name: str) -> Path:
        return self.runner.binaries / name

    @property
    def deepest(self) -> int:
        return max(map(int, self.depths.split(",")))


def run_cases(c: Check, name: str, *more: object, before: tuple[object, ...] = ()) -> str:
    """tests.cuda.check in parts; their numbers together."""
    case = (*before, sys.executable, "-m", "tests.cuda.check", "--device", c.runner.device, *more)
    logs = c.runner.run_parts(name, [(*case, "--part", f"{i}/{PARTS}") for i in range(PARTS)])
    found = [re.search(r"(\d+) cases, (\d+) failed, largest error (\S+),", log) for log in logs]
    if None in found:
        raise StepError(f"tests.cuda.check said nothing of its cases ({name}-{found.index(None)}.log)")
    told = [x.groups() for x in found if x]
    count, failed, worst = (
        sum(int(x) for x, _, _ in told),
        sum(int(x) for _, x, _ in told),
        max(float(x) for _, _, x in told),
    )
    return f"{count} cases, {failed} failed, largest error {worst:.1e}"


def check_kernels(c: Check) -> str:
    return run_cases(c, "check", *(["--quick"] if c.quick else []))


def backend_operations(c: Check) -> str:
    tool = c.tool("test-backend-ops")
    if not tool.exists():
        raise NotRun("test-backend-ops is not built: cmake --build build-cuda --target test-backend-ops")
    logs = [c.run(f"ops-{name}", tool, "test", "-b", c.runner.device, "-o", name) for name in OPERATIONS]
    return ", ".join(f"{name}: {log.count('OK')} lines OK" for name, log in zip(OPERATIONS, logs, strict=True))


def sanitize(c: Check, tool: str, *options: str) -> str:
    if not shutil.which("compute-sanitizer"):
        raise NotRun("compute-sanitizer is not on PATH")
    sanitizer = ("compute-sanitizer", "--error-exitcode", 9, "--tool", tool, *options)
    return f"{tool} is clean: {run_cases(c, tool, '--quick', before=sanitizer)}"


def memcheck(c: Check) -> str:
    return sanitize(c, "memcheck", "--report-api-errors", "no")


def racecheck(c: Check) -> str:
    return sanitize(c, "racecheck")


def time_kernels(c: Check) -> str:
    for shape in c.shapes:
        rows = ("--depths", "1024,16384,131072", "--types", "f16,k2v4") if c.quick else ()
        c.run(
            f"kernels-{shape}",
            sys.executable,
            "-m",
            "bench.kernels",
            shape,
            "-o",
            c.out / f"kernels-{shape}.csv",
            *rows,
        )
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
            log = c.run(f"bench-{shape}-{kind}", c.tool("llama-bench"), "-m", model, "-ngl", 99, "-p", 512,
                        "-n", 32, "-r", REPETITIONS, "-d", c.depths, "-o", "jsonl", *Cache(kind).arguments)  # fmt: skip
            c.speeds += parse_bench(log, shape, kind)
            over = ratios(c.speeds)
            rows = [
                (s.model, s.kind, s.test, s.depth, s.tokens_per_second, s.stddev, over.get(s, "")) for s in c.speeds
            ]
            columns = ("model", "type", "test", "depth", "tokens_per_second", "stddev", "over_f16")
            write_csv(c.out / "bench.csv", columns, rows)
    return "bench.csv"


def memory(c: Check) -> str:
    """The cache's parts at the greatest depth, and what the device has in use beside them."""
    told, rows = [], []
    for shape in c.shapes:
        model = random_model(c, shape)
        for kind in ("f16", "kvtc-k2v4"):
            log = c.run(f"memory-{shape}-{kind}", c.tool("llama-bench"), "-m", model, "-ngl", 99, "-p", 0, "-n", 1,
                        "-r", 1, "-d", c.deepest, "-v", *Cache(kind).arguments, watch=True)  # fmt: skip
            found = parse_sizes(log)
            device = re.search(re.escape(DEVICE_LINE) + r"([\d.]+)", log)
            known = found.cache + found.compute - found.host + found.weights
            in_use = (float(device[1]), float(device[1]) - known) if device else ("", "")
            cache = found.cache, found.codes, found.exact, found.bases
            buffers = found.compute - found.host, found.host, found.weights
            rows.append((shape, kind, c.deepest, *cache, *buffers, *in_use))
            told.append(f"{shape} {kind}: cache {found.cache:.0f} MiB, device {in_use[0] or 'not told'}")
            write_csv(c.out / "memory.csv", MEMORY, rows)
    return "; ".join(told)


def random_model(c: Check, shape: str) -> Path:
    model = c.out / f"{shape}.gguf"
    if not model.exists():  # of no build
        c.run(f"model-{shape}", sys.executable, "-m", "bench.random_model", shape, model, makes=model)
    return model


def quality(c: Check) -> str:
    """KLD on the device and on the CPU, on copies with f32 weights: quantised products round alike on neither.

    All runs of a model and context are compared with the same logits, those of an f16 cache on the device.
    """
    if not c.models:
        raise NotRun("no --model with a calibration beside it was given")
    told, rows = [], []
    for model in c.models:
        copy = c.out / f"{model.stem}-f32.gguf"
        if not copy.exists():
            float_copy(model, copy)
            sidecar = read(model.with_name(f"{model.stem}.kvtc.gguf"))
            write(replace(sidecar, fingerprint=fingerprint(copy)), copy.with_name(f"{copy.stem}.kvtc.gguf"))
        text = find(c.out, c.text).path
        for batch in (512, 1):
            ctx, chunks = 1024 if batch > 1 else DIRECT, 2 if c.quick else 8
            base = c.out / f"{model.stem}-{ctx}.base"
            common = (
                c.tool("llama-perplexity"),
                "-m",
                copy,
                "-f",
                text,
                "-lv",
                TRACE,
                "-c",
                ctx,
                "-b",
                ctx,
                "--chunks",
                chunks,
            )
            compare = ("--kl-divergence-base", base)
            device, name = ("-ngl", 99), f"quality-{model.stem}-{batch}"
            c.run(f"{name}-base", *common, *Cache("f16").arguments, *compare, *device, makes=base)
            kld = {}
            for side, place in (("device", device), ("cpu", ("-ngl", 0, "--device", "none"))):
                log = c.run(f"{name}-{side}", *common, *Cache("kvtc-k2v4", 4, 128).arguments, *compare,
                            "--kl-divergence", *place, "-ub", batch)  # fmt: skip
                kld[side] = parse_statistics(log).kld
            change = kld["device"] / kld["cpu"] - 1
            rows.append((model.stem, batch, kld["device"], kld["cpu"], change))
            told.append(f"{model.stem} -ub {batch}: {kld['device']:.5f}, CPU {kld['cpu']:.5f} ({change:+.1%})")
            write_csv(c.out / "quality.csv", ("model", "ubatch", "kld_device", "kld_cpu", "change"), rows)
    return "; ".join(told)


STEPS: dict[str, Callable[[Check], str]] = {
    "check": check_kernels,
    "backend-ops": backend_operations,
    "memcheck": memcheck,
    "racecheck": racecheck,
    "kernels": time_kernels,
    "nsight": profile,
    "memory": memory,
    "bench": bench,
    "quality": quality,
}
TIMED = ("kernels", "nsight", "memory", "bench")  # count for the card that they ran on
