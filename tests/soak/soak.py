"""A long run of mixed requests: ``python -m tests.soak.soak MODEL --minutes 10``.

Failures caught: a server that crashes, hangs, or leaks under parallel, cancelled, shifted and reused requests, and an
answer that depends on what the server did before. Every kind of request (workload.py) is sent in passes, more at a time
than there are slots; the last pass comes after the time is up. The same greedy requests asked one at a time of a fresh
server, with nothing reused, say what every pass must answer.

Rows that are computed in one batch with other requests, or reused, are rounded differently from those computed alone:
where two tokens are almost equally likely, greedy decoding may then take the other one, with an f16 cache too. So an
answer counts as equal up to its first difference if there the fresh server itself gave both tokens a log probability
within ``--tie`` of each other. Ties are counted and bounded by ``--max-ties``; the rest of such an answer is compared
with nothing. Measured with SmolLM2-135M Q4_1 and four slots: of 40 answers with an
f16 cache 16 parted, at gaps of up to 0.25 nats; of 110 with kvtc-k2v4 52, at gaps of up to 0.18. Hence 0.5.
"""

from __future__ import annotations

import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from bench import heldout
from tests.soak.server import Answer, Server, ServerError, serve
from tests.soak.workload import Request, requests

SLOTS, CLIENTS = 4, 6  # more clients than slots: requests also wait for one
# Passes before RSS counts. One uses every kind of request; which of them meet is chance, and with it the heap's extent.
WARM_UP = 3  # at least, and the first quarter of a long run
GROWTH = 0.02  # of RSS after warm-up
SETTLING = 4 << 20  # bytes that the heap of a server of any size still grows by while it finds its shape


