"""Keys weighted by something else than what their errors do to attention fail here."""

from __future__ import annotations

import numpy as np
import pytest
from kvtc_gguf import score
from kvtc_gguf.capture import LayerSample

T, H, G, D = 300, 2, 3, 16


@pytest.fixture
def sample() -> LayerSample:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((T, n, D)).astype(np.float32) for n in (H * G, H, H))
    return LayerSample(0, q, k, v, 0.3 * q, k)


@pytest.fixture
def gram() -> np.ndarray:
    rng = np.random.default_rng(1)
    w = rng.standard_normal((H * G, D, D)).astype(np.float32)
    return w.transpose(0, 2, 1) @ w


def output(sample: LayerSample, k: np.ndarray) -> np.ndarray:
    """Attention output [H * G, R, D] of the scored query rows, keys k [T, H, D]."""
    rows = score.query_rows(T)
    out = []
    for i in range(H * G):
        logits = sample.q_rope[rows, i].astype(np.float64) @ k[:, i // G].T
        logits[rows[:, None] < np.arange(T)] = -np.inf
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        out.append(p / p.sum(axis=1, keepdims=True) @ sample.v[:, i // G])
    return np.stack(out)


def test_importance_tells_which_keys_must_be_precise(sample: LayerSample, gram: np.ndarray) -> None:
    """An error in a heavy key moves the output more than the same error in a light one."""
    weight = score.importance(sample, score.far_attention(sample), gram).tokens
    np.testing.assert_allclose(weight.mean(axis=0), 1.0, rtol=1e-5)
    clean, noise = output(sample, sample.k), np.random.default_rng(2).standard_normal((20, H, D)) * 0.1
    moved = []
    order = np.argsort(weight[score.SINKS : T - score.WINDOW, 0]) + score.SINKS
    for chosen in (order[:20], order[-20:]):
        k = sample.k.astype(np.float64).copy()
        k[chosen] += noise
        change = (output(sample, k) - clean)[:G]
        moved.append(np.einsum("grd,gde,gre->", change, gram[:G], change))
    assert moved[1] > 1.5 * moved[0]


def test_keys_that_are_never_coded_when_seen_keep_only_the_floor(sample: LayerSample, gram: np.ndarray) -> None:
    weight = score.importance(sample, score.far_attention(sample), gram).tokens
    np.testing.assert_allclose(weight[: score.SINKS], score.FLOOR, rtol=1e-5)
    np.testing.assert_allclose(weight[T - score.WINDOW + 4 :], score.FLOOR, rtol=1e-5)


def test_query_weights_are_averages_of_squares_of_their_own_group(sample: LayerSample, gram: np.ndarray) -> None:
    for weigh in (score.importance, score.uniform):
        queries = weigh(sample, score.far_attention(sample), gram).queries
        for h in range(H):
            group = sample.q[:, h * G : (h + 1) * G] ** 2
            assert (queries[h] >= 0).all() and (queries[h] <= group.max(axis=(0, 1))).all()
    np.testing.assert_allclose(queries[1], (sample.q[:, G:] ** 2).mean(axis=(0, 1)), rtol=1e-4)
