"""When a token's kernels run on a GPU, layer by layer: ``python -m bench.timeline model.gguf --depth 131072``.

llama-cpp-python runs the model and torch's profiler records the kernels of a few tokens, those of captured graphs too,
with the stream that each ran on. A layer is what begins between the starts of two attentions; the table has medians
over the layers of all tokens. Needs a torch with CUDA, and llama-cpp-python with ours.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.csv_file import write_csv
from bench.nsight import short_name

ATTENTION = r"decode_|flash_attn_(ext|tile|vec|mma)"  # a layer's first kernel, ours or llama.cpp's, for one token
COLUMNS = ("kernel", "stream", "grid", "begins_us", "ends_us")
WARM = 8  # tokens before those that are recorded: graphs are captured by then
CAST = re.compile(r"\(\w+\)(?=\d)")  # of a template's argument: short_name would end there
USUAL = 0.5  # of the layers have a kernel that the table shows


@dataclass(frozen=True)
class Kernel:
    """A kernel's launch, or what layers have in common of one: µs from any moment on, or from a layer's start."""

    name: str
    stream: int
    grid: str
    start: float
    end: float


def parse_trace(events: Iterable[dict[str, Any]]) -> list[Kernel]:
    """The kernels among the events of a Chrome trace, in the order of their starts."""
    found = [
        Kernel(
            short_name(CAST.sub("", event["name"])),
            int(event["args"].get("stream", 0)),
            "x".join(str(n) for n in event["args"].get("grid", ())),
            float(event["ts"]),
            float(event["ts"]) + float(event["dur"]),
        )
        for event in events
        if event.get("cat") == "kernel"
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def find_layers(kernels: Sequence[Kernel], attention: str = ATTENTION) -> list[list[Kernel]]:
    """The kernels of each layer, from its attention on to the next. Those of a token's last layer, with which the
    logits and the next token's first nodes come, are left out: they take more than 1.5 times the others' median.

    Raises:
        ValueError: fewer than two attentions.
    """
    spans = list(pairwise(i for i, kernel in enumerate(kernels) if re.search(attention, kernel.name)))
    if not spans:
        raise ValueError(f"no two kernels are an attention ({attention})")
    lengths = [kernels[j].start - kernels[i].start for i, j in spans]
    most = 1.5 * statistics.median(lengths)
    return [list(kernels[i:j]) for (i, j), length in zip(spans, lengths, strict=True) if length <= most]


def summarize(layers: Sequence[Sequence[Kernel]]) -> list[Kernel]:
    """The kernels that most layers have, at their median times from the layer's start on, in the order of their starts.
    Of several alike, each is one."""
    times: dict[tuple[str, int, str, int], list[tuple[float, float]]] = defaultdict(list)
    for layer in layers:
        count: Counter[tuple[str, int, str]] = Counter()
        for kernel in layer:
            key = kernel.name, kernel.stream, kernel.grid
            times[(*key, count[key])].append((kernel.start - layer[0].start, kernel.end - layer[0].start))
            count[key] += 1
    steps = [
        Kernel(name, stream, grid, statistics.median(x for x, _ in found), statistics.median(x for _, x in found))
        for (name, stream, grid, _), found in times.items()
        if len(found) >= USUAL * len(layers)
    ]
    return sorted(steps, key=lambda step: (step.start, step.end))


def record(model: Path, cache: str, depth: int, tokens: int) -> list[Kernel]:
    """Run a model to a depth, then record `tokens` single tokens' kernels.

    Raises:
        RuntimeError: torch finds no GPU.
    """
    import torch
    from llama_cpp import Llama
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU: install a torch with CUDA, and run this where nvidia-smi lists a card")
    options = {} if cache == "f16" else {"cache_type": cache}
    llm = Llama(
        str(model), n_ctx=depth + WARM + tokens + 256, n_gpu_layers=-1, flash_attn=True, verbose=False, **options
    )
    if depth:
        llm.eval([1 + i % 1000 for i in range(depth)])
    for i in range(WARM):
        llm.eval([5 + i])
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for i in range(tokens):
            llm.eval([50 + i])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        return parse_trace(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def main(
    model: Annotated[Path, typer.Argument(help="A model, with its calibration beside it.", exists=True)],
    cache: Annotated[str, typer.Option(help="f16 or kvtc-k<a>v<b>.")] = "kvtc-k2v4",
    depth: Annotated[int, typer.Option(help="Tokens before the recorded ones.", min=0)] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens to record.", min=1)] = 4,
    attention: Annotated[str, typer.Option(help="Expression that a layer's first kernel matches.")] = ATTENTION,
    output: Annotated[Path | None, typer.Option("-o", help="CSV to write.")] = None,
) -> None:
    """Show when the kernels of a layer run, for one token."""
    try:
        layers = find_layers(record(model, cache, depth, tokens), attention)
    except (ImportError, RuntimeError, ValueError) as error:
        needs = ": install a torch with CUDA and kvtc's llama-cpp-python" if isinstance(error, ImportError) else ""
        print(f"kvtc: {error}{needs}", file=sys.stderr)
        raise typer.Exit(1) from None
    steps = summarize(layers)
    table = Table("kernel", "stream", "grid", "begins, µs", "ends, µs", title=f"{len(layers)} layers, {cache}, {depth}")
    for step in steps:
        table.add_row(step.name, str(step.stream), step.grid, f"{step.start:.1f}", f"{step.end:.1f}")
    Console().print(table)
    if output:
        write_csv(output, COLUMNS, [(s.name, s.stream, s.grid, f"{s.start:.2f}", f"{s.end:.2f}") for s in steps])


if __name__ == "__main__":
    typer.run(main)
