"""What a transform is given and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class HeadStatistics:
    """Moments of one (layer, kv head, K or V), all f64: mean [d], covariance [d, d], weight [d].

    `weight` is the square root of what an error in each channel costs: for keys the root mean square of the queries
    (averaged over each RoPE pair and floored), for values ones.
    """

    mean: np.ndarray
    covariance: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class Basis:
    """x = decode @ z + mean: mean [d], decode [d, d].

    `flat`: whiten every component by one common scale (bases that spread the variance evenly), not by its own.
    """

    mean: np.ndarray
    decode: np.ndarray
    flat: bool = False
