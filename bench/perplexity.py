"""Running llama-perplexity and reading what it prints: KLD, PPL and top-1 agreement against an f16 cache."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from bench.caches import Cache
from bench.engine import run_tool
from bench.logs import TRACE, RunError, Sizes, parse_sizes

SUMMARY = {
    "ppl": r"^Mean PPL\(Q\)\s*:\s*",
    "kld": r"^Mean\s+KLD:\s*",
    "kld_p999": r"^99\.9%\s+KLD:\s*",
    "top1": r"^Same top p:\s*",
}


@dataclass(frozen=True)
class Statistics:
    """What one run measured: KLD in nats per token, top1 in percent, with the standard errors that it prints."""

    ppl: float
    kld: float
    kld_p999: float
    top1: float
    sizes: Sizes
    errors: dict[str, float]  # of ppl, kld and top1

    @property
    def kv_mib(self) -> float:
        """MiB of the cache at the run's context, all parts."""
        return self.sizes.cache

    @property
    def bpv(self) -> float | None:
        """As the run's log says; None for stock types."""
        return self.sizes.bpv


def parse_statistics(log: str) -> Statistics:
    """Read the closing summary of ``llama-perplexity --kl-divergence``.

    Raises:
        RunError: a figure is missing or is not a finite number.
    """
    figures: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name, label in SUMMARY.items():
        found = re.search(label + r"(\S+)(?:\s+±\s+(\S+))?", log, re.MULTILINE)
        value = _number(found[1]) if found else math.nan
        if not math.isfinite(value):
            raise RunError(f"llama-perplexity printed no usable '{name}'")
        figures[name] = value
        if found and found[2] and math.isfinite(error := _number(found[2])):
            errors[name] = error
    return Statistics(sizes=parse_sizes(log), errors=errors, **figures)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


@dataclass(frozen=True)
class Perplexity:
    """One model and text to measure; the logits of the f16 cache are kept in ``base`` between runs."""

    binary: Path
    model: Path
    text: Path
    base: Path
    ctx: int = 1024  # tokens; also the batch, so that the cache holds one sequence
    chunks: int = 8
    threads: int | None = None  # None: llama.cpp's choice
    more: tuple[str, ...] = ()  # further arguments, of the base and of every run: a device, -ub
    limit: float | None = None  # seconds of one run

    def save_base(self, log: Path | None = None) -> None:
        """Write the logits that every other run is compared with, those of an f16 cache."""
        self._run(Cache("f16"), ["--kl-divergence-base", str(self.base)], log)

    def measure(self, cache: Cache, log: Path | None = None) -> Statistics:
        """Compare ``cache`` with the saved logits. Raises RunError when the run fails."""
        return parse_statistics(self._run(cache, ["--kl-divergence-base", str(self.base), "--kl-divergence"], log))

    def _run(self, cache: Cache, extra: list[str], log: Path | None) -> str:
        arguments = ["-m", self.model, "-f", self.text, "-lv", TRACE, "-c", self.ctx, "-b", self.ctx]
        arguments += ["--chunks", self.chunks, *cache.arguments, *extra, *self.more]
        arguments += ["-t", self.threads] if self.threads else []
        try:
            return run_tool(self.binary, arguments, cache.environment, self.limit, log).log
        except RunError as error:
            raise type(error)(f"cache type {cache.name}: {error}") from error
