"""Codebooks worse than those made from the samples themselves, or levels that do not rise, fail here."""

from __future__ import annotations

import numpy as np
import pytest
from kvtc_gguf.codebook import BINS, ITERATIONS, START, Cumulative, bins, distortion, lloyd_max, to_f16


def histogram(x: np.ndarray) -> Cumulative:
    """Cumulative of samples x [C, N], whose scale is their standard deviation."""
    scale = np.maximum(x.std(axis=1), 1e-3)
    index = bins(x / scale[:, None])
    count = np.stack([np.bincount(i, minlength=BINS) for i in index])
    total = np.stack([np.bincount(i, weights=v, minlength=BINS) for i, v in zip(index, x, strict=True)])
    return Cumulative(count, total, (x**2).sum(axis=1), scale)


def lloyd_max_on_samples(x: np.ndarray, bits: int) -> np.ndarray:
    """The measured recipe's codebook, on the samples [N] themselves."""
    levels = x.mean() + x.std() * np.linspace(-START[bits], START[bits], 2**bits)
    for _ in range(ITERATIONS):
        index = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
        count = np.bincount(index, minlength=levels.size)
        total = np.bincount(index, weights=x, minlength=levels.size)
        levels = np.sort(np.where(count > 0, total / np.maximum(count, 1), levels))
    return levels


def mse(x: np.ndarray, levels: np.ndarray) -> float:
    return float(((levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)] - x) ** 2).mean())


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    rng = np.random.default_rng(0)
    n = 30000
    bimodal = np.where(rng.random(n) < 0.5, -1, 1) + 0.2 * rng.standard_normal(n)
    shapes = [rng.standard_normal(n), rng.laplace(size=n), bimodal, 0.1 + 3 * rng.random(n), rng.gamma(2, size=n)]
    return np.stack(shapes)


@pytest.mark.parametrize("bits", sorted(START))
def test_histogram_codebook_matches_the_one_from_samples(data: np.ndarray, bits: int) -> None:
    levels = to_f16(lloyd_max(histogram(data), bits)).astype(np.float64)
    for x, mine in zip(data, levels, strict=True):
        assert mse(x, mine) <= 1.03 * mse(x, lloyd_max_on_samples(x, bits))


@pytest.mark.parametrize("bits", sorted(START))
def test_predicted_distortion_is_the_measured_one(data: np.ndarray, bits: int) -> None:
    cumulative = histogram(data)
    levels = lloyd_max(cumulative, bits)
    for x, mine, predicted in zip(data, levels, distortion(cumulative, levels), strict=True):
        assert predicted == pytest.approx(mse(x, mine), rel=0.05)
    np.testing.assert_allclose(distortion(cumulative, None), (data**2).mean(axis=1))


@pytest.mark.parametrize("bits", sorted(START))
def test_levels_rise_strictly_even_for_a_component_that_is_always_zero(bits: int) -> None:
    x = np.zeros((2, 1000))
    x[1, :3] = 50.0
    levels = to_f16(lloyd_max(histogram(x), bits))
    assert levels.dtype == np.float16 and np.isfinite(levels).all()
    assert (np.diff(levels.astype(np.float64), axis=1) > 0).all()


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_no_level_is_left_in_the_gap_before_samples_that_lie_far_out(bits: int) -> None:
    """As keys do in gemma-3 of tokens that much attention goes to: some of them, more than ten deviations out."""
    rng = np.random.default_rng(0)
    near, far = rng.standard_normal((1, 20000)), 40 + 0.1 * rng.standard_normal((1, 100))
    x = np.concatenate([near, far], axis=1)
    alone = mse(near[0], lloyd_max(histogram(near), bits)[0])
    assert mse(x[0], lloyd_max(histogram(x), bits)[0]) < 1.6 * alone