@dataclass
class Report:
    """What a soak found."""

    passes: int = 0
    asked: int = 0
    equal: int = 0
    shifts: int = 0
    memory: list[int] = field(default_factory=list)  # bytes after each pass
    ties: list[tuple[str, float]] = field(default_factory=list)  # request, difference of the log probabilities
    different: list[str] = field(default_factory=list)

    @property
    def compared(self) -> int:
        return self.equal + len(self.ties) + len(self.different)

    @property
    def halves(self) -> tuple[float, float]:
        """Median RSS of the first and of the second half of the passes, warm-up left out.

        One pass's RSS says little: it hangs on which requests met, and moves by some 3% either way on SmolLM2.
        """
        warm = self.memory[max(WARM_UP, len(self.memory) // 4) - 1 :] or self.memory[-1:]
        middle = len(warm) // 2
        return statistics.median(warm[:middle] or warm), statistics.median(warm[middle:])

    @property
    def growth(self) -> float:
        """RSS of the second half over that of the first, less 1."""
        return self.halves[1] / self.halves[0] - 1

    def failures(self, max_ties: float) -> list[str]:
        """What is wrong, a line each. max_ties: share of the compared answers that may part at a tie."""
        found = list(self.different)
        first, second = self.halves
        if second > first + max(GROWTH * first, SETTLING):
            found.append(f"RSS grew by {self.growth:.1%} after warm-up, more than {GROWTH:.0%}")
        if len(self.ties) > max_ties * self.compared:
            found.append(f"{len(self.ties)} of {self.compared} answers part at a tie, more than {max_ties:.0%}")
        if self.shifts == 0:
            found.append("no context was shifted: the soak did not test what it should")
        return found


def compare(request: Request, got: Answer, fresh: Answer, tie: float, report: Report) -> None:
    """Count an answer as equal, as one that parts at a tie, or as different."""
    if got.tokens == fresh.tokens:
        report.equal += 1
        return
    at = next((n for n, pair in enumerate(zip(got.tokens, fresh.tokens, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        report.different.append(f"{request.name}: {len(got.tokens)} tokens, {len(fresh.tokens)} from a fresh server")
        return
    mine, theirs = got.tokens[at], fresh.tokens[at]
    gap = fresh.top[at][theirs] - fresh.top[at].get(mine, float("-inf"))
    if gap <= tie:
        report.ties.append((request.name, gap))
    else:
        report.different.append(
            f"{request.name}: token {at} of {len(fresh.tokens)} is {mine}, not {theirs}, "
            f"which a fresh server finds more likely by {gap:.2f} nats"
        )


def one_pass(server: Server, todo: Sequence[Request], seed: int, clients: int) -> dict[str, Answer]:
    """Ask every request once, in an order of the seed's, and check the status of each answer."""
    order = list(todo)
    random.Random(seed).shuffle(order)
    with ThreadPoolExecutor(clients) as pool:
        answers = dict(zip((r.name for r in order), pool.map(server.ask, order), strict=True))
    for request in order:
        status = answers[request.name].status
        if request.hang_up != 0 and status != request.status:
            raise ServerError(f"{request.name}: status {status}, not {request.status}")
    server.check()
    return answers


def soak(
    binary: Path, model: Path, text: Path, folder: Path, arguments: Sequence[object], n_ctx: int, seconds: float,
    tie: float, note=lambda line: None,
) -> Report:  # fmt: skip
    """Passes for so many seconds, at least the warm-up, and one more; then a fresh server is asked one at a time.

    Args:
        arguments: of the server, cache types among them.
        n_ctx: tokens of context of each slot.
        note: called with a line after every pass.

    Raises:
        ServerError: the server crashed, hung or gave a wrong status.
    """
    fixed = ("-np", SLOTS, "-c", SLOTS * n_ctx, "--context-shift", *arguments)
    report, passes = Report(), []
    with serve(binary, model, folder / "soak.log", fixed) as server:
        todo = requests(server.tokenize(text.read_text(encoding="utf-8")[: 64 * n_ctx])[: 9 * n_ctx], n_ctx)
        end = time.monotonic() + seconds
        while True:
            last = time.monotonic() > end and len(passes) >= WARM_UP
            passes.append(one_pass(server, todo, len(passes), CLIENTS))
            report.memory.append(server.memory())
            report.passes += 1
            report.asked += len(todo)
            note(f"pass {report.passes}: RSS {report.memory[-1] / 2**20:.1f} MiB")
            if last:
                break
    report.shifts = server.log.read_text(errors="replace").count("slot context shift")
    with serve(binary, model, folder / "fresh.log", fixed) as server:
        fresh = {request.name: server.ask(request, alone=True) for request in todo if request.compared}
    for answers in passes:
        for request in todo:
            if request.compared:
                compare(request, answers[request.name], fresh[request.name], tie, report)
    return report


def render(report: Report, model: str) -> Table:
    table = Table(title=f"Soak of {model}", show_header=False)
    table.add_row("passes, requests, context shifts", f"{report.passes}, {report.asked}, {report.shifts}")
    memory = [f"{value / 2**20:.1f}" for value in (report.memory[0], *report.halves, report.memory[-1])]
    table.add_row("RSS: first pass, halves after warm-up, last pass (MiB)", ", ".join(memory))
    table.add_row("growth after warm-up", f"{report.growth:+.2%}")
    table.add_row("answers equal to a fresh server's", f"{report.equal} of {report.compared}")
    table.add_row("answers that part at a tie", _summary(report.ties))
    table.add_row("answers that differ", str(len(report.different)))
    return table


def _summary(ties: Iterable[tuple[str, float]]) -> str:
    ties = list(ties)
    if not ties:
        return "0"
    gaps = [gap for _, gap in ties]
    names = ", ".join(f"{name}: {count}" for name, count in Counter(name for name, _ in ties).most_common())
    return f"{len(ties)}, gap median {statistics.median(gaps):.3f}, most {max(gaps):.3f} nats ({names})"


def main(
    model: Path = typer.Argument(..., help="model GGUF, with its calibration beside it", exists=True, dir_okay=False),
    minutes: float = typer.Option(10, help="how long to send requests", min=0),
    build: Path = typer.Option(Path("build"), help="build tree: bin/llama-server is run"),
    binary: Path | None = typer.Option(None, help="llama-server to run [default: BUILD/bin/llama-server]"),
    cache_type: str = typer.Option("kvtc-k2v4", help="cache type; f16 shows what ties cost without kvtc"),
    ctx: int = typer.Option(512, "-c", "--ctx-size", help="tokens of context of each of the slots", min=128),
    cache_ram: int = typer.Option(32, help="MiB of prompt cache; bounded, so that the first pass can fill it", min=0),
    text: Path | None = typer.Option(None, "-f", "--file", help="text of the prompts [default: as bench.demo]"),
    tie: float = typer.Option(0.5, help="difference of log probabilities (nats) that counts as a tie", min=0),
    max_ties: float = typer.Option(0.8, help="share of answers that may part from the fresh server's at a tie", min=0),
    server_arg: list[str] = typer.Option([], help="one more argument of the server; may be repeated"),
) -> None:
    """Send mixed requests to llama-server for minutes; fail on a crash, growth of memory, or an answer that changed."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server does not outlive a stopped soak
    kind = ("-ct", cache_type) if cache_type.startswith("kvtc") else ("-ctk", cache_type, "-ctv", cache_type)
    arguments = (*kind, "-fa", "on", "--cache-ram", cache_ram, *server_arg)
    try:
        with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
            folder = Path(scratch)
            source = heldout.find(folder, text).path
            program = binary or build / "bin" / "llama-server"
            report = soak(program, model, source, folder, arguments, ctx, minutes * 60, tie, console.print)
    except (ServerError, ValueError, OSError) as error:
        print(f"kvtc: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    console.print(render(report, model.name))
    failures = report.failures(max_ties)
    for line, count in Counter(failures).items():
        print(f"kvtc: {line}" + (f" ({count} times)" if count > 1 else ""), file=sys.stderr)
    raise typer.Exit(1 if failures else 0)


if __name__ == "__main__":
    typer.run(main)
