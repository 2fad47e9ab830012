"""Failures caught: parked codes that count too few bits, or that come back further off than their step allows."""

from __future__ import annotations

import numpy as np

from bench import parked

N = 4000


def test_bits_are_those_of_the_codes():
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(-2, 2, N), np.zeros(N, int), rng.integers(5, 7, N)], axis=1)
    bits, tables = parked.entropy_and_tables(codes)
    assert abs(bits / N - (2 + 0 + 1)) < 0.01
    assert tables == 3 + 0.5 * np.log2(N) * (3 + 0 + 1)


def test_components_come_back_at_the_rate_asked_for():
    z = np.random.default_rng(1).normal(size=(N, 16)).astype(np.float32) * np.geomspace(4, 0.1, 16, dtype=np.float32)
    back, codes_size, tables_size = parked.at_rate({"k": z}, 1.5)
    assert abs(8 * (codes_size + tables_size) / z.size - 1.5) < 0.02
    error = np.square(back["k"] - z).mean()
    coarse = parked.at_rate({"k": z}, 1.0)[0]["k"]
    assert error < np.square(coarse - z).mean() < np.square(z).mean()
