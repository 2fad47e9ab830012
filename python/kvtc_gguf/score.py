"""The score of the competition, measured on held-out tokens.

Keys: mean square of the logit error q . (k_hat - k), from the query weights. Values: mean square error of the attention
*output* through W_o, for real attention, counting only tokens that a cache would hold as codes (outside sinks and
window). Mean square error of the vectors themselves misleads for values: random error averages out over the attended
tokens, bias does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvtc_gguf.capture import LayerSample
from kvtc_gguf.layout import GAIN_STEPS

SINKS, WINDOW = 4, 128  # the cache's defaults
ROW_STEP = 4  # every 4th query row is enough to tell the members apart
ROW_BLOCKS = 4
FLOOR = 0.1  # share of the plain average in the weights of `importance`
UNBIASED, KEEP_NORM = 0, 1


def query_rows(tokens: int) -> np.ndarray:
    """The query rows that stand for all of a chunk, i64 [R]: all that have coded keys in reach, thinned out."""
    return np.arange(SINKS + WINDOW, tokens, ROW_STEP)


def row_blocks(tokens: int) -> Iterator[tuple[slice, int]]:
    """(rows, end): slices of the query rows, and how many tokens the last of each sees: beyond, all is 0."""
    rows = query_rows(tokens)
    size = max(1, -(-len(rows) // ROW_BLOCKS))
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        yield block, int(rows[block][-1]) + 1


def far_attention(sample: LayerSample, softcap: float = 0.0) -> np.ndarray:
    """Attention probabilities f32 [n_head, R, T] of R query rows, zero on the exact tokens (sinks and window)."""
    tokens, n_head, _ = sample.q_rope.shape
    heads = sample.k_rope.shape[1]
    rows = query_rows(tokens)
    distance = rows[:, None] - np.arange(tokens)
    seen = (distance >= 0) & ((distance < sample.window) | (sample.window == 0))
    hidden = np.where(seen, np.float32(0), np.float32(-np.inf))
    far = ((distance >= WINDOW) & (np.arange(tokens) >= SINKS)).astype(np.float32)
    out = np.zeros((n_head, len(rows), tokens), np.float32)
    for i in range(n_head):
        q, k = sample.q_rope[rows, i], sample.k_rope[:, i // (n_head // heads)]
        for block, end in row_blocks(tokens):  # small pieces, in place: they stay in a core's cache
            weight = q[block] @ k[:end].T
            if softcap > 0:
                np.tanh(np.divide(weight, softcap, out=weight), out=weight)
                weight *= softcap
            weight += hidden[block, :end]
            weight -= weight.max(axis=1, keepdims=True)
            np.exp(weight, out=weight)
            weight *= 1 / weight.sum(axis=1, keepdims=True)
            np.multiply(weight, far[block, :end], out=out[i, block, :end])
    return out


@dataclass(frozen=True)
class Importance:
    """What an error in one key does to the output of attention; tokens f32 [T, H] and queries f64 [H, d], see below."""

    tokens: np.ndarray
    queries: np.ndarray


def importance(sample: LayerSample, attention: np.ndarray, gram: np.ndarray) -> Importance:
    """Weights of keys and queries from the derivative of attention.

    An error e_ij in the logit of query i and key j moves the output by p_ij e_ij (v_j - o_i): it costs
    w_ij = p_ij |W_o (v_j - o_i)|^2. (Independent errors would make it p_ij^2; p_ij measured better, as the errors of
    similar keys add up.) Only keys that are coded when query i looks at them count (`far_attention`). tokens: sum over
    queries of w_ij, of mean 1 for each head. queries: mean square of the pre-RoPE queries, weighted by the sum over
    keys. Both keep FLOOR of the unweighted average: text unlike the corpus attends to other tokens.
    Measured on SmolLM2 (f32 weights), 2-bit keys, 10k tokens, KLD: unweighted 0.0068, p^2 0.0065, p 0.0039; letting
    the heads of a layer share bits by their total cost as well: 0.0046.
    """
    n_head, _, tokens = attention.shape
    heads, d = sample.k.shape[1:]
    rows = query_rows(tokens)
    weight = np.zeros((tokens, heads), np.float32)
    square = np.zeros((heads, d))
    total = np.zeros(heads)
    for i in range(n_head):
        h = i // (n_head // heads)
        v, metric = np.ascontiguousarray(sample.v[:, h]), gram[i].astype(np.float32)
        moved = v @ metric
        of_key = np.stack([np.ones(tokens, np.float32), (moved * v).sum(axis=1)], 1)
        of_key = np.concatenate([moved, of_key], 1)
        for block, end in row_blocks(tokens):
            near = attention[i, block, :end]
            o = near @ v[:end]
            # |W_o (v_j - o_i)|^2 of all pairs as one product: -2 o . moved + |o|^2 * 1 + 1 * |v|^2
            of_query = np.stack([((o @ metric) * o).sum(axis=1), np.ones(len(o), np.float32)], 1)
            cost = np.concatenate([-2 * o, of_query], 1) @ of_key[:end].T
            np.maximum(cost, 0.0, out=cost)
            cost *= near
            weight[:end, h] += np.ones(len(o), np.float32) @ cost
            by_query = (cost @ np.ones(end, np.float32)).astype(np.float64)
            square[h] += by_query @ np.square(sample.q[rows[block], i], dtype=np.float64)
            total[h] += by_query.sum()
    plain = uniform(sample, attention, gram).queries
    weight /= np.maximum(weight.mean(axis=0), 1e-30)
    queries = (1 - FLOOR) * square / np.maximum(total, 1e-30)[:, None] + FLOOR * plain
    return Importance(((1 - FLOOR) * weight + FLOOR).astype(np.float32), queries)


def uniform(sample: LayerSample, attention: np.ndarray, gram: np.ndarray) -> Importance:
    """Every key and every query alike: the plain second moments that the recipe was first measured with."""
    tokens, heads, d = sample.k.shape
    queries = np.square(sample.q, dtype=np.float64).mean(axis=0).reshape(heads, -1, d).mean(axis=1)
    return Importance(np.ones((tokens, heads), np.float32), queries)


def output_energy(attention: np.ndarray, x: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Sum over query rows of |W_o (attention @ x)|^2, summed over the query heads of one kv head: f64 [M].

    attention [G, R, T]; x [T, M, d] (M alternatives); gram [G, d, d] = W_o^T W_o of each query head.
    """
    tokens, members, d = x.shape
    total = np.zeros(members)
    for probability, metric in zip(attention, gram, strict=True):
        out = (probability @ x.reshape(tokens, members * d)).reshape(-1, members, d)
        total += np.einsum("rmd,rmd->m", out @ metric, out, dtype=np.float64)
    return total


