"""Failures caught: a table lost or half written when its rows fail, columns out of order, another line end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.csv_file import write_csv


def test_mappings_and_sequences_make_the_same_table(tmp_path: Path) -> None:
    for name, row in (("a", {"y": 2, "z": 3, "x": "1,5"}), ("b", ("1,5", 2))):
        write_csv(tmp_path / name, ("x", "y"), [row, {"x": "é"}])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == 'x,y\n"1,5",2\né,\n'.encode()


def test_rows_that_fail_leave_the_table_that_was_there(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[int, int]]:
        yield 1, 2
        raise ValueError("no more")

    path = tmp_path / "table.csv"
    write_csv(path, ("x", "y"), [(3, 4)])
    with pytest.raises(ValueError, match="no more"):
        write_csv(path, ("x", "y"), rows())
    assert path.read_text() == "x,y\n3,4\n" and list(tmp_path.iterdir()) == [path]
