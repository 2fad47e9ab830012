"""Failures caught: lm-eval's route that no longer runs, needs a download, or scores without the compressed cache,
scores of transformers' cache that are not llama.cpp's. Slow: `make examples-test` installs what this needs and runs it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import tools

from tests.examples.test_examples import EXAMPLES, environment

MODEL = tools.ROOT / "build" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS, CHOICES = 12, 4
LIMIT = 1200  # seconds; transformers evaluates f32 weights
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., np.ndarray]:
    """Log probabilities f64 [questions, CHOICES] of one run of the example, during which nothing can be fetched."""
    sidecar = MODEL.with_name(MODEL.name.removesuffix(".gguf") + ".kvtc.gguf")
    assert sidecar.is_file(), "run `make calibration`"
    offline = {"HF_HOME": str(tmp_path_factory.mktemp("hf")), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    found = environment()
    paths = os.pathsep.join([found["PYTHONPATH"], str(tools.ROOT / "python")])

    def run(*arguments: object) -> np.ndarray:
        command = [sys.executable, str(EXAMPLES / "lm_eval_task.py"), str(MODEL), *map(str, arguments)]
        env = {**found, **offline, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=LIMIT)
        assert result.returncode == 0, result.stderr
        assert re.search(r"^accuracy [01]\.\d{3}$", result.stdout, re.M), result.stdout
        rows = re.findall(r"\?((?: -\d+\.\d{3})+)$", result.stdout, re.M)
        return np.array([row.split() for row in rows], float)

    return run


def test_scores_come_from_the_compressed_cache_and_are_near_the_exact_ones(scores) -> None:
    exact, coded = scores("--cache-type", "f16"), scores()
    assert exact.shape == coded.shape == (QUESTIONS, CHOICES)
    assert np.abs(coded - exact).mean() > 0.01  # the passage is longer than sinks and window
    assert np.corrcoef(coded.ravel(), exact.ravel())[0, 1] > 0.98


def test_scores_of_transformers_cache_are_llama_cpps(scores) -> None:
    ours, theirs = scores("--limit", 2), scores("--limit", 2, "--transformers")
    assert ours.shape == theirs.shape == (2, CHOICES)
    # llama.cpp rounds activations to 8 bits where weights are quantised
    assert np.abs(ours - theirs).mean() < 0.05 * np.abs(ours).mean()
