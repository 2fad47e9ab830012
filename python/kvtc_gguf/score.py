"""What an error in a key or a value costs: the change of attention's output through W_o, on real attention.

Mean square error of the vectors themselves misleads. For keys only what queries see of it counts, and only where they
look; for values random error averages out over the attended tokens, bias does not. Only tokens count that a cache would
hold as codes when the query reads them (outside sinks and window).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvtc_gguf.capture import LayerSample
from kvtc_gguf.layout import GAIN_STEPS
from kvtc_gguf.rotation import rotate, rotation

SINKS, WINDOW = 4, 128  # the cache's defaults
ROW_STEP = 4  # every 4th query row is enough to tell the members apart
FLOOR = 0.1  # share of the plain average in the weights of `importance`
PAIRS_DRAWN = 4096  # (query, key) pairs of a chunk and query head that stand for all, in the metric of key errors
UNBIASED, KEEP_NORM = 0, 1


@dataclass(frozen=True)
class Attention:
    """Attention probabilities f32 [n_head, R, T] of R query rows; coded bool [R, T]: the key is read from codes."""

    probability: np.ndarray
    coded: np.ndarray

    def far(self, head: int) -> np.ndarray:
        """Probabilities f32 [R, T] of one query head, zero on the exact tokens (sinks and window)."""
        return self.probability[head] * self.coded


@dataclass(frozen=True)
class Importance:
    """How much errors count, see `importance`: keys, values f32 [T, H] by token; metric f64 [H, d, d] of key errors."""

    keys: np.ndarray
    values: np.ndarray
    metric: np.ndarray


def query_rows(tokens: int) -> np.ndarray:
    """The query rows that stand for all of a chunk, i64 [R]: all that have coded keys in reach, thinned out."""
    return np.arange(SINKS + WINDOW, tokens, ROW_STEP)


def attend(sample: LayerSample, softcap: float = 0.0) -> Attention:
    """Attention of the rows of `query_rows`."""
    tokens, n_head, _ = sample.q_rope.shape
    heads = sample.k_rope.shape[1]
    rows = query_rows(tokens)
    distance = rows[:, None] - np.arange(tokens)
    seen = (distance >= 0) & ((distance < sample.window) | (sample.window == 0))
    out = np.empty((n_head, len(rows), tokens), np.float32)
    for i in range(n_head):
        logits = sample.q_rope[rows, i] @ sample.k_rope[:, i // (n_head // heads)].T
        if softcap > 0:
            logits = softcap * np.tanh(logits / softcap)
        logits = np.where(seen, logits, -np.inf)
        weight = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[i] = weight / weight.sum(axis=1, keepdims=True)
    return Attention(out, (distance >= WINDOW) & (np.arange(tokens) >= SINKS))


def importance(sample: LayerSample, attention: Attention, gram: np.ndarray, pairs: np.ndarray) -> Importance:
    """Weights of tokens and the metric of key errors, from the derivative of attention.

    An error e_ij in the logit of query i and key j moves the output by p_ij e_ij (v_j - o_i): it costs
    w_ij = p_ij |W_o (v_j - o_i)|^2. (Independent errors would make it p_ij^2; p_ij measured better, as the errors of
    similar keys add up.) keys: sum over queries of w_ij; values: of p_ij^2; both of mean 1 for each head. metric:
    second moment, weighted by w_ij, of the queries as key j meets them, rotated back by the RoPE of j: e . metric e is
    the mean square logit error that e makes. All keep FLOOR of the unweighted average (of the metric, its diagonal by
    RoPE pair): text unlike the corpus attends to other tokens. pairs i64 [n, 2]: see `capture.rope_pairs`.
    """
    n_head, _, tokens = attention.probability.shape
    heads, d = sample.k.shape[1:]
    rows = query_rows(tokens)
    turn = rotation(sample, pairs)
    keys, values = np.zeros((tokens, heads), np.float32), np.zeros((tokens, heads), np.float32)
    metric, total = np.zeros((heads, d, d)), np.zeros(heads)
    for i in range(n_head):
        h = i // (n_head // heads)
        far, v, w_o = attention.far(i), sample.v[:, h], gram[i].astype(np.float32)
        o = far @ v
        moved = v @ w_o
        distance = (moved * v).sum(axis=1) + ((o @ w_o) * o).sum(axis=1)[:, None] - 2 * (o @ moved.T)
        cost = far * np.maximum(distance, 0.0)
        keys[:, h] += cost.sum(axis=0)
        values[:, h] += np.square(far).sum(axis=0)
        row, key, mass = _draw(cost)
        met = rotate(sample.q_rope[rows[row], i], turn[key].conj(), pairs)
        metric[h] += mass / PAIRS_DRAWN * (met.T @ met).astype(np.float64)
        total[h] += mass
    plain = uniform(sample, attention, gram, pairs).metric
    keys /= np.maximum(keys.mean(axis=0), 1e-30)
    values /= np.maximum(values.mean(axis=0), 1e-30)
    metric = (1 - FLOOR) * metric / np.maximum(total, 1e-30)[:, None, None] + FLOOR * plain
    floored = [((1 - FLOOR) * a + FLOOR).astype(np.float32) for a in (keys, values)]
    return Importance(*floored, metric)


def _draw(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """PAIRS_DRAWN indices (row, column) in proportion to weight [R, T], evenly along its running sum, and its total."""
    running = np.cumsum(weight.ravel(), dtype=np.float64)
    total = float(running[-1])
    place = np.searchsorted(running, (np.arange(PAIRS_DRAWN) + 0.5) / PAIRS_DRAWN * total)
    return *np.divmod(np.minimum(place, running.size - 1), weight.shape[1]), total


def uniform(sample: LayerSample, attention: Attention, gram: np.ndarray, pairs: np.ndarray) -> Importance:
    """Every key and every query alike: the plain second moments that the recipe was first measured with."""
    tokens, heads, d = sample.k.shape
    square = np.square(sample.q_rope, dtype=np.float64).mean(axis=0).reshape(heads, -1, d).mean(axis=1)
    square[:, pairs] = square[:, pairs].mean(axis=2, keepdims=True)
    ones = np.ones((tokens, heads), np.float32)
    return Importance(ones, ones, np.stack([np.diag(s) for s in square]))


def value_cost(probability: np.ndarray, error: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Sum over query rows of |W_o (attention @ error)|^2, summed over the query heads of one kv head: f64 [M].

    probability f32 [G, R, T], zero on exact tokens; error [T, M, d] (M alternatives); gram [G, d, d] = W_o^T W_o of
    each query head.
    """
    tokens, members, d = error.shape
    total = np.zeros(members)
    for far, metric in zip(probability, gram, strict=True):
        out = (far @ error.reshape(tokens, members * d)).reshape(-1, members, d)
        total += np.einsum("rmd,rmd->m", out @ metric, out, dtype=np.float64)
    return total


