"""The bench's CSV: one row per figure, with all that it depends on; written whole after every cell, read to go on."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from bench.csv_file import write_csv
from bench.logs import RunError

# bench/README.md says what each means
COLUMNS = (
    *("date", "engine", "commit", "upstream", "build", "machine", "cpu", "gpu", "threads", "rotation"),
    *("model", "model_sha256", "calibration", "cache", "type_k", "type_v", "sinks", "window", "bpv", "bytes"),
    *("test", "setting", "depth", "metric", "value", "unit", "spread", "n", "samples", "error"),
)
# A cell is one measurement; its rows are the figures that it gave.
CELL = ("cpu", "gpu", "threads", "engine", "model", "cache", "test", "setting", "depth")
# What a cell measured: with another of these it is measured again.
SUBJECT = ("build", "model_sha256", "calibration")


@dataclass(frozen=True)
class Figure:
    """One figure of a cell. spread: standard deviation of the repetitions, or standard error; n: how many."""

    metric: str
    value: float
    unit: str
    spread: float | None = None
    n: int | None = None
    samples: tuple[float, ...] = ()


class Results:
    """The rows of one file (None: in memory alone), by cell."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = read(path) if path and path.exists() else []

    def of(self, cell: dict[str, str]) -> list[dict[str, str]]:
        """The figures of a cell, of the same build, model and calibration; those of a failed one are none."""
        names = CELL + SUBJECT
        return [row for row in self.rows if row["value"] and all(row[name] == cell[name] for name in names)]

    def put(self, cell: dict[str, str], figures: list[Figure], error: str = "") -> None:
        """Replace a cell's rows, whatever build they are of, and write the file. No figures: a row with the error."""
        same = [index for index, row in enumerate(self.rows) if all(row[name] == cell[name] for name in CELL)]
        at = same[0] if same else len(self.rows)
        new = [{name: "" for name in COLUMNS} | cell | _text(figure) | {"error": error} for figure in figures]
        if not figures:
            new = [{name: "" for name in COLUMNS} | cell | {"error": error or "no figure"}]
        self.rows = [row for index, row in enumerate(self.rows) if index not in same]
        self.rows[at:at] = new
        if self.path:
            write(self.rows, self.path)


def _text(figure: Figure) -> dict[str, str]:
    return {
        "metric": figure.metric,
        "value": number(figure.value),
        "unit": figure.unit,
        "spread": number(figure.spread),
        "n": "" if figure.n is None else str(figure.n),
        "samples": " ".join(number(sample) for sample in figure.samples),
    }


def number(value: float | None) -> str:
    """Six digits; "" for None. Rounding may leave -0, which is 0."""
    return "" if value is None else f"{round(value, 9) + 0.0:.6g}"


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a results file.

    Raises:
        RunError: it cannot be read or has other columns.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path}: {error}") from error
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise RunError(f"{path} is no results file of the bench: it has no column '{missing[0]}'")
    if any(None in row or None in row.values() for row in rows):
        raise RunError(f"{path}: a row has more or fewer fields than there are columns")
    return rows


def write(rows: list[dict[str, str]], path: Path) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, COLUMNS, rows)
