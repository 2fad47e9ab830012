"""What a transform is given and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class HeadStatistics:
    """Moments of one (layer, kv head, K or V), all f64: mean [d], covariance [d, d], weight [d], metric [d, d].

    `metric`: an error e costs e . metric e; symmetric, positive definite, floored. Keys: second moment of the queries
    as the key meets them, rotated back by the key's RoPE and weighted by what the error does to attention's output.
    Values: W_o^T W_o, summed over the query heads that read this kv head.
    `weight`: square root of its diagonal, for keys averaged over each RoPE pair; for values ones.
    """

    mean: np.ndarray
    covariance: np.ndarray
    weight: np.ndarray
    metric: np.ndarray


@dataclass(frozen=True)
class Basis:
    """x = decode @ z + mean: mean [d], decode [d, d].

    `flat`: whiten every component by one common scale (bases that spread the variance evenly), not by its own.
    """

    mean: np.ndarray
    decode: np.ndarray
    flat: bool = False
