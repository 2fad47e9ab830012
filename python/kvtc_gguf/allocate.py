"""Bit allocation: how many bits each group of 8 components gets, over all kv heads of a layer together."""

from __future__ import annotations

import numpy as np

from kvtc_gguf.layout import HEAD_ALIGN, WIDTHS, head_bytes, payload_bytes


def allocate(error: np.ndarray, budget: int) -> np.ndarray:
    """Widths i8 [H, G] that spend at most `budget` bytes a row and leave little error.

    error [H, G, len(WIDTHS)]: measured error of each group at each width, in units that add up over groups and heads.
    Greedy on the error saved per bit; looks ahead over several widths, because saving need not fall from step to step.
    Widths never rise along the groups of a head (the format's rule), so groups come sorted by falling error.
    Raises ValueError when the budget cannot hold the gain bytes.
    """
    steps = np.array(WIDTHS)
    heads, groups, _ = error.shape
    chosen = np.zeros((heads, groups), np.int64)  # indices into WIDTHS
    if payload_bytes(steps[chosen]) > budget:
        raise ValueError(f"{budget} bytes a row cannot hold the gains of {heads} heads")
    now = error[:, :, 0].copy()
    while True:
        spent = steps[chosen]
        size = head_bytes(spent)[:, None, None]
        cost = steps - spent[:, :, None]
        pad = np.where(np.arange(heads) < heads - 1, HEAD_ALIGN, 1)[:, None, None]
        slack = budget - payload_bytes(spent)
        grown = (-(-(size + cost) // pad) - -(-size // pad)) * pad
        ceiling = np.concatenate([np.full((heads, 1), steps[-1]), spent[:, :-1]], axis=1)
        allowed = (cost > 0) & (grown <= slack) & (steps <= ceiling[:, :, None])
        rate = np.where(allowed, (now[:, :, None] - error) / np.maximum(cost, 1), -np.inf)
        best = int(np.argmax(rate))
        h, g, k = np.unravel_index(best, rate.shape)
        if not rate[h, g, k] > 0:
            return steps[chosen].astype(np.int8)
        chosen[h, g], now[h, g] = k, error[h, g, k]
