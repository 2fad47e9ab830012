"""Containers that `tests/fuzz/states.cpp` begins with: `python tests/fuzz/seeds.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import row_models
import states
from kvtc_gguf.reference_rows import CODE, ZERO, Run
from kvtc_gguf.state_file import BLOCK, MODEL, PLAIN, RANS, Record, Section, container_bytes

WIDTHS = (1, 2, 3, 4, 5, 6, 8)  # of codes
FEW = 3  # tables of a width: else most of a small container would be tables of bytes

PLAINS = [Record(PLAIN, data=data) for data in (b"positions", b"type and row size")]


def of_width(bits: int) -> Section:
    """70 rows, two steps of the vectors and a rest, of eight codes and padding."""
    model = row_models.model([Run(bits, CODE, 8), Run(8, ZERO, 1)], bits, FEW)
    block = Record(BLOCK, RANS, n_rows=70, data=model.encode(row_models.rows(model, 70, bits)) or b"")
    return Section(Record(MODEL, RANS, data=model.to_bytes()), [block])


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    coded = states.section(3, block=2, most_tables=FEW)
    (folder / "small").write_bytes(container_bytes([PLAINS[0], coded, PLAINS[1], states.stored(2, 3)]))
    (folder / "exact").write_bytes(container_bytes([states.section(7, what=2, most_tables=FEW)]))
    (folder / "eight").write_bytes(container_bytes([states.section(7, what=3, eight=True, most_tables=FEW)]))
    for bits in WIDTHS:
        (folder / f"bits-{bits}").write_bytes(container_bytes([of_width(bits)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
