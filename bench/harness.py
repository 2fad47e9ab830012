"""What all measurements of a bench share: which cells there are and which are still to be measured, and their rows."""

from __future__ import annotations

import dataclasses
import datetime
import fnmatch
import hashlib
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rich.console import Console

from bench.caches import Cache
from bench.engine import Engine, MissingTool, Output, run_tool
from bench.gpu_memory import watched
from bench.heldout import EvalText
from bench.logs import TRACE, RunError, Sizes, parse_sizes
from bench.machine import Machine
from bench.matrix import Matrix, Test, wants
from bench.results import Figure, Results, number

F16 = Cache("f16")
PAD = 256  # tokens to which llama.cpp rounds a context up


@dataclass(frozen=True)
class Subject:
    """A model file and the name that tables give it."""

    name: str
    path: Path

    @cached_property
    def sha256(self) -> str:
        return sha256(self.path)

    @cached_property
    def calibration(self) -> str:
        """12 hex digits of the file beside the model; "" where there is none (it may be embedded)."""
        beside = self.path.with_name(f"{self.path.stem}.kvtc.gguf")
        return sha256(beside)[:12] if beside.is_file() else ""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Variant:
    """What is measured beside others: a model with a cache on an engine."""

    engine: Engine
    model: Subject
    cache: Cache

    def __str__(self) -> str:
        return f"{self.engine.name} {self.model.name} {self.cache.label}"


