"""Signed Hadamard rotation: spreads every vector evenly over all components, whatever the data.

head_dim d = m * 2**k with odd m (80 = 5 x 16): block-diagonal, m Hadamard blocks of size 2**k, so channels mix within
their block only. The signs come from a fixed seed: the same d gives the same matrix for ever.
"""

from __future__ import annotations

import numpy as np

from kvtc_gguf.transforms.types import Basis, HeadStatistics

SEED = 1


def rotation(d: int) -> np.ndarray:
    """Orthogonal f64 [d, d]: Sylvester blocks of the largest power of two that divides d, with random column signs."""
    size = d & -d
    block = np.ones((1, 1))
    while len(block) < size:
        block = np.block([[block, block], [block, -block]])
    matrix = np.kron(np.eye(d // size), block / np.sqrt(size))
    return matrix * np.random.default_rng(SEED).choice([-1.0, 1.0], d)


def hadamard(statistics: HeadStatistics) -> Basis:
    """Rotation with the mean left in. Measured on values: removing it did harm (its error does not average out)."""
    d = statistics.mean.size
    return Basis(np.zeros(d), rotation(d).T, flat=True)


def centred_hadamard(statistics: HeadStatistics) -> Basis:
    """Rotation after removing the mean."""
    return Basis(statistics.mean, rotation(statistics.mean.size).T, flat=True)
