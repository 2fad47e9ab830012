"""A trellis code that is not decodable from windows of its bits, or that a scalar code would beat, fails here."""

from __future__ import annotations

import numpy as np

from bench import trellis

BITS, MEMORY, D = 2, 6, 32


def test_every_state_is_a_window_of_one_ring_of_bits() -> None:
    x = np.random.default_rng(0).standard_normal((16, D)).astype(np.float32)
    path = trellis.encode(x, trellis.train(BITS, MEMORY, D, samples=128), BITS)
    own = path & ((1 << BITS) - 1)  # what a component adds
    window = np.zeros_like(path)
    for back in range(MEMORY // BITS):
        window |= np.roll(own, back, axis=1) << (BITS * back)
    np.testing.assert_array_equal(window, path)


def test_a_trellis_has_less_error_than_lloyd_max() -> None:
    x = np.random.default_rng(1).standard_normal((128, D)).astype(np.float32)
    table = trellis.train(BITS, MEMORY, D, samples=512)
    error = np.square(x - table[trellis.encode(x, table, BITS)]).mean()
    assert 0.06 < error < 0.85 * trellis.SCALAR[BITS]  # the rate distortion bound is 0.0625
