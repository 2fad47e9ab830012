"""The numpy twin of `ggml_kvtc/kvtc-rows*.cpp`: entropy coding of rows that are all laid out alike.

The format is stated in `ggml_kvtc/README.md`, "Stored states"; the coder is static rANS (Duda, arXiv 1311.2540).
From the same model both give the same bytes. Written for reading: 32 values a step, not for states of real sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from kvtc_gguf.layout import FormatError
from kvtc_gguf.row_tables import (
    PROB_BITS,
    PROB_SUM,
    BitReader,
    BitWriter,
    frequencies,
    multiply,
    read_index,
    read_table,
    write_index,
    write_table,
)

LANES = 32
MAX_TABLES = 64  # that the fields of one width share
MAX_ROW = 65536  # bytes
MAX_CODED = 32768  # coded fields of a row
LOW = 1 << 16  # states live in [LOW, 2**32)
CODE, HALF, ZERO = 0, 1, 2  # kinds of fields
JOIN = {1: 8, 2: 4, 3: 2, 4: 2}  # fields of so many bits that make a column


@dataclass(frozen=True)
class Run:
    """`count` fields of `bits` bits each, one behind the other."""

    bits: int
    kind: int
    count: int

    @property
    def table_bits(self) -> int:
        """Width of the coded part of a field, 0 where none is coded."""
        return {CODE: self.bits, HALF: 8, ZERO: 0}[self.kind]

    @property
    def bytes(self) -> int:
        return self.bits * self.count // 8

    def check(self) -> None:
        """Raise FormatError unless the run is in range."""
        widths = {CODE: (1, 2, 3, 4, 5, 6, 8), HALF: (16,), ZERO: (8,)}.get(self.kind, ())
        if self.bits not in widths or not 0 < self.count < 65536 or self.bits * self.count % 8:
            raise FormatError(f"row model: no run of {self.count} fields of kind {self.kind} and {self.bits} bits")


@dataclass(frozen=True)
class Column:
    """One symbol of the coder: neighbouring fields of a run, together at most 8 bits, or a byte kept as it is."""

    bit: int  # where it begins in the row
    bits: int
    frequencies: np.ndarray | None  # i64 [2**bits], summing to PROB_SUM; None: kept as it is


@dataclass
class RowModel:
    """How rows are made of fields, and how often each value of a field occurs."""

    runs: list[Run]
    levels: dict[int, list[list[int]]]  # width -> tables, each 2**width levels (`row_tables`)
    index: list[int]  # of each coded field in row order: its table among those of its width
    _joint: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict, repr=False)

    @cached_property
    def tables(self) -> dict[int, list[np.ndarray]]:
        """width -> frequencies i64 [2**width] each, summing to PROB_SUM."""
        return {width: [frequencies(table) for table in tables] for width, tables in self.levels.items()}

    @property
    def row_bytes(self) -> int:
        return sum(run.bytes for run in self.runs)

    @property
    def widths(self) -> list[int]:
        """Of each coded field in row order."""
        return [run.table_bits for run in self.runs if run.table_bits for _ in range(run.count)]

    @cached_property
    def columns(self) -> list[Column]:
        columns, bit, at = [], 0, 0
        for run in self.runs:
            done = 0
            while run.table_bits and done < run.count:
                n = min(JOIN.get(run.bits, 1), run.count - done)
                if run.kind == HALF:
                    columns.append(Column(bit, 8, None))
                columns.append(
                    Column(bit + run.bits * n - n * run.table_bits, n * run.table_bits, self._join(run, at, n))
                )
                done, at, bit = done + n, at + n, bit + n * run.bits
            bit += 0 if run.table_bits else 8 * run.bytes
        return columns

    def _join(self, run: Run, at: int, n: int) -> np.ndarray:
        key = (run.table_bits, *self.index[at : at + n])
        if key not in self._joint:
            table = self.tables[run.table_bits][key[1]]
            for i in key[2:]:
                table = multiply(table, self.tables[run.table_bits][i])
            self._joint[key] = table
        return self._joint[key]

    def to_bytes(self) -> bytes:
        """The model as the container holds it."""
        out = BitWriter()
        out.put(len(self.runs), 16)
        for run in self.runs:
            top = run.count.bit_length() - 1  # of this the upper bit is known
            out.put(run.bits, 5)
            out.put(run.kind, 2)
            out.put(top, 4)
            out.put(run.count & ((1 << top) - 1), top)
        for width in sorted(set(self.widths)):
            tables = self.levels[width]
            out.put(len(tables) - 1, 6)
            for table in tables:
                write_table(out, table)
            write_index(out, [i for i, w in zip(self.index, self.widths, strict=True) if w == width], len(tables))
        return out.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> RowModel:
        """Raises FormatError unless the bytes are those of a model."""
        bits, runs = BitReader(data), list[Run]()
        for _ in range(bits.get(16)):
            width, kind, top = bits.get(5), bits.get(2), bits.get(4)
            runs.append(Run(width, kind, 1 << top | bits.get(top)))
            runs[-1].check()
        coded = sum(run.count for run in runs if run.table_bits)
        if not 0 < sum(run.bytes for run in runs) <= MAX_ROW or coded > MAX_CODED:
            raise FormatError("row model: a row of that size is out of range")
        model = cls(runs, {}, [0] * coded)
        widths = np.array(model.widths, np.int64)
        for width in sorted(set(model.widths)):
            n_tables = 1 + bits.get(6)
            model.levels[width] = [read_table(bits, 1 << width) for _ in range(n_tables)]
            places = np.flatnonzero(widths == width)
            for place, i in zip(places, read_index(bits, len(places), n_tables), strict=True):
                model.index[place] = i
        bits.end()
        return model

    def _held(self, n_rows: int) -> int:
        """Values of the last column that the first states hold, those of its last rows."""
        return min(n_rows, 2 * LANES) if self.columns else 0

    def encode(self, rows: np.ndarray) -> bytes | None:
        """The block of rows u8 [n, row_bytes], or None if a row has a value that the model gives no frequency."""
        values = _values(self, rows)
        if not np.array_equal(_rows(self, values, len(rows)), rows):
            return None  # padding that is not zero
        stored = b"".join(v.tobytes() for v, c in zip(values, self.columns, strict=True) if c.frequencies is None)
        x = np.full(LANES, LOW, np.int64)
        words: list[np.ndarray] = []  # backwards
        held = self._held(len(rows))
        for v, column in reversed(list(zip(values, self.columns, strict=True))):
            if column.frequencies is None:
                continue
            if column is self.columns[-1]:
                v, rest = v[: len(v) - held], v[len(v) - held :].astype(np.int64)
                np.add.at(x, np.arange(held) // 2, rest << 8 * (np.arange(held) % 2))
            starts = np.cumsum(column.frequencies) - column.frequencies
            for t in reversed(range(0, len(v), LANES)):
                symbols = v[t : t + LANES]
                f, lane = column.frequencies[symbols], x[: len(symbols)]
                if (f == 0).any():
                    return None
                full = lane >> (32 - PROB_BITS) >= f
                words.append((lane[full] & 0xFFFF)[::-1])
                lane = np.where(full, lane >> 16, lane)
                x[: len(symbols)] = (lane // f << PROB_BITS) + lane % f + starts[symbols]
        tail = np.concatenate([w for w in words] or [np.zeros(0, np.int64)])[::-1]
        return stored + x.astype("<u4").tobytes() + tail.astype("<u2").tobytes()

    def decode(self, data: bytes, n_rows: int) -> np.ndarray:
        """Rows u8 [n_rows, row_bytes] of a block. Raises FormatError unless it is a whole block of so many rows."""
        n_stored = sum(c.frequencies is None for c in self.columns) * n_rows
        if len(data) < n_stored + 4 * LANES or (len(data) - n_stored) % 2:
            raise FormatError("block of rows: too short")
        kept = iter(np.frombuffer(data, np.uint8, n_stored).reshape(-1, max(n_rows, 1)))
        x = np.frombuffer(data, "<u4", LANES, n_stored).astype(np.int64)
        words = np.frombuffer(data, "<u2", offset=n_stored + 4 * LANES).astype(np.int64)
        if (x < LOW).any():
            raise FormatError("block of rows: damaged")
        values, at = [], 0
        for column in self.columns:
            if column.frequencies is None:
                values.append(next(kept))
                continue
            places = np.repeat(np.arange(1 << column.bits), column.frequencies)
            starts = np.cumsum(column.frequencies) - column.frequencies
            out = np.zeros(n_rows, np.uint8)
            held = self._held(n_rows) if column is self.columns[-1] else 0
            for t in range(0, n_rows - held, LANES):
                lane = x[: min(LANES, n_rows - held - t)]
                place = lane & (PROB_SUM - 1)
                symbols = places[place]
                lane = column.frequencies[symbols] * (lane >> PROB_BITS) + place - starts[symbols]
                low = lane < LOW
                taken = words[at : at + int(low.sum())]
                if len(taken) < low.sum():
                    raise FormatError("block of rows: it ends too early")
                lane[low] = lane[low] << 16 | taken
                at += len(taken)
                x[: len(lane)], out[t : t + len(lane)] = lane, symbols
            rest = x[np.arange(held) // 2] >> 8 * (np.arange(held) % 2) & 255
            if (rest >= 1 << column.bits).any():
                raise FormatError("block of rows: damaged")
            np.subtract.at(x, np.arange(held) // 2, rest << 8 * (np.arange(held) % 2))
            out[n_rows - held :] = rest
            values.append(out)
        if at != len(words) or (x != LOW).any():
            raise FormatError("block of rows: damaged")
        return _rows(self, values, n_rows)


def uniform(runs: list[Run]) -> RowModel:
    """A model for which every value is as likely as any other."""
    widths = [run.table_bits for run in runs if run.table_bits for _ in range(run.count)]
    return RowModel(runs, {width: [[1] * (1 << width)] for width in set(widths)}, [0] * len(widths))


def _values(model: RowModel, rows: np.ndarray) -> list[np.ndarray]:
    """The columns u8 [n] of rows u8 [n, row_bytes]."""
    planes = np.unpackbits(rows, axis=1, bitorder="little")
    weights = 1 << np.arange(8)
    return [(planes[:, c.bit : c.bit + c.bits] @ weights[: c.bits]).astype(np.uint8) for c in model.columns]


def _rows(model: RowModel, values: list[np.ndarray], n_rows: int) -> np.ndarray:
    """The rows u8 [n, row_bytes] of columns; padding is zero."""
    planes = np.zeros((n_rows, 8 * model.row_bytes), np.uint8)
    for column, v in zip(model.columns, values, strict=True):
        planes[:, column.bit : column.bit + column.bits] = v[:, None] >> np.arange(column.bits, dtype=np.uint8) & 1
    return np.packbits(planes, axis=1, bitorder="little")