@dataclass
class Bench:
    """A matrix, the engines that it is measured on, and where the results go."""

    matrix: Matrix
    engines: list[Engine]
    results: Results
    machine: Machine
    text: EvalText
    work: Path  # logits and logs
    console: Console
    threads: int
    redo: bool = False
    only: str = "*"
    new: list[dict[str, str]] = field(default_factory=list)  # cells measured by this run
    base: tuple[Engine, str, str] | None = None  # engine, model_sha256 and setting of the logits in base_file
    _sizes: dict[tuple[Variant, int], Sizes | RunError] = field(default_factory=dict)

    @cached_property
    def text_name(self) -> str:
        """The text's title and what tells it from another of that title."""
        return f"{self.text.title} ({sha256(self.text.path)[:8]})"

    @property
    def base_file(self) -> Path:
        """The logits of the f16 cache that quality is compared with: gigabytes with a large vocabulary."""
        return self.work / "base.kld"

    def drop_base(self) -> None:
        self.base_file.unlink(missing_ok=True)
        self.base = None

    def variants(self, model: Subject, test: Test) -> list[Variant]:
        """In the order in which they are measured: engines side by side, so that a pair of them lies close in time."""
        return [
            Variant(engine, model, entry.cache)
            for entry in self.matrix.caches
            if wants(test.caches, entry.cache.label)
            for engine in self.engines
            if wants(test.engines, engine.name) and wants(entry.engines, engine.name)
        ]

    def cell(self, variant: Variant, test: str, setting: str, depth: int) -> dict[str, str]:
        """What identifies a measurement, as columns of the results."""
        return {
            "cpu": self.machine.cpu,
            "gpu": self.machine.gpu if variant.engine.on_gpu else "",
            "threads": str(self.threads),
            "engine": variant.engine.name,
            "build": variant.engine.build,
            "model": variant.model.name,
            "model_sha256": variant.model.sha256,
            "calibration": variant.model.calibration if variant.cache.calibrated else "",
            "cache": variant.cache.label,
            "test": test,
            "setting": setting,
            "depth": str(depth),
        }

    def pending(self, cell: dict[str, str]) -> bool:
        """True if the cell is to be measured: asked for, and without a result of this build, model and calibration."""
        name = "/".join(cell[x] for x in ("engine", "model", "cache", "test", "depth"))
        if not fnmatch.fnmatchcase(name.lower(), self.only.lower()):
            return False
        done = any(all(cell[x] == new[x] for x in cell) for new in self.new)
        return not done and (self.redo or not self.results.of(cell))

    def record(self, variant: Variant, cell: dict[str, str], figures: list[Figure], sizes: Sizes | None,
               error: str = "") -> None:  # fmt: skip
        """Write a cell's figures, or its error, with all that is known of the variant."""
        key, value = variant.cache.types
        facts = {"type_k": key, "type_v": value, "rotation": "" if variant.cache.rotation else "none"}
        facts |= {"sinks": _count(variant.cache.sink), "window": _count(variant.cache.window)}
        if sizes:  # what the run did, not what it was asked for
            facts |= {"type_k": sizes.type_k or key, "type_v": sizes.type_v or value}
            facts |= {"sinks": _count(sizes.sink or 0), "window": _count(sizes.window or 0)}
            facts |= {"rotation": sizes.rotation or facts["rotation"], "bytes": str(round(sizes.cache * 2**20))}
        facts["bpv"] = number(self.bpv(variant, sizes))
        about = {
            "date": datetime.date.today().isoformat(),
            "commit": variant.engine.commit,
            "upstream": variant.engine.upstream,
            "machine": self.machine.name,
        }
        self.results.put({**about, **cell, **facts}, figures, error)
        self.new.append(cell)
        where = f"{variant} {cell['test']} {cell['depth']}"
        told = error or ", ".join(f"{f.metric} {number(f.value)}" for f in figures)
        self.console.print(f"  {where}: {told}", markup=False, style="red" if error else None)

    def fail(self, variant: Variant, cell: dict[str, str], error: Exception | str) -> None:
        self.record(variant, cell, [], None, " ".join(str(error).split()))

    def run(self, variant: Variant, names: tuple[str, ...], arguments: list[object], log: str) -> Output:
        """Run one of an engine's tools on a variant, with the matrix's own arguments. Raises RunError."""
        binary = variant.engine.tool(*names)
        words = ["-m", variant.model.path, *variant.cache.arguments, "-t", self.threads, *arguments]
        words += self.more(binary.stem)
        return run_tool(binary, words, variant.cache.environment, self.matrix.limit, self.log(variant, log))

    def more(self, tool: str) -> tuple[str, ...]:
        """The matrix's arguments for a tool."""
        return self.matrix.arguments.get("all", ()) + self.matrix.arguments.get(tool, ())

    def setting(self, told: str, tool: str, test: Test) -> str:
        """What a cell's figures depend on besides its own columns: the test's options, and arguments of the matrix."""
        return " ".join(word for word in (told, *self.more(tool), *test.arguments) if word)

    def log(self, variant: Variant, name: str) -> Path:
        return self.work / "logs" / (re.sub(r"[^\w.+-]+", "_", f"{variant} {name}") + ".log")

    def sizes(self, variant: Variant, tokens: int) -> Sizes:
        """The cache of a context of so many tokens, from a run that evaluates a word; asked once for each.

        Raises:
            RunError: the engine does not take the cache; MissingTool: it has no tool that could tell.
        """
        tokens = -(-tokens // PAD) * PAD
        if (variant, tokens) not in self._sizes:
            arguments = ["-c", tokens, "-p", "a", "-n", 1, "-no-cnv", "--no-warmup", "-lv", TRACE]
            try:
                with watched(0.2) if variant.engine.on_gpu else nullcontext() as peak:
                    output = self.run(variant, ("llama-completion", "llama-cli"), arguments, f"memory {tokens}")
                found = dataclasses.replace(parse_sizes(output.log), device=peak.mib if peak else None)
                self._sizes[variant, tokens] = found
            except RunError as error:
                self._sizes[variant, tokens] = error
        found = self._sizes[variant, tokens]
        if isinstance(found, RunError):
            raise found
        return found

    def known_sizes(self, variant: Variant, tokens: int) -> Sizes | None:
        """The same, None where no tool tells. Raises RunError where the engine does not take the cache."""
        try:
            return self.sizes(variant, tokens)
        except MissingTool:
            return None

    def bpv(self, variant: Variant, sizes: Sizes | None) -> float | None:
        """Bits per value: as the log says, else as the type's layout does, else by the bytes of an f16 cache."""
        if sizes and sizes.bpv:
            return sizes.bpv
        if variant.cache.bpv or not sizes:
            return variant.cache.bpv
        try:
            own, f16 = (self.sizes(dataclasses.replace(variant, cache=c), PAD) for c in (variant.cache, F16))
        except RunError:
            return None
        return 16 * own.codes / f16.codes


def _count(tokens: int | None) -> str:
    return "" if tokens is None else str(tokens)


def planned(
    bench: Bench, variants: list[Variant], test: str, setting: str, depth: int
) -> Iterator[tuple[Variant, dict]]:
    """The variants, with their cells, that are still to be measured."""
    for variant in variants:
        cell = bench.cell(variant, test, setting, depth)
        if bench.pending(cell):
            yield variant, cell
