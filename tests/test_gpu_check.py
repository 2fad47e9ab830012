"""The GPU check without a GPU: what it makes of figures, and of tools that fail.

Failures caught: a step that fails and is not reported, or keeps the others from running; a ratio over another depth's
base; a verdict that hides the worst depth; rows of llama-bench that are lost.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import gpu_check
from bench.gpu_verdict import Speed, parse_bench, ratios, verdicts


def row(kind: str, test: str, depth: int, speed: float) -> Speed:
    return Speed("m", kind, test, depth, speed, 0.0)


def test_ratio_is_over_the_base_at_the_same_depth():
    rows = [row("f16", "tg32", 0, 100), row("f16", "tg32", 4096, 50), row("kvtc-k2v4", "tg32", 4096, 60)]
    assert ratios(rows)[rows[2]] == pytest.approx(1.2)
    assert rows[2] not in ratios(rows, "q8_0")


def test_verdict_tells_the_worst_depth():
    rows = [row(kind, "tg32", depth, speed) for kind, depth, speed in (
        ("f16", 16384, 100), ("f16", 131072, 50), ("kvtc-k2v4", 16384, 90), ("kvtc-k2v4", 131072, 70))]  # fmt: skip
    told = dict(verdicts(rows))
    assert [met for text, met in told.items() if "from 16384" in text] == [False]
    assert any("0.90 x f16 at 16384" in text for text in told)
    assert [met for text, met in told.items() if "from 131072" in text] == [True]


def test_bench_rows_are_read_and_broken_ones_refused():
    good = {"n_prompt": 512, "n_gen": 0, "n_depth": 4096, "avg_ts": 10.5, "stddev_ts": 0.5}
    assert parse_bench(f"noise\n{json.dumps(good)}\n", "m", "f16") == [Speed("m", "f16", "pp512", 4096, 10.5, 0.5)]
    with pytest.raises(ValueError, match="no row"):
        parse_bench("error: failed to load model\n", "m", "f16")
    with pytest.raises(ValueError, match="cannot be read"):
        parse_bench('{"n_prompt": 512', "m", "f16")


def steps(out: Path) -> dict[str, list[str]]:
    with (out / "steps.csv").open(encoding="utf-8") as file:
        return {name: rest for name, *rest in list(csv.reader(file))[1:]}


def fake_tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def test_failed_step_is_a_row_and_the_next_one_runs(tmp_path, monkeypatch):
    tools, out = tmp_path / "bin", tmp_path / "out"
    fake_tool(tools, "test-backend-ops", "echo KVTC_ATTN FAIL; exit 1")
    fake_tool(tools, "llama-bench", 'echo \'{"n_prompt":0,"n_gen":32,"n_depth":0,"avg_ts":9.5,"stddev_ts":0.1}\'')
    out.mkdir()
    (out / "llama-8b.gguf").touch()
    arguments = ["--bin", str(tools), "--out", str(out), "--shapes", "llama-8b", "--types", "f16,kvtc-k2v4"]
    monkeypatch.setenv("COLUMNS", "300")
    app = gpu_check.typer.Typer()
    app.command()(gpu_check.main)
    result = CliRunner().invoke(app, [*arguments, "--only", "backend-ops,bench,quality"])
    assert result.exit_code == 1
    told = steps(out)
    assert told["backend-ops"][0] == "failed" and "FAIL" in told["backend-ops"][1]
    assert told["bench"][0] == "ok"
    assert told["quality"][0] == "not run"
    assert "quality (no --model" in result.output and "sanitize (not asked for)" in result.output
    with (out / "bench.csv").open(encoding="utf-8") as file:
        assert [line["type"] for line in csv.DictReader(file)] == ["f16", "kvtc-k2v4"]


def test_absent_tools_are_named(tmp_path):
    check = gpu_check.Check(tmp_path, "CUDA0", tmp_path, True, [], [], "0", [], None)
    with pytest.raises(gpu_check.StepError, match="make cuda"):
        check.run("x", tmp_path / "llama-bench")


def test_unknown_step_is_refused():
    app = gpu_check.typer.Typer()
    app.command()(gpu_check.main)
    result = CliRunner().invoke(app, ["--only", "speed"])
    assert result.exit_code != 0 and "unknown step speed" in result.output
