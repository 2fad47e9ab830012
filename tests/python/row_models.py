"""Random row models and rows for the tests of the entropy coder, as hypothesis strategies."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from kvtc_gguf.reference_rows import CODE, HALF, MAX_TABLES, ZERO, RowModel, Run
from kvtc_gguf.row_tables import MAX_LEVEL, PROB_SUM


def runs() -> st.SearchStrategy[list[Run]]:
    code = st.tuples(st.sampled_from((1, 2, 3, 4, 5, 6, 8)), st.integers(1, 4)).map(
        lambda c: Run(c[0], CODE, c[1] if c[0] == 8 else 8 * c[1])
    )
    half = st.integers(1, 9).map(lambda n: Run(16, HALF, n))
    zero = st.integers(1, 5).map(lambda n: Run(8, ZERO, n))
    return st.lists(st.one_of(code, half, zero), min_size=1, max_size=6)


def table(rng: np.random.Generator, width: int) -> list[int]:
    """Levels [2**width], some of them zero, one sometimes alone."""
    n = 1 << width
    out = rng.integers(1, MAX_LEVEL + 1, n) if rng.integers(2) else 30 + rng.integers(-3, 4, n).cumsum() % 50
    out[rng.permutation(n)[: rng.integers(0, n)]] = 0
    return out.tolist()


def model(runs: list[Run], seed: int, most_tables: int = MAX_TABLES) -> RowModel:
    rng = np.random.default_rng(seed)
    widths = [run.table_bits for run in runs if run.table_bits for _ in range(run.count)]
    levels = {w: [table(rng, w) for _ in range(rng.integers(1, most_tables + 1))] for w in sorted(set(widths))}
    return RowModel(runs, levels, [int(rng.integers(len(levels[w]))) for w in widths])


def rows(model: RowModel, n: int, seed: int) -> np.ndarray:
    """Rows u8 [n, row_bytes] that the model can code, each field as likely as its table says."""
    rng = np.random.default_rng(seed)
    planes = np.zeros((n, 8 * model.row_bytes), np.uint8)
    bit, field = 0, 0
    for run in model.runs:
        for _ in range(run.count):
            if run.table_bits:
                own = model.tables[run.table_bits][model.index[field]]
                values = rng.choice(len(own), n, p=own / PROB_SUM)
                if run.kind == HALF:
                    values = values << 8 | rng.integers(0, 256, n)
                planes[:, bit : bit + run.bits] = values[:, None] >> np.arange(run.bits) & 1
                field += 1
            bit += run.bits
    return np.packbits(planes, axis=1, bitorder="little")
