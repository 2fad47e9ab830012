"""The transforms that compete for a head, and their one registry.

A transform turns the statistics of one (layer, kv head, K or V) into a basis: `mean [d]` to subtract and
`decode [d, d]` with `x = decode @ z + mean`. README.md lists them and says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvtc_gguf.transforms.hadamard import centred_hadamard, hadamard
from kvtc_gguf.transforms.pca import pca
from kvtc_gguf.transforms.query_pca import query_pca
from kvtc_gguf.transforms.types import Basis, HeadStatistics

__all__ = ["REGISTRY", "Basis", "HeadStatistics", "Transform", "build"]

REGISTRY: dict[str, Callable[[HeadStatistics], Basis]] = {
    "pca": pca,
    "query_pca": query_pca,
    "hadamard": hadamard,
    "hadamard_centred": centred_hadamard,
}

SCALE_FLOOR = 1e-3  # of the largest scale: a component that never varies must not rule the whitened norm (kvtc format)


@dataclass(frozen=True)
class Transform:
    """A basis made ready: rms of z over components and tokens is 1, decode is exactly representable in f16.

    mean f64 [d], encode f64 [d, d], decode f64 [d, d] (f16 values), scale f64 [d]: deviation of each z, floored.
    """

    name: str
    mean: np.ndarray
    encode: np.ndarray
    decode: np.ndarray
    scale: np.ndarray


def build(name: str, statistics: HeadStatistics) -> Transform:
    """The registered transform `name` for one head, normalised as the kvtc format asks.

    Raises KeyError for an unknown name and numpy.linalg.LinAlgError when the decode matrix has no inverse.
    """
    basis = REGISTRY[name](statistics)
    mean = np.asarray(basis.mean, np.float32).astype(np.float64)
    encode = np.linalg.inv(basis.decode)
    rms = np.sqrt(max(float(np.diag(_second_moment(encode, statistics, mean)).mean()), 1e-30))
    # The file keeps decode in f16 and the loader inverts that, so the inverse of the rounded matrix is what counts.
    decode = (basis.decode * rms).astype(np.float16).astype(np.float64)
    encode = np.linalg.inv(decode)
    if basis.flat:
        moment = _second_moment(encode, statistics, mean)
        grand_mean = float((encode @ (statistics.mean - mean)).mean())
        scale = np.full(mean.size, np.sqrt(max(float(np.diag(moment).mean()) - grand_mean**2, 1e-12)))
    else:
        scale = np.sqrt(np.maximum(np.einsum("ci,ij,cj->c", encode, statistics.covariance, encode), 0.0))
    return Transform(name, mean, encode, decode, np.maximum(scale, max(SCALE_FLOOR * scale.max(), 1e-12)))


def _second_moment(encode: np.ndarray, statistics: HeadStatistics, mean: np.ndarray) -> np.ndarray:
    """E[z z^T], [d, d], for z = encode @ (x - mean)."""
    shift = encode @ (statistics.mean - mean)
    return encode @ statistics.covariance @ encode.T + np.outer(shift, shift)
