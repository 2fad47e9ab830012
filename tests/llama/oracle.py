"""What a cache must hold after any operations: tokens, positions, and which of them must still have exact rows."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

ROLLBACK = 64  # LLAMA_KVTC_ROLLBACK


@dataclass(eq=False)
class Cell:
    token: int
    pos: int
    seqs: set[int]
    exact: bool = True  # has been a sink or within the window and its margin ever since it was computed


@dataclass
class Oracle:
    """A cache of `n_seq` sequences that share one list of cells (unified) or have one of `size` cells each."""

    n_seq: int
    unified: bool
    size: int
    sink: int
    window: int
    cells: list[list[Cell]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cells = [[] for _ in range(1 if self.unified else self.n_seq)]

    def stream(self, seq: int) -> int:
        return 0 if self.unified else seq

    def of(self, seq: int) -> list[Cell]:
        """The cells of a sequence, by position."""
        return sorted((c for c in self.cells[self.stream(seq)] if seq in c.seqs), key=lambda c: c.pos)

    def range(self, seq: int) -> tuple[int, int]:
        cells = self.of(seq)
        return (cells[0].pos, cells[-1].pos) if cells else (-1, -1)

    def room(self, seq: int) -> int:
        return self.size - len(self.cells[self.stream(seq)])

    def settle(self) -> None:
        """Drops cells of no sequence, and remembers which exact rows have lost their claim to a place."""
        for n, cells in enumerate(self.cells):
            self.cells[n] = [c for c in cells if c.seqs and c.pos >= 0]
        last = {seq: self.range(seq)[1] for seq in range(self.n_seq)}
        for cells in self.cells:
            for c in cells:
                near = any(last[seq] - c.pos < self.window + ROLLBACK for seq in c.seqs)
                c.exact &= c.pos < self.sink or (self.window > 0 and near)

    def certain(self, seq: int) -> bool:
        """Every sink, and every token in the window of the next one, surely has its exact row."""
        last = self.range(seq)[1]
        return all(c.exact for c in self.of(seq) if c.pos < self.sink or last + 1 - c.pos < self.window)

    def unique(self, seq: int) -> bool:
        """No two tokens share a position, so that a fresh computation can have them."""
        positions = [c.pos for c in self.of(seq)]
        return len(set(positions)) == len(positions)

    def decode(self, rows: list[tuple[int, int, int]]) -> None:
        for token, pos, seq in rows:
            self.cells[self.stream(seq)].append(Cell(token, pos, {seq}))
        self.settle()

    def rm(self, seq: int, p0: int, p1: int) -> None:
        for c in self.of(seq):
            if p0 <= c.pos < p1:
                c.seqs.discard(seq)
        self.settle()

    def cp(self, src: int, dst: int) -> None:
        if self.unified:
            for c in self.of(src):
                c.seqs.add(dst)
        elif src != dst:
            self.cells[dst] = [Cell(c.token, c.pos, {dst}, c.exact) for c in self.of(src)]
        self.settle()

    def keep(self, seq: int) -> None:
        for c in self.cells[self.stream(seq)]:
            c.seqs &= {seq}
        self.settle()

    def add(self, seq: int, p0: int, shift: int) -> None:
        for c in self.of(seq):
            if c.pos >= p0:
                c.pos += shift
        self.settle()

    def save(self, seq: int) -> list[Cell]:
        last = self.range(seq)[1]
        copies = [copy.deepcopy(c) for c in self.of(seq)]
        for c in copies:
            c.exact &= c.pos < self.sink or (self.window > 0 and last - c.pos < self.window + ROLLBACK)
        return copies

    def restore(self, saved: list[Cell], seq: int) -> None:
        for c in self.of(seq):
            c.seqs.discard(seq)
        self.settle()
        self.cells[self.stream(seq)] += [Cell(c.token, c.pos, {seq}, c.exact) for c in saved]
        self.settle()
