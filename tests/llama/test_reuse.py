"""Graphs that llama.cpp uses again, token after token, into whose inputs kvtc then writes what has changed alone.
Failures caught: a cell whose new position or exact row is not told, after any of the operations on a cache; a graph's
input whose memory something else has written to.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from driver import HUGE, Context, text

N_SEQ = 3


@pytest.fixture
def pair(one):
    """contexts(...) -> two of the same kind, of which the second makes each token's graph anew."""
    made = []

    def contexts(**options: object) -> tuple[Context, Context]:
        made.append(Context(one, **options))
        os.environ["LLAMA_GRAPH_REUSE_DISABLE"] = "1"
        try:
            made.append(Context(one, **options))
        finally:
            del os.environ["LLAMA_GRAPH_REUSE_DISABLE"]
        return made[-2], made[-1]

    yield contexts
    for context in made:
        context.close()


def decode_both(contexts: tuple[Context, Context], tokens: list[int], start: int, seq: int = 0) -> None:
    """The tokens one by one; both contexts' logits must be the same numbers."""
    for i, token in enumerate(tokens):
        again, anew = (context.decode([token], start + i, seq) for context in contexts)
        assert np.array_equal(again, anew), f"logits at position {start + i} of sequence {seq} differ"


def test_exact_rows_that_tokens_lose_are_told(pair):
    """More tokens than the window and the rollback keep: each takes the row of one before, which a cut brings back."""
    contexts = pair(n_ctx=512, window=8)
    decode_both(contexts, text(160), 0)
    for context in contexts:
        context.rm(0, 80, HUGE)
    decode_both(contexts, text(20), 80)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_what_operations_change_is_told(pair, unified):
    """Single tokens between removals from the middle, shifts, copies, removals of sequences, states and clears."""
    contexts = pair(n_ctx=512 if unified else 512 * N_SEQ, n_seq=N_SEQ, unified=unified, window=8)
    rng = np.random.default_rng(7)
    saved = []

    def both(do) -> None:
        for context in contexts:
            do(context)

    def next_of(seq: int) -> int:
        return contexts[0].range(seq)[1] + 1

    decode_both(contexts, text(40), 0)
    for n in range(60):
        kind = rng.choice(["middle", "end", "shift", "copy", "drop", "save", "restore", "other", "clear", "keep"])
        end = next_of(0)
        if kind == "middle" and end > 40:
            at = int(rng.integers(6, end - 20))
            both(lambda context, at=at: context.rm(0, at, at + 3))
        elif kind == "end":
            both(lambda context, end=end: context.rm(0, max(1, end - 5), HUGE))
        elif kind == "shift" and end > 60:
            both(lambda context: context.shift(5, 20))
        elif kind == "copy":
            both(lambda context: context.rm(1, -1, HUGE))
            both(lambda context: context.cp(0, 1))
        elif kind == "drop":
            both(lambda context: context.rm(1, -1, HUGE))
            both(lambda context: context.rm(2, -1, HUGE))
        elif kind == "save":
            saved = [context.save(0) for context in contexts]
        elif kind == "restore" and saved:
            for context, state in zip(contexts, saved, strict=True):
                assert context.restore(state, 0)
        elif kind == "other":
            decode_both(contexts, text(2, n), next_of(2), 2)
        elif kind == "keep":
            both(lambda context: context.keep(0))
        elif kind == "clear" and n % 3 == 0:
            both(lambda context: context.clear())
        decode_both(contexts, text(4, 100 + n), next_of(0))
