"""Trellis-coded values in a simulator: ``python -m bench.trellis`` tells what codes beyond scalar ones would gain.

A vector of d components becomes d * bits bits, as it does now; component i is decoded from a window of `memory` bits
that ends with its own, by one table of 2^memory levels for all components (a bit-shift trellis, closed to a ring, as
in QTIP, arXiv 2406.11235). Reading stays random access: a byte or two at a bit offset, one look-up. Writing is a
search (Viterbi): 2^memory * 2^bits additions and comparisons a component, twice since the ring has to close.
Relative mean square error is for a unit Gaussian, which Hadamard-rotated values nearly are.
"""

from __future__ import annotations

import time

import numpy as np
import typer

SCALAR = {2: 0.11748, 3: 0.03455}  # Lloyd-Max
ITERATIONS = 12


def viterbi(
    x: np.ndarray, table: np.ndarray, bits: int, ring: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(states i64 [N, d], relative cost [N]) of the best path for each vector x f32 [N, d]; table f32 [2^memory].

    State after step i: the last `memory` bits. ring i64 [N]: the low memory - bits bits of the state before the first
    step and of the last; None: both are free.
    """
    n, d = x.shape
    branches, inner = 1 << bits, table.size >> bits
    cost = np.zeros((n, table.size), np.float32)
    if ring is not None:
        cost[np.arange(table.size) % inner != ring[:, None]] = np.inf
    came = np.empty((d, n, inner), np.uint8)
    for i in range(d):
        before = cost.reshape(n, branches, inner)  # predecessors of state s: s >> bits with any highest bits
        came[i] = before.argmin(axis=1)
        cost = np.repeat(before.min(axis=1), branches, axis=1) + np.square(x[:, i, None] - table)
    if ring is not None:
        cost[np.arange(table.size) % inner != ring[:, None]] = np.inf
    state = cost.argmin(axis=1)
    total, path, rows = cost.min(axis=1), np.empty((n, d), np.int64), np.arange(n)
    for i in range(d - 1, -1, -1):
        path[:, i] = state
        state = (state >> bits) + came[i, rows, state >> bits].astype(np.int64) * inner
    return path, total


def encode(x: np.ndarray, table: np.ndarray, bits: int) -> np.ndarray:
    """States i64 [N, d] of paths that close to a ring: where they may close is searched from half way round."""
    inner, half = table.size >> bits, x.shape[1] // 2
    turned, _ = viterbi(np.roll(x, half, axis=1), table, bits)
    return viterbi(x, table, bits, turned[:, half - 1] % inner)[0]


def train(bits: int, memory: int, d: int, samples: int = 2048, seed: int = 0) -> np.ndarray:
    """A table f32 [2^memory] for the unit Gaussian: means of what the paths give each entry, from a random start."""
    rng = np.random.default_rng(seed)
    table = rng.permutation(np.sort(rng.standard_normal((64, 1 << memory)), axis=1).mean(axis=0)).astype(np.float32)
    for _ in range(ITERATIONS):
        x = rng.standard_normal((samples, d)).astype(np.float32)
        path, _ = viterbi(x, table, bits)
        count = np.bincount(path.ravel(), minlength=table.size)
        total = np.bincount(path.ravel(), weights=x.ravel(), minlength=table.size)
        table = np.where(count > 0, total / np.maximum(count, 1), table).astype(np.float32)
    return table


def main(
    d: int = typer.Option(64, help="components of a vector"), samples: int = typer.Option(1024, help="vectors judged")
) -> None:
    """Print the error of trellis codes of 2 and 3 bits beside Lloyd-Max's, and what reading and writing take."""
    print("| bits | memory | relative error | over scalar | table, bytes of f16 | additions to write a component |")
    print("|---|---|---|---|---|---|")
    x = np.random.default_rng(1).standard_normal((samples, d)).astype(np.float32)
    for bits in (2, 3):
        for memory in (4, 6, 8, 10):
            started = time.process_time()
            table = train(bits, memory, d)
            error = float(np.square(x - table[encode(x, table, bits)]).mean())
            cells = f"{error:.4f} | {error / SCALAR[bits]:.3f} | {2 << memory} | {2 << (memory + bits)}"
            print(f"| {bits} | {memory} | {cells} |", f" {time.process_time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    typer.run(main)
