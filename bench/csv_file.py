"""The bench's tables as CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kvtc_gguf.gguf_io import replacing


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, object] | Sequence[object]]) -> None:
    """Write a table, UTF-8 with a line end of one byte, whole or not at all.

    A row is a sequence in the columns' order, or a mapping of which the columns are taken; what it lacks stays empty.
    """
    names = list(columns)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([row.get(n, "") for n in names] if isinstance(row, Mapping) else row for row in rows)
