"""A difference between two engines' statistics that is not seen, or two texts that are compared, fail here."""

from __future__ import annotations

import numpy as np
import pytest
from kvtc_gguf.statistics_file import STREAMS, Statistics, Text

from bench.captures import differences


def statistics(token: int = 0, heads: int = 2) -> Statistics:
    rng = np.random.default_rng(0)
    result = Statistics("0" * 16, "llama", [Text("text", np.full((1, 8), token, np.int32), 1)])
    for layer in (0, 3):
        for stream in STREAMS:
            moments = result.of(layer, stream, heads, 4)
            moments.add(rng.standard_normal((50, heads, 4)).astype(np.float32), np.ones((50, heads), np.float32))
        result.moments[layer]["k"].add_queries(rng.random((heads, 4)))
    return result


def test_a_difference_and_its_layer_are_found() -> None:
    other = statistics()
    assert all((d == 0).all() for by_layer in differences(statistics(), other).values() for d in by_layer.values())
    other.moments[3]["v"].outer[1] *= 1.02
    found = differences(statistics(), other)
    assert found["v"][3] == pytest.approx([0, 0.02], rel=0.2) and not found["v"][0].any()
    assert not any(found[name][3].any() for name in ("k", "queries"))


def test_other_texts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="other tokens"):
        differences(statistics(), statistics(1))
