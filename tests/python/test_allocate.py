"""A row that overflows its budget, or an allocation that another beats, fails here."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvtc_gguf.allocate import allocate, allocate_greedy
from kvtc_gguf.layout import WIDTHS, payload_bytes, row_bytes

GAUSS_MSE = np.array([1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000642, 0.0000415])


def errors(variance: np.ndarray) -> np.ndarray:
    return variance[:, :, None] * GAUSS_MSE


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 5),
    groups=st.integers(1, 16),
    bits=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_widths_fit_the_row_and_never_rise_within_a_head(heads: int, groups: int, bits: int, seed: int) -> None:
    variance = -np.sort(-np.random.default_rng(seed).lognormal(0, 2, (heads, groups)), axis=1)
    budget = row_bytes(heads, 8 * groups, bits)
    if payload_bytes(np.zeros((heads, groups), int)) > budget:  # a row too small for the gains
        with pytest.raises(ValueError, match="cannot hold the gains"):
            allocate(errors(variance), budget)
        return
    widths = allocate(errors(variance), budget)
    assert widths.dtype == np.int8 and set(widths.ravel().tolist()) <= set(WIDTHS)
    assert payload_bytes(widths) <= budget
    assert (np.diff(widths.astype(int), axis=1) <= 0).all()


def test_budget_is_spent_to_the_last_padding_byte() -> None:
    variance = -np.sort(-np.random.default_rng(1).lognormal(0, 2, (3, 8)), axis=1)
    for bits in range(1, 6):
        budget = row_bytes(3, 64, bits)
        assert budget - payload_bytes(allocate(errors(variance), budget)) <= 1


def total(table: np.ndarray, widths: np.ndarray) -> float:
    """Summed error of widths [H, G] in a table [H, G, len(WIDTHS)]."""
    return float(np.take_along_axis(table, np.searchsorted(WIDTHS, widths)[:, :, None], axis=2).sum())


@pytest.mark.parametrize(("heads", "groups"), [(1, 4), (2, 2)])
def test_no_allocation_is_better(heads: int, groups: int) -> None:
    """Against every allocation there is; measured errors are rough, so the tables are as well."""
    rng = np.random.default_rng(2)
    every = [w for w in itertools.product(WIDTHS, repeat=groups) if list(w) == sorted(w, reverse=True)]
    for budget in (heads * 4 + 3, heads * 4 + 6, 16):
        table = errors(-np.sort(-rng.lognormal(0, 1.5, (heads, groups)), axis=1)) * rng.uniform(
            0.5, 2, (heads, groups, 8)
        )
        best = min(
            total(table, np.array(widths))
            for widths in itertools.product(every, repeat=heads)
            if payload_bytes(np.array(widths)) <= budget
        )
        assert total(table, allocate(table, budget)) == pytest.approx(best, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(heads=st.integers(1, 4), groups=st.integers(4, 16), bits=st.integers(1, 6), seed=st.integers(0, 1000))
def test_greedy_never_beats_it_and_comes_close(heads: int, groups: int, bits: int, seed: int) -> None:
    table = errors(-np.sort(-np.random.default_rng(seed).lognormal(0, 1.5, (heads, groups)), axis=1))
    budget = row_bytes(heads, 8 * groups, bits)
    exact, greedy = total(table, allocate(table, budget)), total(table, allocate_greedy(table, budget))
    assert exact <= greedy * (1 + 1e-12)
    if groups >= 8:  # in rows of a few bytes, one group's last step is a good part of all there is
        assert greedy <= 1.25 * exact


def test_heads_share_bits_by_what_they_need() -> None:
    variance = np.ones((2, 8))
    variance[1] *= 30
    widths = allocate(errors(variance), row_bytes(2, 64, 2)).astype(int)
    assert widths[1].sum() > widths[0].sum() + 8


def test_a_useless_first_bit_does_not_stop_a_useful_second_one() -> None:
    table = errors(np.ones((1, 2)))
    table[:, :, 1] = table[:, :, 0]
    assert (allocate(table, 9)[0] >= 2).all()
