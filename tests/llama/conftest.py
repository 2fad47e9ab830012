"""Tiny models for tests of libllama. One layer: its keys and values depend on their own token alone, so that a cache
with any tokens at any positions can be computed anew, and what an operation lost shows."""

from __future__ import annotations

import driver
import pytest
import synthetic
import tools
from kvtc_gguf.format import write


@pytest.fixture(autouse=True)
def listening() -> None:
    driver.listen()


@pytest.fixture(scope="session")
def one(tmp_path_factory) -> driver.Model:
    """One layer, heads of 64: upstream cannot shift quantised keys of heads that are no multiple of that."""
    path = tmp_path_factory.mktemp("one") / "one.gguf"
    synthetic.tiny_model(path, n_layer=1, head_dim=64)
    write(tools.calibration_of(path, 1, head_dim=64), path.with_suffix(".kvtc.gguf"))
    return driver.Model(path)


@pytest.fixture(scope="session")
def two(tmp_path_factory) -> driver.Model:
    """Two layers, NeoX pairs and biases."""
    return driver.Model(tools.calibrated_model(tmp_path_factory.mktemp("two") / "two.gguf", "qwen2"))


@pytest.fixture(scope="session")
def sliding(tmp_path_factory) -> driver.Model:
    """gemma2: a sliding window of 64 tokens in every other of four layers."""
    return driver.Model(tools.adapted_model(tmp_path_factory.mktemp("sliding") / "gemma2.gguf", "gemma2"))
