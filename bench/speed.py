"""llama-bench: running it, reading its JSONL, and pairs of repetitions that were measured next to each other."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """One test of llama-bench: tokens a second, the median of its repetitions, and their standard deviation."""

    model: str
    kind: str  # cache type as `--types` names it
    test: str  # "pp512", "tg32"
    depth: int
    tokens_per_second: float
    stddev: float


def parse_bench(lines: str, model: str, kind: str) -> list[Speed]:
    """The rows of `llama-bench -o jsonl`. Raises ValueError when there is none or one lacks a figure.

    Medians: the first repetition of a prompt on a GPU takes up to a third longer than the rest.
    """
    rows = []
    for line in lines.splitlines():
        if not line.startswith("{"):
            continue
        try:
            x = json.loads(line)
            test = f"pp{x['n_prompt']}" if x["n_prompt"] else f"tg{x['n_gen']}"
            middle_ts = statistics.median(float(sample) for sample in x["samples_ts"])
            rows.append(Speed(model, kind, test, int(x["n_depth"]), middle_ts, float(x["stddev_ts"])))
        except (json.JSONDecodeError, KeyError, TypeError, statistics.StatisticsError) as error:
            raise ValueError(f"llama-bench printed a row that cannot be read: {line[:80]}") from error
    if not rows:
        raise ValueError("llama-bench printed no row")
    return rows


def paired(samples: list[float], base: list[float]) -> list[float]:
    """Ratios of repetitions with the same number, which ran next to each other; slow drift cancels in them."""
    return [a / b for a, b in zip(samples, base, strict=False) if b > 0]


def middle(samples: list[float]) -> tuple[float, float | None]:
    """Median and standard deviation (None for a single sample)."""
    return statistics.median(samples), statistics.stdev(samples) if len(samples) > 1 else None
