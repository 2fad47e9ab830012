"""How a row model's tables are written down: the numpy twin of `ggml_kvtc/kvtc-rows-tables.cpp`.

The layout is stated in `ggml_kvtc/README.md`, "Stored states".
"""

from __future__ import annotations

import numpy as np

from kvtc_gguf.layout import FormatError

PROB_BITS = 12
PROB_SUM = 1 << PROB_BITS  # of a table's frequencies
STEPS = 8  # levels to an octave
MAX_LEVEL = STEPS * (PROB_BITS - 2)  # weight PROB_SUM
RAW = 7  # in place of a Rice code's parameter: numbers of a fixed width
ZEROS_RICE = 3  # parameter for runs of zeros
MOST_SHIFT = 3  # of differences of levels
MOST_ONES = 255  # of a Rice code


class BitWriter:
    """Numbers of some bits each, from the low bit of the first byte on."""

    def __init__(self) -> None:
        self.value, self.bits = 0, 0

    def put(self, value: int, bits: int) -> None:
        self.value |= value << self.bits
        self.bits += bits

    def rice(self, value: int, k: int) -> None:
        """value >> k ones, a zero, and the low k bits."""
        self.put((1 << (value >> k)) - 1, (value >> k) + 1)
        self.put(value & ((1 << k) - 1), k)

    def to_bytes(self) -> bytes:
        return self.value.to_bytes(-(-self.bits // 8), "little")


class BitReader:
    """The same from bytes that nobody vouches for. Raises FormatError where they end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def get(self, bits: int) -> int:
        value = 0
        for i in range(bits):
            if self.at >= 8 * len(self.data):
                raise FormatError("row model: it ends too early")
            value |= (self.data[self.at >> 3] >> (self.at & 7) & 1) << i
            self.at += 1
        return value

    def rice(self, k: int) -> int:
        quotient = 0
        while self.get(1):
            quotient += 1
            if quotient > MOST_ONES:
                raise FormatError("row model: a number out of range")
        return quotient << k | self.get(k)

    def end(self) -> None:
        """Raises FormatError unless all but the last byte's padding, which is zero, has been read."""
        if -(-self.at // 8) != len(self.data) or self.get(-self.at % 8):
            raise FormatError("row model: bytes after its end")


def weight(level: int) -> int:
    """What a level stands for: 0 ... 8 themselves, then eight to an octave."""
    return level if level < STEPS else (STEPS + level % STEPS) << (level // STEPS - 1)


def settle(table: np.ndarray) -> np.ndarray:
    """The frequencies i64 with what rounding is off by, step by step as `kvtc_settle`, so that they sum to PROB_SUM."""
    out = table.copy()
    missing = PROB_SUM - int(out.sum())
    least = max(2, PROB_SUM // int((out > 0).sum()))
    while missing:
        able = np.flatnonzero(out >= least)[: abs(missing)]
        if len(able) == 0:
            least = 2
            continue
        step = 1 if missing > 0 else -1
        out[able] += step
        missing -= step * len(able)
    return out


def frequencies(levels: list[int]) -> np.ndarray:
    """Frequencies i64 in proportion to the weights of levels, one of which is above 0; what occurs keeps at least 1."""
    weights = np.array([weight(level) for level in levels], np.int64)
    total = int(weights.sum())
    return settle(np.where(weights > 0, np.maximum(1, (weights * PROB_SUM + total // 2) // total), 0))


def multiply(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Frequencies of pairs, the first value in the low bits."""
    product = (high[:, None] * low[None, :]).reshape(-1)
    return settle(np.where(product > 0, np.maximum(1, (product + PROB_SUM // 2) >> PROB_BITS), 0))


def write_table(out: BitWriter, levels: list[int]) -> None:
    """Differences of levels, halved as often as all can be, under the Rice code that suits them best."""
    pairs = [(a, b) for a, b in zip(levels, levels[1:], strict=False) if a and b]
    shift = next(s for s in range(MOST_SHIFT, -1, -1) if all((b - a) % (1 << s) == 0 for a, b in pairs))
    parts = [BitWriter() for _ in range(RAW)]
    for k, part in enumerate(parts):
        part.put(k, 3)
        part.put(shift, 2)
        at = 0
        while at < len(levels):
            if at == 0 or levels[at - 1] == 0:
                part.put(levels[at], 7)
            else:  # a level of 0 is what is nearest to it and not above
                part.rice(_zigzag((levels[at] - levels[at - 1]) >> shift), k)
            at += 1
            if levels[at - 1] == 0:
                more = 0
                while at < len(levels) and levels[at] == 0:
                    at, more = at + 1, more + 1
                part.rice(more, ZEROS_RICE)
    best = min(parts, key=lambda part: part.bits)
    out.put(best.value, best.bits)


def read_table(data: BitReader, n: int) -> list[int]:
    """n levels. Raises FormatError unless a table is there."""
    k, shift, levels = data.get(3), data.get(2), list[int]()
    while len(levels) < n:
        whole = not levels or levels[-1] == 0
        levels.append(data.get(7) if whole else max(0, levels[-1] + (_unzigzag(data.rice(k)) << shift)))
        if levels[-1] > MAX_LEVEL:
            raise FormatError("row model: a frequency out of range")
        if levels[-1] == 0:
            levels += [0] * data.rice(ZEROS_RICE)
    if len(levels) > n or not any(levels):
        raise FormatError("row model: a table of another size, or without values")
    return levels


def write_index(out: BitWriter, index: list[int], n_tables: int) -> None:
    """Which of n_tables each field has: differences to the field before, or numbers of a fixed width."""
    if n_tables == 1:
        return
    parts = [BitWriter() for _ in range(RAW + 1)]
    for k, part in enumerate(parts):
        part.put(k, 3)
        for before, i in zip([0, *index], index, strict=False):
            if k == RAW:
                part.put(i, (n_tables - 1).bit_length())
            else:
                part.rice(_zigzag(i - before), k)
    best = min([parts[RAW], *parts[:RAW]], key=lambda part: part.bits)  # of equals what C takes
    out.put(best.value, best.bits)


def read_index(data: BitReader, n: int, n_tables: int) -> list[int]:
    """The same of n fields. Raises FormatError where a table is not there."""
    if n_tables == 1:
        return [0] * n
    k, index, before = data.get(3), list[int](), 0
    for _ in range(n):
        before = data.get((n_tables - 1).bit_length()) if k == RAW else before + _unzigzag(data.rice(k))
        if not 0 <= before < n_tables:
            raise FormatError("row model: a field names a table that is not there")
        index.append(before)
    return index


def _zigzag(d: int) -> int:
    return 2 * d if d >= 0 else -2 * d - 1


def _unzigzag(v: int) -> int:
    return -(v // 2) - 1 if v & 1 else v // 2
