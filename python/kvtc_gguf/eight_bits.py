"""Exact rows of a saved state in 8 bits: a step for each row, and how many of it each value is.

The layout is stated in `ggml_kvtc/README.md`, "Stored states"; the other reader is
`ggml_kvtc/llama/llama-kvtc-container.cpp`.
"""

from __future__ import annotations

import numpy as np

from kvtc_gguf.reference_rows import CODE, HALF, Run

STEP = 2  # bytes of a row before its values: the step as f16
MOST, ZERO = 127, 128  # steps to either side, and the byte of no step


def runs(n: int) -> list[Run]:
    """How a row of n values is made of fields."""
    return [Run(16, HALF, 1), Run(8, CODE, n)]


def narrow(rows: np.ndarray) -> np.ndarray:
    """Rows u8 [n, 2 + d] of rows u8 [n, 2 d] that hold f16; the largest value is 127 steps.

    Raises ValueError for NaN or infinity.
    """
    values = np.ascontiguousarray(rows).view("<f2").astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("rows that are not finite have no 8 bits")
    step = (np.abs(values).max(axis=1, keepdims=True) / MOST).astype("<f2")
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(step > 0, np.rint(values / step.astype(np.float32)), 0)
    codes = (np.clip(steps, -MOST, MOST) + ZERO).astype(np.uint8)
    return np.concatenate([step.view(np.uint8), codes], axis=1)


def widen(rows: np.ndarray) -> np.ndarray:
    """The f16 rows u8 [n, 2 d] of rows u8 [n, 2 + d]."""
    step = np.ascontiguousarray(rows[:, :STEP]).view("<f2").astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged step
        values = (step * (rows[:, STEP:].astype(np.float32) - ZERO)).astype("<f2")
    return values.view(np.uint8)
