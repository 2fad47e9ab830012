"""Attention over a kvtc cache in f64: one softmax over cells that are exact for some queries and coded for others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kvtc_gguf.format import SideCalibration
from kvtc_gguf.reference import decode_rows
from kvtc_gguf.reference_rope import Rope, Turns


@dataclass
class CodedCells:
    """K or V of every cell of a kvtc cache, as transformed vectors."""

    side: SideCalibration
    coded: np.ndarray  # f32 [cells, H, d], what the cache rows decode to
    exact: np.ndarray | None = None  # f16 [cells, H, d], the side store
    has_exact: np.ndarray | None = None  # bool [cells], whether the side store holds the cell

    @classmethod
    def of_rows(
        cls,
        side: SideCalibration,
        budget_index: int,
        rows: np.ndarray,
        exact: np.ndarray | None = None,
        has_exact: np.ndarray | None = None,
    ) -> CodedCells:
        """From cache rows u8 [cells, row_bytes] and the side store."""
        return cls(side, decode_rows(side, budget_index, rows), exact, has_exact)

    def vectors(self, z: np.ndarray) -> np.ndarray:
        """f64 [cells, H, d]: decode @ z + mean."""
        decode = self.side.decode.astype(np.float64)
        return np.einsum("hdc,nhc->nhd", decode, z.astype(np.float64), optimize=True) + self.side.mean


@dataclass
class PlainCells:
    """K (after RoPE) or V of every cell of an ordinary cache."""

    values: np.ndarray  # f32 [cells, H, d]


def attention(
    q: np.ndarray,
    keys: CodedCells | PlainCells,
    values: CodedCells | PlainCells,
    *,
    query_positions: np.ndarray,
    cell_positions: np.ndarray,
    mask: np.ndarray,
    scale: float,
    rope: Rope | Turns | None = None,
    sinks: int = 4,
    window: int = 128,
    softcap: float = 0.0,
    sink_logits: np.ndarray | None = None,
    slopes: np.ndarray | None = None,
) -> np.ndarray:
    """Attention output f64 [T, n_head, d_v] of queries q f32 [T, n_head, d_k] that RoPE has rotated already.

    query_positions i32 [T], cell_positions i32 [cells], mask [T, cells] added to the logits (-inf hides a cell), times
    the head's ALiBi slope where slopes [n_head] are given. rope None: the model stores keys as they are.
    softcap 0: none. sink_logits [n_head]: a logit without a value in every softmax of the head.
    A query that sees nothing gives zeros.

    Cell j counts as exact for query i when its exact z is there and pos_i - pos_j < window or pos_j < sinks.
    """
    near = (query_positions[:, None].astype(np.int64) - cell_positions < window) | (cell_positions < sinks)
    key_kinds, value_kinds = _kinds(keys, near), _kinds(values, near)
    if rope is not None and isinstance(keys, CodedCells):
        key_kinds = [(rope.rotate(k, cell_positions), use) for k, use in key_kinds]
    n_query, n_head, _ = q.shape
    group = n_head // key_kinds[0][0].shape[1]
    result = np.zeros((n_query, n_head, value_kinds[0][0].shape[2]))
    for head in range(n_head):
        logits = np.zeros((n_query, len(cell_positions)))
        for k, use in key_kinds:
            logits = np.where(use, q[:, head].astype(np.float64) @ k[:, head // group].T, logits)
        logits *= scale
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        logits += mask.astype(np.float64) * (1.0 if slopes is None else float(slopes[head]))
        weights = softmax(logits, None if sink_logits is None else float(sink_logits[head]))
        for v, use in value_kinds:
            result[:, head] += np.where(use, weights, 0) @ v[:, head // group]
    return result


def span_mask(query_positions: np.ndarray, cell_positions: np.ndarray, span: int) -> np.ndarray:
    """Mask f64 [T, cells] of what positions alone hide: a query i32 [T] sees a cell i32 [cells] that is not empty (-1),
    not after it, and less than `span` positions before it."""
    distance = query_positions[:, None].astype(np.int64) - cell_positions
    sees = (cell_positions >= 0) & (distance >= 0) & (distance < span)
    return np.where(sees, 0.0, -np.inf)


def softmax(logits: np.ndarray, sink: float | None = None) -> np.ndarray:
    """Softmax over the last axis, f64; `sink` is one more logit that takes its share; all -inf gives zeros."""
    top = logits.max(axis=-1, keepdims=True, initial=-math.inf if sink is None else sink)
    top = np.where(np.isfinite(top), top, 0)
    weights = np.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink - top)
    return weights / np.where(total > 0, total, 1)


def alibi_slopes(n_head: int, max_bias: float) -> np.ndarray:
    """Slope of each head, f64 [n_head], as ggml's flash attention derives it from max_bias."""
    n = 1 << (n_head.bit_length() - 1)
    first, second = 2.0 ** (-max_bias / n), 2.0 ** (-max_bias / 2 / n)
    return np.array([first ** (h + 1) if h < n else second ** (2 * (h - n) + 1) for h in range(n_head)])


def _kinds(cells: CodedCells | PlainCells, near: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Versions of the cells' vectors [cells, H, d], each with the (query, cell) pairs bool [T, cells] it counts for."""
    if isinstance(cells, PlainCells):
        return [(cells.values.astype(np.float64), np.ones_like(near))]
    coded = cells.vectors(cells.coded)
    if cells.exact is None:
        return [(coded, np.ones_like(near))]
    held = np.ones(len(coded), bool) if cells.has_exact is None else cells.has_exact
    exact = cells.vectors(np.where(held[:, None, None], cells.exact, 0))
    return [(coded, ~(near & held)), (exact, near & held)]
