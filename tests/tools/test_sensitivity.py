"""A layer's sensitivity measured with other layers' bits, a reference that is not f16's, or `--bpv` that spends more
than it was given fails here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tools
from kvtc_gguf import budget
from kvtc_gguf.format import Calibration, read, write
from kvtc_gguf.sensitivity import Prober, measure, uniform

from bench.logs import parse_sizes


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return tools.calibrated_model(folder / "sensitive.gguf")


@pytest.fixture(scope="module")
def prober(model: Path):
    chunks = np.random.default_rng(0).integers(3, 259, (1, 256)).astype(np.int32)
    with Prober(model, read(model.with_suffix(".kvtc.gguf")), chunks, 1) as made:
        yield made


def test_fewer_bits_of_one_layer_cost_less_than_of_all(prober: Prober) -> None:
    calibration = prober.calibration
    wide, narrow = (prober.kld(uniform(calibration, b, b)) for b in (6, 1))
    assert len(wide) == len(prober.rows) and 0 <= wide.mean() < narrow.mean()
    tables = measure(prober)
    assert tables["kld.background"] == pytest.approx(wide.mean(), rel=1e-5)
    each, spread = (np.concatenate([tables[n + s][tables[n + s] >= 0] for s in "kv"]) for n in ("kld.", "kld.spread."))
    assert len(each) == len(spread) == 2 * tools.N_LAYER and (each > 0).all() and (spread > 0).all()
    at = calibration.bits[int((tables["kld.k"] >= 0).any(axis=1).argmax())]
    together = (prober.kld(uniform(calibration, at, at)) - wide).mean()
    assert (np.diff(tables["kld.curve.k"][:5]) < 0).all() and tables["kld.curve.k"][5] == -1
    assert each.max() < together and 0.3 * together < each.sum() < 3 * together


def test_no_more_log_probabilities_are_kept_than_there_is_room_for(model: Path, monkeypatch) -> None:
    chunks = np.random.default_rng(0).integers(3, 259, (2, 256)).astype(np.int32)
    monkeypatch.setattr("kvtc_gguf.sensitivity.ROWS_BYTES", 64 * 1024)
    with Prober(model, read(model.with_suffix(".kvtc.gguf")), chunks, 1) as few:
        assert all(base.nbytes <= 64 * 1024 for base in few.base) and len(few.base) == 2
        assert 20 < len(few.rows) < 127 and few.rows[0] == 128


def test_a_cache_gets_the_bits_that_were_chosen(model: Path, prober: Prober, tmp_path: Path) -> None:
    calibration: Calibration = read(model.with_suffix(".kvtc.gguf"))
    error = np.tile(4.0 ** -np.arange(6)[:, None], tools.N_LAYER).astype(np.float32)
    calibration.stats |= {f"error.{side}": error for side in "kv"}
    told = budget.spend(model, calibration, prober.chunks, 2.5, 1)
    types = told.splitlines()[-1].split("--cache-type ")[1]
    file = tmp_path / "spent.kvtc.gguf"
    write(calibration, file)
    log = tools.complete(model, "-ct", types, "--kvtc-file", file, n=1).log
    assert 2.2 < (parse_sizes(log).bpv or 0) <= 2.5
    assert "predicted" in told and "measured" in told
