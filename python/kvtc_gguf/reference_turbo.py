"""The numpy twin of `ggml_kvtc/kvtc-turbo.cpp`: the data-free cache types turbo2, turbo3 and turbo4.

A signed Hadamard rotation spreads a vector evenly over its components, which are then nearly Gaussian, so one Lloyd-Max
codebook serves them all (TurboQuant, arXiv 2504.19874). Keys are coded as they are after RoPE. `side` gives what the
encoder and decoder of `reference` need: a calibration's side that no data made.
"""

from __future__ import annotations

import math

import numpy as np

from kvtc_gguf.format import SideCalibration
from kvtc_gguf.layout import GROUP, TURBO_BLOCKS
from kvtc_gguf.validate import check_shape

BITS = tuple(TURBO_BLOCKS)
LEVELS = {
    2: (0.4527800346, 1.5104176085),
    3: (0.2450941789, 0.7560052812, 1.3439092785, 2.1519457045),
    4: (
        *(0.1283950299, 0.3880482995, 0.6567591185, 0.9423404565),
        *(1.2562311973, 1.6180463860, 2.0690172265, 2.7325895710),
    ),
}
"""Upper halves of the Lloyd-Max codebooks for a Gaussian of variance 1 (Max 1960, table I, to more digits)."""
DISTORTION = {2: 0.117482, 3: 0.034548, 4: 0.009501}
"""Their mean squared errors. Keeping the norm adds about a quarter of the square of these."""
SEED = 2463534242  # of xorshift32, by its author


def codebook(bits: int) -> np.ndarray:
    """Levels f16 [2**bits], rising."""
    upper = np.array(LEVELS[bits], np.float32).astype(np.float16)
    return np.concatenate([-upper[::-1], upper])


def signs(d: int) -> np.ndarray:
    """A random sign for each channel, f64 [d], the same for ever."""
    state, result = SEED, np.ones(d)
    for i in range(d):
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
        result[i] = -1.0 if state >> 31 else 1.0
    return result


def rotation(d: int) -> np.ndarray:
    """Decode matrix f16 [d, d], orthogonal up to a common factor and rounding.

    d = m * 2**k with m odd: the Kronecker product of the Hartley matrix of m (cos + sin, never 0, at most sqrt(2)) and
    the Hadamard matrix of 2**k, so that all channels mix; over a power of two, so that the latter is exact in f16.
    """
    size = d & -d
    m = d // size
    hadamard = np.ones((1, 1))
    while len(hadamard) < size:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    angle = 2 * math.pi * np.arange(m) / m
    hartley = (np.cos(angle) + np.sin(angle))[np.outer(np.arange(m), np.arange(m)) % m]
    matrix = signs(d)[:, None] * np.kron(hartley, hadamard) / 2.0 ** (int(math.log2(d)) // 2)
    return matrix.astype(np.float32).astype(np.float16)


def side(n_head: int, head_dim: int, bits: int) -> SideCalibration:
    """What codes K or V of one layer as turbo<bits>; its one budget has index 0.

    Raises FormatError for a shape that no cache has and KeyError for other bits.
    """
    check_shape(n_head, head_dim)
    levels, groups = codebook(bits), head_dim // GROUP
    book = np.tile(levels, (GROUP, 1))
    return SideCalibration(
        mean=np.zeros((n_head, head_dim), np.float32),
        scale=np.ones((n_head, head_dim), np.float32),
        gain_base=np.ones(n_head, np.float32),
        gain_rule=np.ones(n_head, np.int32),
        decode=np.tile(rotation(head_dim), (n_head, 1, 1)),
        widths=np.full((n_head, 1, groups), bits, np.int8),
        codebooks={(head, group, bits): book for head in range(n_head) for group in range(groups)},
        transforms=["turbo"] * n_head,
        turbo=True,
    )
