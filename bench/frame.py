"""A results file as a pandas frame, and the names that tables and plots give its rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bench.results import read

NUMBERS = ("threads", "sinks", "window", "bpv", "bytes", "depth", "value", "spread", "n")
ORDER = ("engine", "model", "cache")


def load(path: Path) -> pd.DataFrame:
    """The rows in the order of the file; `who` names cache and, where there are several, engine.

    Raises:
        RunError: it is no results file.
    """
    return frame(read(path))


def frame(rows: list[dict[str, str]]) -> pd.DataFrame:
    """The same of rows in memory. Numbers are floats, NaN where the file has none."""
    found = pd.DataFrame(rows)
    for name in NUMBERS:
        found[name] = pd.to_numeric(found[name], errors="coerce")
    several = found["engine"].nunique() > 1
    found["who"] = [f"{r.cache} ({r.engine})" if several else r.cache for r in found.itertuples()]
    return found


def results(found: pd.DataFrame, test: str | tuple[str, ...]) -> pd.DataFrame:
    """The rows of some tests that have a value."""
    names = (test,) if isinstance(test, str) else test
    return found[found["test"].isin(names) & found["value"].notna()]


def wide(found: pd.DataFrame) -> pd.DataFrame:
    """One line a cell: metrics as columns, with `<metric>_spread` beside them; the other columns are the cell's own."""
    keys = ["engine", "model", "cache", "who", "test", "setting", "depth"]
    facts = found.drop_duplicates(keys).set_index(keys)[["type_k", "type_v", "sinks", "window", "bpv", "bytes"]]
    values = found.pivot_table(index=keys, columns="metric", values="value", sort=False)
    spreads = found.pivot_table(index=keys, columns="metric", values="spread", sort=False).add_suffix("_spread")
    return facts.join(values).join(spreads).reset_index()


def front(points: pd.DataFrame, x: str = "bpv", y: str = "kld") -> pd.DataFrame:
    """The Pareto front: points with no other at most as large and at least as good, smallest first."""
    best, kept = float("inf"), []
    for index, row in points.dropna(subset=[x, y]).sort_values([x, y]).iterrows():
        if row[y] < best:
            best = row[y]
            kept.append(index)
    return points.loc[kept]
