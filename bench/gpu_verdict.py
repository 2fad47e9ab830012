"""What a GPU's figures say of the targets; pure functions of the tables that `bench.gpu_check` leaves."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.speed import Speed

DEEP, DEEPEST = 16384, 131072
# base, test, least depth, wanted: tokens a second over those of the base type
SPEEDS = (
    ("f16", "tg", DEEP, 1.0),
    ("f16", "tg", DEEPEST, 1.3),
    ("q8_0", "tg", 0, 1.0),
    ("q4_0", "tg", 0, 1.0),
    ("f16", "pp", 0, 0.95),
)
OVER_FLOOR, LESS_MEMORY, SCRATCH, SAME_KLD = 2.5, 5.0, 256.0, 0.02


@dataclass(frozen=True)
class Target:
    """One target of one model; met: None where nothing was measured that tells."""

    model: str
    name: str
    met: bool | None = None
    text: str = ""

    @property
    def verdict(self) -> str:
        return {True: "met", False: "NOT met", None: "not run"}[self.met]


def ratios(rows: list[Speed], base: str = "f16") -> dict[Speed, float]:
    """Tokens a second over those of the base type, for each row whose base was measured."""
    known = {(r.model, r.test, r.depth): r.tokens_per_second for r in rows if r.kind == base}
    keys = {row: known.get((row.model, row.test, row.depth)) for row in rows}
    return {row: row.tokens_per_second / value for row, value in keys.items() if value}


def speeds(rows: list[Speed], model: str) -> list[Target]:
    """Decoding at least f16's speed from 16k on and 1.3 of it at 128k, at least q8_0's and q4_0's everywhere; prompts
    at least 0.95 of f16's. Of each type the depth where it does worst."""
    found = []
    for base, test, lowest, wanted in SPEEDS:
        name = f"{test} >= {wanted} x {base}" + (f" from {lowest} on" if lowest else "")
        least: dict[str, tuple[float, int]] = {}
        for row, x in ratios(rows, base).items():
            if row.model == model and row.test.startswith(test) and row.depth >= lowest and row.kind.startswith("kvtc"):
                least[row.kind] = min(least.get(row.kind, (x, row.depth)), (x, row.depth))
        found.append(of_types(model, name, least, lambda x, wanted=wanted: x >= wanted))
    return found


def of_types(model: str, name: str, worst: dict[str, tuple[float, int]], good: Callable[[float], bool]) -> Target:
    """A target of several cache types from the worst figure of each, and the depth where it was."""
    if not worst:
        return Target(model, name)
    bad = {kind: x for kind, x in worst.items() if not good(x[0])}
    told = ", ".join(f"{kind.removeprefix('kvtc-')} {x:.2f} at {depth}" for kind, (x, depth) in worst.items())
    return Target(model, name, not bad, f"{len(worst) - len(bad)} of {len(worst)} types: {told}")


def floors(rows: Iterable[dict[str, str]], model: str) -> list[Target]:
    """The attention operation at 128k within 2.5 times its floor, of one token and of a prompt."""
    found: dict[str, dict[str, tuple[float, int]]] = {"1": {}, "512": {}}
    for row in rows:
        if row["shape"] == model and int(row["depth"]) == DEEPEST and row["type"].startswith("k"):
            found[row["tokens"]][row["type"]] = float(row["over_floor"]), DEEPEST
    names = {tokens: f"attention of {tokens} <= {OVER_FLOOR} x floor" for tokens in found}
    return [of_types(model, names[tokens], found[tokens], lambda x: x <= OVER_FLOOR) for tokens in found]


def memories(rows: Iterable[dict[str, str]], model: str) -> list[Target]:
    """The cache at most a fifth of f16's; scratch: what k2v4's process has beside weights, cache and llama.cpp's
    buffers, less what f16's has, which is the driver's share and the kernels'."""
    names = f"cache <= f16's / {LESS_MEMORY:.0f}", f"scratch <= {SCRATCH:.0f} MiB"
    of = {row["type"]: row for row in rows if row["model"] == model}
    if not {"f16", "kvtc-k2v4"} <= set(of):
        return [Target(model, name) for name in names]
    ours, f16 = of["kvtc-k2v4"], of["f16"]
    less = float(f16["cache_mib"]) / float(ours["cache_mib"])
    told = f"{float(ours['cache_mib']):.0f} MiB, f16 {float(f16['cache_mib']):.0f}: {less:.2f} times less"
    found = [Target(model, names[0], less >= LESS_MEMORY, told)]
    if not ours["rest_mib"] or not f16["rest_mib"]:
        return [*found, Target(model, names[1])]
    more = float(ours["rest_mib"]) - float(f16["rest_mib"])
    whole = [float(x["device_mib"]) for x in (ours, f16)]
    told = f"{more:.0f} MiB more than f16's; the process {whole[0]:.0f}, f16's {whole[1]:.0f}"
    return [*found, Target(model, names[1], more <= SCRATCH, told)]


def qualities(rows: list[dict[str, str]], models: list[str]) -> list[Target]:
    """KLD on the device within 2% of the CPU's, batched and one token at a time."""
    found = []
    for model in models or ["SmolLM2, gemma3"]:
        for batch in ("512", "1"):
            name, row = f"KLD within {SAME_KLD:.0%} of the CPU's, -ub {batch}", [
                r for r in rows if r["model"] == model and r["ubatch"] == batch
            ]  # fmt: skip
            if not row:
                found.append(Target(model, name))
                continue
            change = float(row[0]["change"])
            told = f"{float(row[0]['kld_device']):.5f}, CPU {float(row[0]['kld_cpu']):.5f} ({change:+.1%})"
            found.append(Target(model, name, abs(change) <= SAME_KLD, told))
    return found


def steps(states: dict[str, tuple[str, str]], names: dict[str, str]) -> list[Target]:
    """Targets that a step's state answers. states: (state, text) by step; names: the targets' by step."""
    found = []
    for step, name in names.items():
        state, text = states.get(step, ("not run", "not asked for"))
        found.append(Target("all", name, {"ok": True, "failed": False}.get(state), text))
    return found


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table, none where it is not there."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_speeds(path: Path) -> list[Speed]:
    return [
        Speed(r["model"], r["type"], r["test"], int(r["depth"]), float(r["tokens_per_second"]), float(r["stddev"]))
        for r in read_rows(path)
    ]
