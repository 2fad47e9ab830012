"""Nsight Compute's figures of our kernels: what a command line asks for, and a table of what it prints."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator

# column, metric, factor from the base unit that ncu prints with `--print-units base`
METRICS = (
    ("us", "gpu__time_duration.sum", 1e-3),
    ("gb_per_s", "dram__bytes.sum.per_second", 1e-9),
    ("dram_percent", "dram__throughput.avg.pct_of_peak_sustained_elapsed", 1.0),
    ("tensor_percent", "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", 1.0),
    ("issue_percent", "smsp__issue_active.avg.pct_of_peak_sustained_active", 1.0),
    ("occupancy_percent", "sm__warps_active.avg.pct_of_peak_sustained_active", 1.0),
    ("registers", "launch__registers_per_thread", 1.0),
    ("shared_kib", "launch__shared_mem_per_block", 1 / 1024),
)
KERNELS = "decode_cells|combine|attend|rebuild|classify_tiles|copy_mask|either|merge_chunks|transform_and_write|write_"
COLUMNS = ("kernel", "grid", "block", *(name for name, _, _ in METRICS))


def arguments(launches: int) -> list[str]:
    """ncu's arguments before the command: our kernels alone, the first `launches` of them, as CSV."""
    metrics = ",".join(metric for _, metric, _ in METRICS)
    return ["--csv", "--print-units", "base", "--clock-control", "none", "--metrics", metrics,
            "-k", f"regex:{KERNELS}", "-c", str(launches)]  # fmt: skip


def short_name(name: str) -> str:
    """A kernel's name without its namespaces, arguments and return type."""
    return re.sub(r"\(anonymous namespace\)::|<unnamed>::|kvtc::|^void ", "", name).split("(")[0]


def parse(log: str) -> list[tuple]:
    """A row of `COLUMNS` for each kernel and grid, of its last launch, since the first ones meet cold caches.

    Raises:
        ValueError: the log holds no kernel.
    """
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for line in _lines(log):
        key = short_name(line["Kernel Name"]), line.get("Grid Size", ""), line.get("Block Size", "")
        for column, metric, factor in METRICS:
            if line["Metric Name"] == metric:
                value = line["Metric Value"].replace(",", "")
                found.setdefault(key, {})[column] = float(value) * factor if value[:1].isdigit() else float("nan")
    if not found:
        reasons = [text for text in log.splitlines() if "ERROR" in text or "==ERROR==" in text]
        raise ValueError(reasons[0].strip() if reasons else "ncu printed no kernel")
    return [
        (*key, *(round(values.get(name, float("nan")), 3) for name, _, _ in METRICS)) for key, values in found.items()
    ]


def _lines(log: str) -> Iterator[dict[str, str]]:
    """ncu's table: programs that it runs print between its lines."""
    quoted = [line for line in log.splitlines() if line.startswith('"')]
    for line in csv.DictReader(quoted):
        if line.get("Kernel Name") and line.get("Metric Name") and line.get("Metric Value") is not None:
            yield line
