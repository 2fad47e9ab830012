"""What changed between two results files by more than its spread."""

from __future__ import annotations

import math

from bench.verdict import NOISE, SIGMA

KEY = ("engine", "model", "cache", "test", "setting", "depth", "metric")
EXACT = 0.001  # of sizes, which logs round to a hundredth of a MiB
BETTER = {"t/s": 1, "ratio": 1, "share": 1, "%": 1, "MiB": -1, "nats/token": -1, "": -1}  # by unit: up or down


def changes(old: list[dict[str, str]], new: list[dict[str, str]]) -> list[str]:
    """A line for each figure that moved by more than two combined spreads, each one gone, and each new failure.

    Figures without a spread: 5%, sizes 0.1%. Tokens a second are compared on the same machine and threads only; ratios
    always are.
    """
    before = {tuple(row[x] for x in KEY): row for row in old if row["value"]}
    after = {tuple(row[x] for x in KEY): row for row in new if row["value"]}
    failed = {tuple(row[x] for x in KEY[:-1]): row["error"] for row in new if not row["value"]}
    lines, elsewhere = [], 0
    for key, row in before.items():
        where = _where(key)
        if key not in after:
            why = failed.get(key[:-1])
            lines.append(f"{where}: {f'now fails: {why}' if why else 'is no longer there'}")
        elif row["unit"] == "t/s" and any(row[x] != after[key][x] for x in ("cpu", "gpu", "threads")):
            elsewhere += 1
        elif line := _change(row, after[key]):
            lines.append(f"{where}: {line}")
    if elsewhere:
        lines.append(f"{elsewhere} speeds are of another machine or number of threads and were not compared")
    return lines


def _where(key: tuple[str, ...]) -> str:
    engine, model, cache, test, _, depth, metric = key
    return f"{engine} {model} {cache} {test} {metric} at {depth}"


def _change(old: dict[str, str], new: dict[str, str]) -> str:
    a, b = float(old["value"]), float(new["value"])
    spreads = [float(row["spread"]) for row in (old, new) if row["spread"]]
    spread = math.hypot(*spreads) if len(spreads) == 2 else 0.0
    limit = SIGMA * spread or (EXACT if new["unit"] == "MiB" else NOISE) * abs(a)
    if abs(b - a) <= limit:
        return ""
    better = (b - a) * BETTER.get(new["unit"], 1) > 0
    share = f" ({(b - a) / a:+.1%})" if a else ""
    return f"{a:g} -> {b:g} {new['unit']}{share}, {'better' if better else 'worse'}; within {limit:.3g} is noise"
