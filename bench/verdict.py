"""What a results file says in sentences: who forms the front of quality and size, and what engines differ in."""

from __future__ import annotations

import pandas as pd

from bench.frame import front, results, wide

SIGMA = 2.0  # spreads within which two figures are called equal
NOISE = 0.05  # of a ratio without a spread


def verdicts(found: pd.DataFrame) -> list[str]:
    """One sentence each, in the order quality, speed, engines; none for what was not measured."""
    return [*_fronts(found), *_speeds(found), *_engines(found)]


def _fronts(found: pd.DataFrame) -> list[str]:
    told = []
    for test in ("quality", "decode"):
        rows = results(found, test)
        if rows.empty:
            continue
        for model, cells in wide(rows).groupby("model", sort=False):
            points = cells[(cells["bpv"] < 16) & cells["kld"].notna()]
            line = ", ".join(f"{r.who} ({r.bpv:.3g} bpv, {r.kld:.4f})" for r in front(points).itertuples())
            if line:
                told.append(f"{model}, {test}: the front of KLD over bpv is {line}.")
    return told


def _speeds(found: pd.DataFrame) -> list[str]:
    told = []
    rows = results(found, "speed")
    rows = rows[rows["metric"].str.endswith("/f16")]
    for (model, who, metric), cells in rows.groupby(["model", "who", "metric"], sort=False):
        least = cells.loc[cells["value"].idxmin()]
        test = metric.partition("/")[0]
        told.append(f"{model}, {who}: {test} is at least {least.value:.2f} x f16's, at depth {least.depth:.0f}.")
    return told


def _engines(found: pd.DataFrame) -> list[str]:
    """Whether a cache that two engines have is as fast in both, and as good."""
    told = []
    for engine in list(dict.fromkeys(found["engine"])):
        rows = results(found, "speed")
        for other in dict.fromkeys(found["engine"]):
            ratios = rows[(rows["engine"] == engine) & rows["metric"].str.endswith(f"/{other}")]
            if other == "f16" or ratios.empty:
                continue
            away = ratios[[differs(r.value, 1.0, r.spread, 0.0, r.n) for r in ratios.itertuples()]]
            worst = ", ".join(f"{r.cache} {r.metric.partition('/')[0]} at {r.depth:.0f}: {r.value:.3f}"
                              for r in away.itertuples())  # fmt: skip
            told.append(f"{engine} over {other}: {len(ratios) - len(away)} of {len(ratios)} speeds are equal within "
                        f"{SIGMA:g} standard errors{f'; not {worst}' if worst else ''}.")  # fmt: skip
        told += _qualities(found, engine)
    return told


def _qualities(found: pd.DataFrame, engine: str) -> list[str]:
    """How far an engine's KLD is from the first engine's, of the caches that both have."""
    rows, first = results(found, "quality"), found["engine"].iloc[0]
    kld = rows[rows["metric"] == "kld"].pivot_table(index=["model", "cache"], columns="engine", values="value")
    if engine == first or not {engine, first} <= set(kld.columns):
        return []
    both = kld[[engine, first]].dropna()
    away = (both[engine] - both[first]).abs()
    if both.empty:
        return []
    (model, cache), worst = away.idxmax(), away.max()
    return [f"{engine} and {first}: KLD of {len(both)} caches differs by at most {worst:.5f} ({model}, {cache})."]


def differs(new: float, old: float, new_spread: float, old_spread: float, n: float = 1) -> bool:
    """True if two figures differ by more than their spread explains; n: repetitions whose median `new` is."""
    spread = (new_spread**2 / max(n, 1) + old_spread**2) ** 0.5
    if spread != spread or spread == 0:  # nan: a single repetition tells nothing of its spread
        return abs(new - old) > NOISE * abs(old)
    return abs(new - old) > SIGMA * spread
