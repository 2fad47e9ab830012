"""Failures caught: a notebook that no longer runs from top to bottom, or loses a picture."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
import tools
from nbclient import NotebookClient

from tests.examples.test_examples import EXAMPLES, environment

PICTURES = 3  # spectrum, allocation, quality against size


def test_tour_runs_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tools.calibrated_model(tmp_path / "llama.gguf")
    for name, value in {**environment(), "KVTC_TOUR_MODEL": str(model), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    path = f"{environment()['PYTHONPATH']}:{tools.ROOT / 'python'}"
    monkeypatch.setenv("PYTHONPATH", path)
    notebook = nbformat.read(EXAMPLES / "kvtc_tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # none in the repository: they would go stale
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES
    assert all(output.output_type != "error" for output in outputs)
