"""Bits by layer that overspend, that a better choice would beat, or that a cache would not be given fail here."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from kvtc_gguf import budget, format
from kvtc_gguf.format import Calibration, FormatError
from synthetic import calibration

BITS = [1, 2, 3, 4, 5, 6]
LAYERS = [0, 2, 3]  # of four


@pytest.fixture
def measured() -> Calibration:
    """As `calibrate --bpv` leaves it: layers measured alone at 2 bits, values ten times as sensitive in layer 2."""
    made = calibration(4, n_head=2, head_dim=32, only=LAYERS)
    rng = np.random.default_rng(0)
    for side in "kv":
        error = rng.uniform(1, 2, 4) * 4.0 ** -np.arange(6)[:, None]
        error[:, 1] = 0
        kld = np.full((6, 4), -1.0)
        kld[1, LAYERS] = rng.uniform(1e-4, 2e-4, 3)
        made.stats |= {f"error.{side}": error.astype(np.float32), f"kld.{side}": kld.astype(np.float32)}
    made.stats["kld.v"][1, 2] *= 10
    return made


@pytest.mark.parametrize("room", [4, 7, 11.9, 30])
def test_no_choice_is_better(room: float) -> None:
    rng = np.random.default_rng(int(room))
    cost, values = -np.sort(-rng.lognormal(0, 2, (3, 4)), axis=0), np.array([1, 2, 1, 1])
    if room < 5:
        with pytest.raises(ValueError, match="least"):
            budget.choose(cost, values, [1, 2, 4], room)
        return
    every = [c for c in itertools.product(range(3), repeat=4) if sum(np.array([1, 2, 4])[list(c)] * values) <= room]
    best = min(cost[list(c), range(4)].sum() for c in every)
    chosen = budget.choose(cost, values, [1, 2, 4], room)
    assert tuple(chosen.tolist()) in every and cost[chosen, range(4)].sum() == pytest.approx(best)


def test_what_was_not_measured_follows_the_error_and_never_rises() -> None:
    measured = np.array([[-1, -1], [4, 2], [-1, -1]])
    error = np.array([[8, 8], [2, 2], [1, 3]])
    np.testing.assert_allclose(budget.costs(measured, error), [[16, 8], [4, 2], [2, 2]])
    with pytest.raises(ValueError, match="layer 1"):
        budget.costs(np.array([[1.0, -1.0]]), np.ones((1, 2)))


def test_layers_share_what_their_side_costs_as_a_whole() -> None:
    measured = np.array([[-1, -1], [4, 2], [-1, -1]])
    error = np.array([[8, 8], [2, 2], [1, 3]])
    cost = budget.costs(measured, error, np.array([48.0, 6.0, -1.0]))
    np.testing.assert_allclose(cost, [[32, 16], [4, 2], [2, 2]])


def test_a_layer_measured_as_free_still_costs_something() -> None:
    cost = budget.costs(np.array([[1.0, 0.0, 1.0]]), np.ones((1, 3)))
    assert cost[0, 1] == pytest.approx(budget.SHARE_FLOOR)


def test_sensitive_layers_get_the_bits_and_the_rest_pays(measured: Calibration) -> None:
    choice = budget.plan(measured, 2.5)
    assert choice.bpv <= 2.5 and choice.bpv > 2.4
    assert choice.bits["v"][2] == max(max(row) for row in choice.bits.values())
    assert choice.bits["k"][1] == choice.bits["v"][1] == 0  # no cache
    assert choice.kld == pytest.approx(budget.predicted(measured, choice.bits))
    for k, v in ((2, 3), (3, 2)):
        assert choice.kld < budget.predicted(measured, {"k": [k] * 4, "v": [v] * 4})


def test_a_chosen_budget_is_what_the_named_types_get(measured: Calibration, tmp_path: Path) -> None:
    choice = budget.plan(measured, 2.5)
    k, v = budget.apply(measured, choice)
    format.write(measured, tmp_path / "a.kvtc.gguf")
    back = format.read(tmp_path / "a.kvtc.gguf")
    for layer in LAYERS:
        assert back.kept_bits(layer, "k", k) == choice.bits["k"][layer]
        assert back.kept_bits(layer, "v", v) == choice.bits["v"][layer]
        assert back.kept_bits(layer, "v", 6 if v != 6 else 5) == (6 if v != 6 else 5)


@pytest.mark.parametrize("bpv", [0.9, 6.5])
def test_budgets_out_of_reach_are_refused(measured: Calibration, bpv: float) -> None:
    with pytest.raises(FormatError, match="must be 1 to 6"):
        budget.plan(measured, bpv)


def test_a_calibration_without_sensitivities_says_what_to_do() -> None:
    with pytest.raises(FormatError, match="--bpv"):
        budget.plan(calibration(), 2.5)


def test_differences_within_the_noise_do_not_count() -> None:
    measured = np.array([[1.0, 2.0, 0.5, 1.0], [-1, -1, -1, -1]])
    same = budget.damped(measured, np.zeros((2, 4)), 1.0)
    np.testing.assert_allclose(same, measured)
    drowned = budget.damped(measured, np.full((2, 4), 2.0), 1.0)
    np.testing.assert_allclose(drowned[0], 1.0)  # the geometric mean
    half = budget.damped(measured, np.full((2, 4), 1e-9), 0.5)
    np.testing.assert_allclose(half[0], np.sqrt(measured[0]), rtol=1e-6)
    certain = budget.damped(measured, np.array([[0.01, 0.01, 2.0, 0.01], [0, 0, 0, 0]]), 1.0)
    assert certain[0, 1] > 1.9 and certain[0, 2] > 0.9  # one uncertain figure says little, the others stand


class Measured:
    """A prober that knows no model: KLD by row from a function of the bits."""

    def __init__(self, calibration: Calibration, gain: float, noise: float) -> None:
        self.calibration, self.gain, self.noise, self.asked = calibration, gain, noise, []

    def kld(self, bits: dict[str, list[int]]) -> np.ndarray:
        self.asked.append(bits)
        rows = np.full(400, 0.01)
        if len({b for b in bits["v"] if b}) > 1:  # by layer
            rows += self.noise * np.tile([1, -1], 200) - self.gain
        return rows


def test_layers_get_their_own_bits_only_where_that_is_clearly_better(measured: Calibration) -> None:
    for gain, noise, wins in ((1e-3, 1e-3, True), (-1e-3, 1e-3, False), (1e-4, 1e-2, False)):
        prober = Measured(measured, gain, noise)
        choice, each = budget.best(prober, measured, 2.5)
        assert (choice.name == budget.Choice.name) == wins, (gain, noise)
        assert len(each) == len(prober.asked) >= 3
        assert choice.bpv <= 2.5
    # no preset takes 2.25 bits: what the smaller one leaves is used even where the gain is within the noise
    choice, _ = budget.best(Measured(measured, 1e-4, 1e-2), measured, 2.25)
    assert 2 < choice.bpv <= 2.25


def test_presets_of_a_size_come_by_predicted_kld(measured: Calibration) -> None:
    found = budget.presets(measured, 2.6)
    assert {c.name for c in found} == {"kvtc-k1v4", "kvtc-k2v3", "kvtc-k3v2", "kvtc-k4v1"}
    assert [c.kld for c in found] == sorted(c.kld for c in found) and {c.bpv for c in found} == {2.5}


def test_keys_that_count_more_get_more_bits(measured: Calibration) -> None:
    plain, heavy = budget.plan(measured, 2.5), budget.plan(measured, 2.5, keys=30.0)
    assert sum(heavy.bits["k"]) > sum(plain.bits["k"]) and heavy.bpv <= 2.5
    assert heavy.kld == pytest.approx(budget.predicted(measured, heavy.bits)) and heavy.kld >= plain.kld


@pytest.mark.parametrize(("worse", "taken"), [(0.0, "kvtc-k3v2"), (1e-4, "kvtc-k3v2"), (1e-2, "kvtc-k2v3")])
def test_a_preset_with_fewer_key_bits_is_taken_only_where_it_is_clearly_better(
    measured: Calibration, worse: float, taken: str
) -> None:
    rng = np.random.default_rng(0)
    few, many = (next(c for c in budget.presets(measured, 2.5) if c.name == f"kvtc-k{k}v{5 - k}") for k in (2, 3))
    rows = rng.lognormal(-6, 1, 400)
    other = rows + worse + 2e-3 * np.tile([1, -1], 200)  # paired: what both rows share is no noise of the difference
    assert budget.steadiest([(few, rows), (many, other)]).name == taken
    assert budget.steadiest([(many, other), (few, rows)]).name == taken
    assert budget.steadiest([(few, other), (many, rows)]).name == "kvtc-k3v2"
