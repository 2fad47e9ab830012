"""Inspect prints what the file holds, for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import synthetic
from kvtc_gguf.format import read, write
from kvtc_gguf.inspect import app, widths_summary
from typer.testing import CliRunner


@pytest.fixture
def file(tmp_path):
    calibration = synthetic.calibration(2, 2, 64, 32, bits=(2, 4))
    calibration.layers[1]["v"].transforms = ["pca", "hadamard"]
    write(calibration, tmp_path / "a.kvtc.gguf")
    return tmp_path / "a.kvtc.gguf"


def test_json_holds_every_width_and_the_bits_they_cost(file):
    result = CliRunner().invoke(app, [str(file), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["bits"] == [2, 4] and report["fingerprint"] == "0123456789abcdef"
    assert [(row["layer"], row["side"]) for row in report["layers"]] == [(0, "k"), (0, "v"), (1, "k"), (1, "v")]
    for row in report["layers"]:
        for budget in row["budgets"]:
            assert budget["bpv"] == budget["bits"]
            groups = row["n_head"] * row["head_dim"] // 8
            assert sum(map(sum, budget["widths"])) == pytest.approx(budget["code_bpv"] * groups)
            assert 0 < budget["code_bpv"] < budget["bits"] and budget["used_bytes"] <= budget["row_bytes"]


def test_table_names_layers_transforms_and_model(file):
    command = [sys.executable, "-m", "kvtc_gguf.inspect", str(file)]
    result = subprocess.run(
        command, capture_output=True, text=True, env={"COLUMNS": "200", "PYTHONPATH": ":".join(sys.path)}
    )
    assert result.returncode == 0, result.stderr
    for word in (
        "0123456789abcdef",
        "llama",
        "kvtc2 kvtc4",
        "2 of 2",
        "pca, hadamard",
        "random×2",
        "2×64",
        "2×32",
    ):
        assert word in result.stdout, word


def test_layers_that_keep_other_bits_than_asked_are_named(file):
    plain = CliRunner().invoke(app, [str(file)])
    assert "kept" not in plain.output and "as asked" not in plain.output
    calibration = read(file)
    calibration.layer_bits = {"k": [[4, 2], [4, 4]]}  # one layer of two has 4 bits where 2 are asked for
    write(calibration, file)
    report = json.loads(CliRunner().invoke(app, [str(file), "--json"]).stdout)
    assert report["adaptive"] == ["k"] and report["bpv"] == {"k": [3.0, 4.0], "v": [2.0, 4.0]}
    kept = [[(k["asked"], k["type"], k["bpv"]) for k in row["kept"]] for row in report["layers"]]
    assert kept == [[(2, "kvtc4", 4.0), (4, "kvtc4", 4.0)], *[[(2, "kvtc2", 2.0), (4, "kvtc4", 4.0)]] * 3]
    result = subprocess.run(
        [sys.executable, "-m", "kvtc_gguf.inspect", str(file)],
        capture_output=True,
        text=True,
        env={"COLUMNS": "200", "PYTHONPATH": ":".join(sys.path)},
    )
    for word in ("K by layer", "kvtc2: 3.00, kvtc4: 4.00 bpv", "kvtc2 → kvtc4", "as asked"):
        assert word in result.stdout, word


def test_a_file_without_calibration_is_one_line_and_exit_code_1(tmp_path):
    synthetic.tiny_model(tmp_path / "model.gguf", n_layer=1)
    result = CliRunner().invoke(app, [str(tmp_path / "model.gguf")])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_widths_are_summed_up():
    assert widths_summary([[8, 2, 0], [2, 2, 0]]) == "8…0\n2.33"
