"""The store of exact rows. Failures caught: memory that grows with the context or with use, a log that
says another size than is allocated, slots that do not follow the number of sequences.
"""

from __future__ import annotations

import re

import driver
import pytest
from driver import Context, text

SINK, WINDOW, ROLLBACK, N_SEQ = 4, 16, 64, 8
HEADS, HEAD_DIM, F16 = 2, 64, 2  # of the model `one`; bytes of a value


def sizes(log: str) -> tuple[float, int]:
    """(MiB of exact rows, slots) as the log of a new context has them."""
    found = re.findall(r"exact rows ([\d.]+) MiB \(4 sinks, window 16, rollback 64, (\d+) slots\)", log)
    assert len(found) == 1, log
    return float(found[0][0]), int(found[0][1])


@pytest.mark.parametrize("n_ctx", [2048, 16384])
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_exact_rows_take_what_sinks_and_windows_of_all_sequences_take(one, unified, n_ctx):
    """Whatever the context's length: 8 * (sinks + window + rollback) rows of K and V; and the log says so."""
    driver.log.clear()
    context = Context(one, n_seq=N_SEQ, unified=unified, n_ctx=n_ctx, sink=SINK, window=WINDOW)
    mib, slots = sizes("".join(driver.log))
    context.close()
    expected = N_SEQ * (SINK + WINDOW + ROLLBACK)
    assert slots == expected
    assert mib == pytest.approx(expected * 2 * HEADS * HEAD_DIM * F16 / 2**20, abs=0.005)
    print(f"{'unified' if unified else 'streams'}, -np {N_SEQ}, context {n_ctx}: {slots} slots, {mib} MiB")


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_saved_exact_rows_are_bounded_however_the_cache_is_used(one, unified):
    """A state holds no more rows than there are slots, after many tokens in all sequences, copies and rollbacks."""
    context = Context(one, n_seq=N_SEQ, unified=unified, n_ctx=4096 if unified else 512 * N_SEQ)
    codes = HEADS * HEAD_DIM * (2 + 4) // 8
    for seq in range(N_SEQ):
        context.decode(text(200, seq), context.range(seq)[1] + 1, seq)
        for n in range(5):
            last = context.range(seq)[1]
            context.rm(seq, last - 9, -1)
            context.decode(text(10, n), last - 9, seq)
        if seq + 1 < N_SEQ:
            context.cp(seq, seq + 1)
            context.decode([9], context.range(seq)[1] + 1, seq)
            context.rm(seq + 1, 30, -1)
        n_cells = context.range(seq)[1] + 1
        limit = (SINK + WINDOW + ROLLBACK) * 2 * HEADS * HEAD_DIM * F16 + n_cells * (codes + 64) + 4096
        assert len(context.save(seq)) <= limit, seq
    context.close()
