"""Statistics that depend on how the stream was cut, or grow with it, fail here."""

from __future__ import annotations

import numpy as np
import pytest
from kvtc_gguf.capture import rope_pairs
from kvtc_gguf.codebook import BINS, EDGES
from kvtc_gguf.statistics import HeadTransforms, Histogram, Moments, query_weight
from kvtc_gguf.transforms import build

H, D, T = 2, 16, 3000


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((H, D, D))
    return (np.einsum("thd,hde->the", rng.standard_normal((T, H, D)), mix) + 7).astype(np.float32)


def transforms(x: np.ndarray) -> HeadTransforms:
    moments = Moments(H, D)
    moments.add(x, np.ones(x.shape[:2]))
    return HeadTransforms([build("pca", moments.head(h)) for h in range(H)])


def test_streamed_moments_equal_numpy(x: np.ndarray) -> None:
    moments = Moments(H, D)
    for part in np.array_split(x, 7):
        moments.add(part, np.ones(part.shape[:2]))
    for h in range(H):
        head = moments.head(h)
        np.testing.assert_allclose(head.mean, x[:, h].mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(head.covariance, np.cov(x[:, h].T, bias=True), rtol=1e-4, atol=1e-3)


def test_weights_count_like_repeated_vectors(x: np.ndarray) -> None:
    weight = np.random.default_rng(1).integers(0, 4, x.shape[:2])
    weighted = Moments(H, D)
    weighted.add(x, weight)
    stacked = transforms(x)
    histogram = Histogram(stacked)
    histogram.add(*stacked.forward(x), weight)
    for h in range(H):
        repeated = np.repeat(x[:, h], weight[:, h], axis=0)
        np.testing.assert_allclose(weighted.head(h).mean, repeated.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(weighted.head(h).covariance, np.cov(repeated.T, bias=True), rtol=1e-4, atol=1e-3)
        assert histogram.count[h, 0].sum() == pytest.approx(len(repeated))


@pytest.mark.parametrize("interleaved", [True, False])
def test_query_weight_is_averaged_over_rope_pairs_only(interleaved: bool) -> None:
    square = np.arange(1.0, 17.0)
    weight = query_weight(square, rope_pairs(16, 8, interleaved), np.ones(16)) ** 2
    first, second = (0, 1) if interleaved else (0, 4)
    assert weight[first] == pytest.approx(weight[second]) == pytest.approx((square[first] + square[second]) / 2)
    np.testing.assert_allclose(weight[8:], square[8:])


def test_query_weight_of_unused_and_still_channels_is_floored() -> None:
    square, variance = np.ones(16), np.ones(16)
    square[:4], variance[2:6] = 0, 0
    weight = query_weight(square, rope_pairs(16, 16, True), variance)
    assert (weight > 0.02).all() and (weight <= 1).all()


def test_floor_follows_the_scale_of_a_pair() -> None:
    """Keys times s and queries divided by s: what queries see of a key stays what it was."""
    rng = np.random.default_rng(0)
    pairs, scale = rope_pairs(16, 16, False), np.tile(2.0 ** rng.integers(0, 7, 8), 2)
    square, variance = 10.0 ** rng.uniform(-6, 0, 16), rng.uniform(0.1, 10, 16)
    other = query_weight(square / scale**2, pairs, variance * scale**2)
    np.testing.assert_allclose(other * scale, query_weight(square, pairs, variance), rtol=1e-9)


def test_histogram_keeps_exact_sums_and_norms(x: np.ndarray) -> None:
    stacked = transforms(x)
    histogram = Histogram(stacked)
    for part in np.array_split(x, 5):
        histogram.add(*stacked.forward(part), np.ones(part.shape[:2]))
    z, norm = stacked.forward(x)
    y = z / norm
    assert histogram.count.sum() == H * D * T and histogram.count.shape[2] == BINS
    np.testing.assert_allclose(histogram.total.sum(axis=2), y.sum(axis=1), atol=0.05)
    np.testing.assert_allclose(histogram.square, (y**2).sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(histogram.mean_norm_square(), (norm**2).mean(axis=(1, 2)), rtol=1e-4)
    np.testing.assert_allclose(histogram.median_norm(), np.median(norm, axis=(1, 2)), rtol=0.02)
    for h in range(H):
        edges = EDGES * stacked.scale[h, 3]
        np.testing.assert_allclose(histogram.count[h, 3], np.histogram(y[h, :, 3], edges)[0], atol=2)
