"""Layers that are worked on side by side and give another result than one by one, or lose an error, fail here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import synthetic
from kvtc_gguf.capture import Consumer, LayerSample
from kvtc_gguf.format import Calibration
from kvtc_gguf.layout import FormatError
from kvtc_gguf.model_info import ModelInfo
from kvtc_gguf.run import HELD_OUT_MOST, Run, last
from kvtc_gguf.statistics_file import Statistics, Text
from rich.progress import Progress
from test_format import assert_same

LAYERS, HEADS, KV, D, CTX = 5, 4, 2, 32, 256


class Noise:
    """An engine whose queries, keys and values depend on the chunk and the layer alone; in `broken`, no numbers."""

    interleaved, bos, add_bos = True, -1, False

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken

    def run(self, tokens: np.ndarray, consumer: Consumer) -> None:
        for layer in range(LAYERS):
            rng = np.random.default_rng((int(tokens[0]), layer))
            q, k, v = (rng.standard_normal((len(tokens), n, D)).astype(np.float32) for n in (HEADS, KV, KV))
            if layer == self.broken:
                v[3, 0, 1] = np.nan
            consumer(LayerSample(layer, q, k, v, 0.2 * q, k))


def run(model: Path, threads: int, broken: int | None = None) -> Calibration:
    info = ModelInfo(model)
    chunks = np.arange(4, dtype=np.int32)[:, None].repeat(CTX, axis=1)
    statistics = Statistics("0" * 16, info.architecture, [Text("noise", chunks)])
    with Run(model, info, Noise(broken), statistics, Progress(disable=True), lambda: None, threads) as each:
        each.gather()
        each.fit()
        return each.calibration()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    synthetic.tiny_model(tmp_path / "model.gguf", n_layer=LAYERS, n_head=HEADS, n_head_kv=KV, head_dim=D)
    return tmp_path / "model.gguf"


def test_threads_change_nothing(model: Path) -> None:
    one, three = run(model, 1), run(model, 3)
    three.date = one.date
    assert_same(one, three)
    assert sorted(one.layers) == list(range(LAYERS))
    for name, array in one.stats.items():
        np.testing.assert_array_equal(array, three.stats[name])


@pytest.mark.parametrize("broken", [0, LAYERS - 1])  # in the first batch of layers, and in the last, which is not full
def test_an_error_in_a_thread_is_raised(model: Path, broken: int) -> None:
    with pytest.raises(FormatError, match=f"layer {broken}: values hold NaN"):
        run(model, 3, broken)


@pytest.mark.parametrize(("chunks", "held"), [(2, 1), (7, 1), (16, 4), (400, HELD_OUT_MOST)])
def test_some_of_every_text_is_held_out(chunks: int, held: int) -> None:
    np.testing.assert_array_equal(last(np.arange(chunks)), np.arange(chunks)[-held:])