def key_cost(
    queries: np.ndarray,
    probability: np.ndarray,
    coded: np.ndarray,
    error: np.ndarray,
    values: np.ndarray,
    gram: np.ndarray,
) -> np.ndarray:
    """Sum over query rows of |W_o (o' - o)|^2, o' attending with wrong keys: f64 [M], as in `value_cost`.

    queries f32 [R, G, d] and error [T, M, d] after RoPE; probability f32 [G, R, T], of all tokens; coded bool [R, T];
    values f32 [T, d]. (The slope of a softcap is left out: it is 1 where attention is spread.)
    """
    tokens, members, d = error.shape
    total = np.zeros(members)
    flat = np.ascontiguousarray(error.transpose(1, 0, 2)).reshape(members * tokens, d)
    for g in range(len(probability)):
        shift = (queries[:, g] @ flat.T).reshape(len(queries), members, tokens) * coded[:, None]
        changed = probability[g][:, None] * np.exp(np.minimum(shift, 60.0))
        changed /= changed.sum(axis=2, keepdims=True)
        out = (changed - probability[g][:, None]) @ values
        total += np.einsum("rmd,rmd->m", out @ gram[g], out, dtype=np.float64)
    return total


def reconstruct(
    z: np.ndarray, norm: np.ndarray, books: list[np.ndarray | None], rule: int, gain_base: float
) -> np.ndarray:
    """z_hat f32 [T, d] after coding z [T, d] with its whitened norm [T, 1]; books: levels per component, None: width 0.

    Same steps as the format's encoder (ggml_kvtc/README.md), in plain f32.
    """
    coded = coded_directions(z / norm, books)
    power = np.einsum("td,td->t", z, z)
    if rule == KEEP_NORM:
        gain = np.sqrt(power / np.maximum(np.einsum("td,td->t", coded, coded), 1e-20))
    else:
        dot = np.einsum("td,td->t", z, coded)
        gain = np.where(dot > 0, power / np.maximum(dot, 1e-20), 0.0)
    code = np.clip(np.rint(GAIN_STEPS * np.log2(np.maximum(gain, 1e-30) / gain_base)), 1, 255)
    return coded * np.where(gain > 0, gain_base * 2.0 ** (code / GAIN_STEPS), 0.0)[:, None].astype(np.float32)


def coded_directions(y: np.ndarray, books: list[np.ndarray | None]) -> np.ndarray:
    """Coded levels f32 [T, d] of unit-norm vectors y [T, d]."""
    y = np.ascontiguousarray(y.T)
    coded = np.zeros_like(y)
    for c, book in enumerate(books):
        if book is not None:
            coded[c] = book[np.searchsorted((book[1:] + book[:-1]) / 2, y[c])]
    return coded.T