def reconstruct(
    z: np.ndarray, norm: np.ndarray, books: list[np.ndarray | None], rule: int, gain_base: float
) -> np.ndarray:
    """z_hat f32 [T, d] after coding z [T, d] with its whitened norm [T, 1]; books: levels per component, None: width 0.

    Same steps as the format's encoder (ggml_kvtc/README.md), in plain f32.
    """
    y = np.ascontiguousarray((z / norm).T)
    coded = np.zeros_like(y)
    for c, book in enumerate(books):
        if book is not None:
            coded[c] = book[np.searchsorted((book[1:] + book[:-1]) / 2, y[c])]
    coded = coded.T
    power = np.einsum("td,td->t", z, z)
    if rule == KEEP_NORM:
        gain = np.sqrt(power / np.maximum(np.einsum("td,td->t", coded, coded), 1e-20))
    else:
        dot = np.einsum("td,td->t", z, coded)
        gain = np.where(dot > 0, power / np.maximum(dot, 1e-20), 0.0)
    code = np.clip(np.rint(GAIN_STEPS * np.log2(np.maximum(gain, 1e-30) / gain_base)), 1, 255)
    return coded * np.where(gain > 0, gain_base * 2.0 ** (code / GAIN_STEPS), 0.0)[:, None].astype(np.float32)
