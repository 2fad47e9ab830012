"""A basis that loses information, is not normalised as the format says, or forgets a head_dim fails here."""

from __future__ import annotations

import numpy as np
import pytest
from kvtc_gguf.transforms import REGISTRY, HeadStatistics, build
from kvtc_gguf.transforms.hadamard import rotation


def samples(d: int, tokens: int = 3000, seed: int = 0) -> tuple[np.ndarray, HeadStatistics]:
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((d, d)) * 0.8 ** np.arange(d)[:, None]
    x = rng.standard_normal((tokens, d)) @ mix * 5 + 3 * rng.standard_normal(d)
    weight = np.exp(rng.standard_normal(d))
    return x, HeadStatistics(x.mean(axis=0), np.cov(x.T, bias=True), weight)


@pytest.mark.parametrize("d", [8, 64, 80, 96, 256])
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_transform_round_trips_and_is_normalised(name: str, d: int) -> None:
    x, statistics = samples(d)
    transform = build(name, statistics)
    z = (x - transform.mean) @ transform.encode.T
    assert np.sqrt((z**2).mean()) == pytest.approx(1, rel=5e-3)
    np.testing.assert_allclose(z @ transform.decode.T + transform.mean, x, atol=1e-6 * np.abs(x).max())
    np.testing.assert_array_equal(transform.decode, transform.decode.astype(np.float16))
    assert (transform.scale > 0).all()


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_transform_survives_channels_that_never_vary_and_no_query_uses(name: str) -> None:
    x, _ = samples(64)
    x[:, 5:9] = 0.25
    weight = np.full(64, 1.0)
    weight[:5] = np.sqrt(1e-3)
    transform = build(name, HeadStatistics(x.mean(axis=0), np.cov(x.T, bias=True), weight))
    assert np.isfinite(transform.encode).all() and np.isfinite(transform.scale).all()
    assert transform.scale.min() >= 0.99e-3 * transform.scale.max()


@pytest.mark.parametrize("d", [8, 64, 80, 96, 128, 512])
def test_hadamard_rotation_is_orthogonal_and_the_same_every_time(d: int) -> None:
    matrix = rotation(d)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(d), atol=1e-12)
    np.testing.assert_array_equal(matrix, rotation(d))
    assert (np.abs(matrix[0]) > 0).sum() == d & -d


def test_query_pca_leaves_less_logit_error_than_pca_in_the_dropped_components() -> None:
    x, statistics = samples(64)
    errors = {}
    for name in ("pca", "query_pca"):
        transform = build(name, statistics)
        z = (x - transform.mean) @ transform.encode.T
        z[:, 16:] = 0
        errors[name] = (((z @ transform.decode.T + transform.mean - x) * statistics.weight) ** 2).mean()
    assert errors["query_pca"] < 0.9 * errors["pca"]
