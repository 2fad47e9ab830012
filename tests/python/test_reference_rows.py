"""The entropy coder in numpy. Failures caught: rows that do not come back, a code longer than the model's
entropy, a damaged model or block that is taken."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import row_models
from hypothesis import given, settings
from hypothesis import strategies as st
from kvtc_gguf.layout import FormatError
from kvtc_gguf.reference_rows import CODE, HALF, LANES, ZERO, RowModel, Run, uniform
from kvtc_gguf.row_tables import MAX_LEVEL, PROB_SUM, frequencies, multiply, weight

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=30, deadline=None)
@given(row_models.runs(), st.integers(1, 40), SEEDS)
def test_rows_and_models_come_back(runs, n, seed):
    model = row_models.model(runs, seed)
    again = RowModel.from_bytes(model.to_bytes())
    assert again.to_bytes() == model.to_bytes()
    rows = row_models.rows(model, n, seed)
    block = model.encode(rows)
    assert block is not None
    np.testing.assert_array_equal(again.decode(block, n), rows)


LEVEL_WEIGHTS = np.array([weight(level) for level in range(MAX_LEVEL + 1)])


def test_levels_are_weights_that_rise_to_the_sum():
    assert (np.diff(LEVEL_WEIGHTS) > 0).all() and LEVEL_WEIGHTS[0] == 0 and LEVEL_WEIGHTS[-1] == PROB_SUM


def test_code_is_as_long_as_the_entropy():
    """Fields of the same table: what joining them and rounding frequencies costs is below 0.5%."""
    for width, scale in ((1, 1.0), (2, 0.7), (3, 1.5), (4, 3.0), (6, 9.0)):
        values = np.arange(1 << width) - ((1 << width) - 1) / 2
        p = np.exp(-0.5 * (values / scale) ** 2)
        levels = [int(np.abs(LEVEL_WEIGHTS - q * PROB_SUM).argmin()) or 1 for q in p / p.sum()]
        model = RowModel([Run(width, CODE, 32)], {width: [levels]}, [0] * 32)
        rows = row_models.rows(model, 512, 1)
        q = model.tables[width][0] / PROB_SUM
        values = np.unpackbits(rows, axis=1, bitorder="little").reshape(512, 32, width) @ (1 << np.arange(width))
        ideal = -np.log2(q)[values].sum() / 8
        assert len(model.encode(rows)) - 4 * LANES <= 1.005 * ideal + 4


@settings(max_examples=30, deadline=None)
@given(st.sampled_from((1, 2, 4)), SEEDS)
def test_products_of_frequencies_add_up(width, seed):
    rng = np.random.default_rng(seed)
    low, high = (frequencies(row_models.table(rng, w)) for w in (width, min(8 - width, 4)))
    product = multiply(low, high)
    assert product.sum() == PROB_SUM
    np.testing.assert_array_equal(product > 0, np.outer(high, low).reshape(-1) > 0)


def test_value_without_a_frequency_and_padding_are_refused():
    model = RowModel([Run(2, CODE, 4), Run(8, ZERO, 1)], {2: [[1, 0, 0, 0]]}, [0] * 4)
    rows = np.zeros((100, 2), np.uint8)  # more than the states hold uncoded
    assert model.encode(rows) is not None
    for column in range(2):
        changed = rows.copy()
        changed[0, column] = 1
        assert model.encode(changed) is None


@settings(max_examples=25, deadline=None)
@given(row_models.runs(), SEEDS, st.data())
def test_damaged_models_and_blocks_are_refused_or_read_whole(runs, seed, data):
    model = row_models.model(runs, seed)
    rows = row_models.rows(model, 20, seed)
    block = bytearray(model.encode(rows))
    at = data.draw(st.integers(0, len(block) - 1))
    block[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(FormatError):
        assert model.decode(bytes(block), 20).shape == rows.shape
    for cut in (0, len(block) // 2, len(block) - 1):
        with pytest.raises(FormatError):
            model.decode(bytes(block[:cut]), 20)
    raw = bytearray(model.to_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(FormatError):
        assert RowModel.from_bytes(bytes(raw)).row_bytes > 0
    with pytest.raises(FormatError):
        RowModel.from_bytes(model.to_bytes()[:-1])


def test_runs_out_of_range_are_refused():
    for run in (Run(7, CODE, 8), Run(3, CODE, 4), Run(8, HALF, 1), Run(4, ZERO, 2), Run(8, ZERO, 0)):
        with pytest.raises(FormatError):
            run.check()
        if run.count:
            with pytest.raises(FormatError):
                RowModel.from_bytes(RowModel([run], {run.table_bits: [[1] * 256]}, [0] * run.count).to_bytes())
    huge = uniform([Run(8, CODE, 40000)]).to_bytes()
    with pytest.raises(FormatError):
        RowModel.from_bytes(huge)
