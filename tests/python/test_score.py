"""Errors judged by something else than what they do to attention's output fail here."""

from __future__ import annotations

import numpy as np
import pytest
from kvtc_gguf import score
from kvtc_gguf.capture import LayerSample, rope_pairs
from kvtc_gguf.rotation import rotate, rotation

T, H, G, D = 300, 2, 3, 16
PAIRS = rope_pairs(D, D, interleaved=False)


@pytest.fixture
def sample() -> LayerSample:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((T, n, D)).astype(np.float32) for n in (H * G, H, H))
    return LayerSample(0, q, k, v, 0.3 * rotate(q, turn()[:, None], PAIRS), rotate(k, turn()[:, None], PAIRS))


def turn() -> np.ndarray:
    """RoPE's unit complex numbers, [T, D / 2]."""
    return np.exp(1j * np.arange(T)[:, None] * 0.5 ** np.arange(D // 2)).astype(np.complex64)


@pytest.fixture
def gram() -> np.ndarray:
    rng = np.random.default_rng(1)
    w = rng.standard_normal((H * G, D, D)).astype(np.float32)
    return w.transpose(0, 2, 1) @ w


def output(sample: LayerSample, k: np.ndarray) -> np.ndarray:
    """Attention output [H * G, R, D] of the scored query rows, rotated keys k [T, H, D]."""
    rows = score.query_rows(T)
    out = []
    for i in range(H * G):
        logits = sample.q_rope[rows, i].astype(np.float64) @ k[:, i // G].T
        logits[rows[:, None] < np.arange(T)] = -np.inf
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        out.append(p / p.sum(axis=1, keepdims=True) @ sample.v[:, i // G])
    return np.stack(out)


def test_rotation_is_read_off_the_keys(sample: LayerSample) -> None:
    np.testing.assert_allclose(rotation(sample, PAIRS), turn(), atol=1e-5)
    still = LayerSample(0, sample.q, sample.k, sample.v, sample.q, 0 * sample.k)  # keys say nothing
    np.testing.assert_array_equal(rotation(still, PAIRS), np.ones((T, D // 2)))


def test_importance_tells_which_keys_must_be_precise(sample: LayerSample, gram: np.ndarray) -> None:
    """An error in a heavy key moves the output more than the same error in a light one."""
    weight = score.importance(sample, score.attend(sample), gram, PAIRS).keys
    np.testing.assert_allclose(weight.mean(axis=0), 1.0, rtol=1e-5)
    clean, noise = output(sample, sample.k_rope), np.random.default_rng(2).standard_normal((20, H, D)) * 0.1
    moved = []
    order = np.argsort(weight[score.SINKS : T - score.WINDOW, 0]) + score.SINKS
    for chosen in (order[:20], order[-20:]):
        k = sample.k_rope.astype(np.float64).copy()
        k[chosen] += noise
        change = (output(sample, k) - clean)[:G]
        moved.append(np.einsum("grd,gde,gre->", change, gram[:G], change))
    assert moved[1] > 1.5 * moved[0]


def test_tokens_that_are_never_coded_when_seen_keep_only_the_floor(sample: LayerSample, gram: np.ndarray) -> None:
    weight = score.importance(sample, score.attend(sample), gram, PAIRS)
    for each in (weight.keys, weight.values):
        np.testing.assert_allclose(each[: score.SINKS], score.FLOOR, rtol=1e-5)
        np.testing.assert_allclose(each[T - score.WINDOW + 4 :], score.FLOOR, rtol=1e-5)


def test_metric_is_the_mean_square_logit_error(sample: LayerSample, gram: np.ndarray) -> None:
    """Of one error that all keys make before RoPE, over all pairs that `importance` weighs, weighed as it does."""
    metric = score.importance(sample, score.attend(sample), gram, PAIRS).metric
    plain = score.uniform(sample, score.attend(sample), gram, PAIRS).metric
    error = np.random.default_rng(3).standard_normal(D).astype(np.float32)
    turned = rotate(np.broadcast_to(error, (T, D)), turn(), PAIRS)
    attention, rows = score.attend(sample), score.query_rows(T)
    total = weight = 0.0
    for i in range(G):
        v = sample.v[:, 0]
        apart = v[None] - (attention.far(i) @ v)[:, None]
        cost = attention.far(i) * np.einsum("rtd,de,rte->rt", apart, gram[i], apart)
        total += (cost * (sample.q_rope[rows, i] @ turned.T) ** 2).sum()
        weight += cost.sum()
    expected = (1 - score.FLOOR) * total / weight + score.FLOOR * error @ plain[0] @ error
    assert error @ metric[0] @ error == pytest.approx(expected, rel=0.05)
    np.testing.assert_allclose(np.trace(plain[1]), (sample.q_rope[:, G:] ** 2).mean(axis=(0, 1)).sum(), rtol=1e-4)


def test_key_cost_is_the_change_of_the_output(sample: LayerSample, gram: np.ndarray) -> None:
    attention, rows = score.attend(sample), score.query_rows(T)
    error = 0.5 * np.random.default_rng(4).standard_normal((T, 2, D)).astype(np.float32)
    everywhere = np.ones_like(attention.coded)
    parts = (sample.q_rope[rows, :G], attention.probability[:G], everywhere, error, sample.v[:, 0], gram[:G])
    cost = score.key_cost(*parts)
    for m in range(2):
        wrong = sample.k_rope.copy()
        wrong[:, 0] += error[:, m]
        change = (output(sample, wrong) - output(sample, sample.k_rope))[:G]
        assert cost[m] == pytest.approx(np.einsum("grd,gde,gre->", change, gram[:G], change), rel=1e-3)
    nowhere = score.key_cost(*parts[:2], ~everywhere, *parts[3:])
    assert (nowhere < 1e-9 * cost).all()
