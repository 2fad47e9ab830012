"""Bit allocation: how many bits each group of 8 components gets, over all kv heads of a layer together."""

from __future__ import annotations

import numpy as np

from kvtc_gguf.layout import GAIN_BYTES, HEAD_ALIGN, WIDTHS, head_bytes, payload_bytes


def allocate(error: np.ndarray, budget: int) -> np.ndarray:
    """Widths i8 [H, G] of least summed error among those that spend at most `budget` bytes a row: the exact optimum.

    error [H, G, len(WIDTHS)]: measured error of each group at each width, in units that add up over groups and heads.
    Widths never rise along the groups of a head (the format's rule), so groups come sorted by falling error.
    Dynamic programming, first over the groups of each head, then over heads, whose payloads are padded to 4 bytes
    but for the last; gains are counted. Raises ValueError when the budget cannot hold the gain bytes.
    """
    heads, groups, _ = error.shape
    _check_gains(heads, groups, budget)
    tables = [_head_table(e) for e in error.astype(np.float64)]
    # best[h][b]: least error of heads 0 ... h in at most b bytes; size[h][b]: bytes that head h takes of them
    best, sizes = np.zeros(budget + 1), []
    for h, (cost, _) in enumerate(tables):
        size = np.arange(len(cost)) + GAIN_BYTES
        if h < heads - 1:
            size = -(-size // HEAD_ALIGN) * HEAD_ALIGN
        total, chosen = np.full(budget + 1, np.inf), np.zeros(budget + 1, np.int64)
        for spent in np.flatnonzero((size <= budget) & np.isfinite(cost)):
            here = best[: budget + 1 - size[spent]] + cost[spent]
            better = here < total[size[spent] :]
            total[size[spent] :][better] = here[better]
            chosen[size[spent] :][better] = spent
        best = total
        sizes.append((size, chosen))
    widths, left = np.zeros((heads, groups), np.int8), budget
    for h in range(heads - 1, -1, -1):
        size, chosen = sizes[h]
        spent = int(chosen[left])
        widths[h] = _head_widths(tables[h][1], spent)
        left -= int(size[spent])
    return widths


def _head_table(error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cost, step) of one head, error [G, W]: cost[s] is the least error of widths that take s bytes.

    step[g, k, s]: index of the width of group g - 1 where groups 0 ... g take s bytes and group g has width WIDTHS[k].
    """
    groups, kinds = error.shape
    size = groups * WIDTHS[-1] + 1
    step = np.zeros((groups, kinds, size), np.int8)
    cost = np.full((kinds, size), np.inf)
    cost[-1, 0] = 0.0  # before the first group: any width may follow
    for g in range(groups):
        # the widths before are at least this one: the running minimum from the widest down
        wide = np.full(size, np.inf)
        source = np.zeros(size, np.int8)
        following = np.full((kinds, size), np.inf)
        for k in range(kinds - 1, -1, -1):
            better = cost[k] < wide
            wide = np.where(better, cost[k], wide)
            source = np.where(better, np.int8(k), source)
            width = WIDTHS[k]
            following[k, width:] = wide[: size - width] + error[g, k]
            step[g, k, width:] = source[: size - width]
        cost = following
    last = cost.argmin(axis=0)
    step = np.concatenate([step, last[None, None].repeat(kinds, axis=1).astype(np.int8)])
    return cost.min(axis=0), step


def _head_widths(step: np.ndarray, spent: int) -> np.ndarray:
    """The widths [G] behind `cost[spent]` of `_head_table`."""
    groups = len(step) - 1
    widths = np.zeros(groups, np.int8)
    k = int(step[groups, 0, spent])
    for g in range(groups - 1, -1, -1):
        widths[g] = WIDTHS[k]
        k, spent = int(step[g, k, spent]), spent - WIDTHS[k]
    return widths


def allocate_greedy(error: np.ndarray, budget: int) -> np.ndarray:
    """The same by always taking the largest saving per bit: a check on `allocate`, which it can reach but not beat.

    Looks ahead over several widths, because saving need not fall from step to step.
    """
    steps = np.array(WIDTHS)
    heads, groups, _ = error.shape
    _check_gains(heads, groups, budget)
    chosen = np.zeros((heads, groups), np.int64)  # indices into WIDTHS
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


def _check_gains(heads: int, groups: int, budget: int) -> None:
    if payload_bytes(np.zeros((heads, groups), np.int64)) > budget:
        raise ValueError(f"{budget} bytes a row cannot hold the gains of {heads} heads")
