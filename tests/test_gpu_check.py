"""The GPU check without a GPU: what it makes of figures, and of tools that fail.

Failures caught: a step that fails and is not reported, or keeps the others from running; a ratio over another depth's
base; a verdict that hides the worst depth; rows of llama-bench that are lost; a kernel's figures under another's name,
or in other units; ceilings that are no measurement; a cache whose parts do not add up, or a buffer counted twice.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import gpu_check, gpu_memory, nsight
from bench.gpu_verdict import ratios, verdicts
from bench.logs import parse_sizes
from bench.speed import Speed, parse_bench


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


NSIGHT = """==PROF== Connected to process 7
k2v4 1 tokens, 1024 cells: 12.6 us
"ID","Process ID","Kernel Name","Grid Size","Block Size","Metric Name","Metric Unit","Metric Value"
"0","7","void kvtc::<unnamed>::decode_cells_sm90<128, 3, 1>(kvtc::attn_args, float *)","(16, 8, 1)","(384, 1, 1)","gpu__time_duration.sum","ns","190,000"
"0","7","void kvtc::<unnamed>::decode_cells_sm90<128, 3, 1>(kvtc::attn_args, float *)","(16, 8, 1)","(384, 1, 1)","launch__registers_per_thread","register/thread","168"
"1","7","void kvtc::<unnamed>::combine_few<128>(float *)","(4, 8, 1)","(256, 1, 1)","gpu__time_duration.sum","ns","3,400"
"2","7","void kvtc::<unnamed>::decode_cells_sm90<128, 3, 1>(kvtc::attn_args, float *)","(16, 8, 1)","(384, 1, 1)","gpu__time_duration.sum","ns","181,500"
"2","7","void kvtc::<unnamed>::decode_cells_sm90<128, 3, 1>(kvtc::attn_args, float *)","(16, 8, 1)","(384, 1, 1)","launch__registers_per_thread","register/thread","168"
"2","7","void kvtc::<unnamed>::decode_cells_sm90<128, 3, 1>(kvtc::attn_args, float *)","(16, 8, 1)","(384, 1, 1)","dram__bytes.sum.per_second","byte/second","550,000,000,000"
"""  # noqa: E501


def test_nsight_rows_are_those_of_each_kernels_last_launch():
    rows = {row[0]: dict(zip(nsight.COLUMNS, row, strict=True)) for row in nsight.parse(NSIGHT)}
    assert set(rows) == {"decode_cells_sm90<128, 3, 1>", "combine_few<128>"}
    decode = rows["decode_cells_sm90<128, 3, 1>"]
    assert (decode["us"], decode["gb_per_s"], decode["registers"]) == (181.5, 550.0, 168.0)
    assert decode["grid"] == "(16, 8, 1)" and decode["tensor_percent"] != decode["tensor_percent"]  # nan: not printed


def test_nsight_without_a_kernel_says_why():
    with pytest.raises(ValueError, match="ERR_NVGPUCTRPERM"):
        nsight.parse("==ERROR== ERR_NVGPUCTRPERM - no permission to read the counters\n")


def test_ceilings_are_measured_on_the_named_device():
    script = (
        "from bench import ceilings, kernels\nffi = kernels.load_libraries()\n"
        "found = ceilings.measure(ffi, kernels.time_nodes, 1 << 16, 64)\nprint(found.bandwidth, found.rate)\n"
    )
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"KVTC_TEST_DEVICE": "CPU", "PYTHONPATH": f"{root}:{root / 'python'}"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=root)
    assert run.returncode == 0, run.stderr
    bandwidth, rate = map(float, run.stdout.split()[-2:])
    assert 0 < bandwidth < 1e5 and 0 < rate < 1e3


MEMORY = """llama_kv_cache: size =    2.11 MiB (   512 cells,  30 layers,  1/1 seqs), K (kvtc2):    0.70 MiB, V (kvtc4):    1.41 MiB
print_info: 3.000 bpv, codes 2.11 MiB, exact rows 4.31 MiB (4 sinks, window 128, rollback 64, 196 slots), bases 9.81 MiB
sched_reserve:      CUDA0 compute buffer size =    49.32 MiB
sched_reserve:  CUDA_Host compute buffer size =     2.00 MiB
sched_reserve:      CUDA0 compute buffer size =    60.00 MiB
"""  # noqa: E501


def test_memory_is_split_into_parts_that_add_up():
    found = parse_sizes(MEMORY)
    assert (found.codes, found.exact, found.bases) == pytest.approx((2.11, 4.31, 9.81))
    assert found.cache == pytest.approx(16.23)
    assert found.compute == pytest.approx(62.0)
    stock = parse_sizes("llama_kv_cache: size =   22.50 MiB (1024 cells)\n")
    assert (stock.codes, stock.exact, stock.bases, stock.compute) == (22.5, 0, 0, 0)


def test_device_memory_is_the_most_that_was_seen(tmp_path, monkeypatch):
    count = tmp_path / "count"
    fake_tool(tmp_path, "nvidia-smi", f"echo x >> {count}; [ $(wc -l < {count}) = 2 ] && echo 900 || echo 500")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with gpu_memory.watched(0.01) as peak:
        while not count.exists() or len(count.read_text()) < 8:
            time.sleep(0.01)  # a busy loop would keep the watching thread from running
    assert peak.mib == 900
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with gpu_memory.watched(0.01) as peak:
        pass
    assert peak.mib is None
