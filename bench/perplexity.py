"""Running llama-perplexity and reading what it prints: KLD, PPL and top-1 agreement against an f16 cache."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Bits per value of the stock types, scales included (ggml's block layouts).
STOCK_BPV = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5}
PAIR = re.compile(r"kvtc-k(\d)v(\d)")
KVTC_SIZES = re.compile(
    r"(?P<bpv>[\d.]+) bpv, codes\s+(?P<codes>[\d.]+) MiB, exact rows\s+(?P<exact>[\d.]+) MiB.*?"
    r"\bbases\s+(?P<bases>[\d.]+) MiB"
)
TRACE = "4"  # the verbosity at which the library says how large its caches are


class RunError(Exception):
    """llama-perplexity failed or printed nothing usable; the message is one line for the user."""


@dataclass(frozen=True)
class Cache:
    """A cache type as a user names it (``q8_0`` for both sides, or ``kvtc-k2v4``) and its exact tokens."""

    name: str
    sink: int = 0
    window: int = 0

    @property
    def types(self) -> tuple[str, str]:
        """The types of K and V, as ``--cache-type-k`` and ``--cache-type-v`` take them."""
        pair = PAIR.fullmatch(self.name)
        return (f"kvtc{pair[1]}", f"kvtc{pair[2]}") if pair else (self.name, self.name)

    @property
    def bpv(self) -> float:
        """Nominal bits per value, mean of K and V; gains and scales count, exact tokens do not."""
        bits = [float(kind[4:]) if kind.startswith("kvtc") else STOCK_BPV[kind] for kind in self.types]
        return sum(bits) / 2

    @property
    def arguments(self) -> list[str]:
        """The command line flags that select this cache."""
        if PAIR.fullmatch(self.name):
            exact = ["--kvtc-sink", str(self.sink), "--kvtc-window", str(self.window)]
            return ["--cache-type", self.name, *exact]
        key, value = self.types
        return ["--cache-type-k", key, "--cache-type-v", value, "--flash-attn", "on"]


@dataclass(frozen=True)
class Statistics:
    """What one run measured: KLD in nats per token, top1 in percent, kv_mib (MiB) at the run's context."""

    ppl: float
    kld: float
    kld_p999: float
    top1: float
    kv_mib: float
    bpv: float | None  # as the run's log says; None for stock types


def parse_statistics(log: str) -> Statistics:
    """Read the closing summary of ``llama-perplexity --kl-divergence``.

    Raises:
        RunError: a figure is missing or is not a finite number.
    """
    patterns = {
        "ppl": r"^Mean PPL\(Q\)\s*:\s*(\S+)",
        "kld": r"^Mean\s+KLD:\s*(\S+)",
        "kld_p999": r"^99\.9%\s+KLD:\s*(\S+)",
        "top1": r"^Same top p:\s*(\S+)",
    }
    figures: dict[str, float] = {}
    for name, pattern in patterns.items():
        found = re.search(pattern, log, re.MULTILINE)
        try:
            figures[name] = float(found[1]) if found else float("nan")
        except ValueError:
            figures[name] = float("nan")
        if figures[name] != figures[name] or abs(figures[name]) == float("inf"):
            raise RunError(f"llama-perplexity printed no usable '{name}'")
    return Statistics(kv_mib=parse_kv_mib(log), bpv=parse_bpv(log), **figures)


def parse_kv_mib(log: str) -> float:
    """MiB that the caches of a run take: K and V tensors, and for kvtc the exact tokens and the bases.

    llama.cpp prints a line for each cache (two with sliding windows), kvtc one more that adds what is beside the codes,
    ``llama_kv_cache: size = 11.95 MiB (…)`` and ``…: B bpv, codes X MiB, exact rows Y MiB (…), bases Z MiB``; the codes
    are the tensors of the first line.

    Raises:
        RunError: no such line.
    """
    sizes = re.findall(r"llama_kv_cache: size =\s*([\d.]+) MiB", log)
    if not sizes:
        raise RunError("llama-perplexity did not print the size of its KV cache")
    beside = [float(line[part]) for line in KVTC_SIZES.finditer(log) for part in ("exact", "bases")]
    return sum(map(float, sizes)) + sum(beside)


def parse_bpv(log: str) -> float | None:
    """Bits per value that kvtc says its caches take (None in a log of a stock type); several caches are averaged."""
    lines = [(float(line["bpv"]), float(line["codes"])) for line in KVTC_SIZES.finditer(log)]
    values = sum(codes / bpv for bpv, codes in lines)
    return sum(codes for _, codes in lines) / values if values else None


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

    def save_base(self) -> None:
        """Write the logits that every other run is compared with, those of an f16 cache."""
        self._run(Cache("f16"), ["--kl-divergence-base", str(self.base)])

    def measure(self, cache: Cache) -> Statistics:
        """Compare ``cache`` with the saved logits. Raises RunError when the run fails."""
        return parse_statistics(self._run(cache, ["--kl-divergence-base", str(self.base), "--kl-divergence"]))

    def _run(self, cache: Cache, extra: list[str]) -> str:
        command = [str(self.binary), "-m", str(self.model), "-f", str(self.text), "-lv", TRACE]
        command += [
            "-c",
            str(self.ctx),
            "-b",
            str(self.ctx),
            "--chunks",
            str(self.chunks),
            *cache.arguments,
            *extra,
            *self.more,
        ]
        if self.threads:
            command += ["-t", str(self.threads)]
        # Stock types are measured as users get them: with llama.cpp's Hadamard rotation.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_ARG_", "LLAMA_ATTN_ROT"))}
        try:
            result = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environment
            )
        except OSError as error:
            raise RunError(f"{self.binary}: {error.strerror}; run `make build`") from error
        log = result.stdout + result.stderr
        if result.returncode != 0:
            raise RunError(f"llama-perplexity failed with cache type {cache.name}: {_reason(log)}")
        return log


def _reason(log: str) -> str:
    """The line of a failed run's log that is most likely to say why."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [
        line for line in lines if re.search(r"error|\bE\b|failed|unsupported|invalid|abort", line, re.IGNORECASE)
    ]
    return (telling or lines or ["no output"])[0 if telling else -1][:300]
