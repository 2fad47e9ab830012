"""The GPU check without a GPU: what it makes of figures, and of tools that fail.

Failures caught: a step that fails and is not reported, or keeps the others from running; one that passed and is run
again, or counts for another build or card; a ratio over another depth's base; a verdict that hides the worst depth, or
calls a target met that nothing measured; rows of llama-bench that are lost; a kernel's figures under another's name,
or in other units; ceilings that are no measurement, a floor without the work; a cache whose parts do not add up, or a
buffer counted twice, or on the device that lies on the host.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from bench import gpu_check, gpu_memory, gpu_run, gpu_steps, gpu_verdict, kernels, nsight
from bench.gpu_verdict import ratios
from bench.logs import parse_sizes
from bench.speed import Speed, parse_bench


def row(kind: str, test: str, depth: int, speed: float) -> Speed:
    return Speed("m", kind, test, depth, speed, 0.0)


def test_ratio_is_over_the_base_at_the_same_depth():
    rows = [row("f16", "tg32", 0, 100), row("f16", "tg32", 4096, 50), row("kvtc-k2v4", "tg32", 4096, 60)]
    assert ratios(rows)[rows[2]] == pytest.approx(1.2)
    assert rows[2] not in ratios(rows, "q8_0")


def test_verdict_tells_the_worst_depth_and_type():
    rows = [row(kind, "tg32", depth, speed) for kind, depth, speed in (
        ("f16", 16384, 100), ("f16", 131072, 50), ("kvtc-k2v4", 16384, 90), ("kvtc-k2v4", 131072, 70),
        ("kvtc-k1v3", 16384, 110), ("kvtc-k1v3", 131072, 75))]  # fmt: skip
    told = {t.name: t for t in gpu_verdict.speeds(rows, "m")}
    deep, deepest = told["tg >= 1.0 x f16 from 16384 on"], told["tg >= 1.3 x f16 from 131072 on"]
    assert not deep.met and deep.text == "1 of 2 types: k2v4 0.90 at 16384, k1v3 1.10 at 16384"
    assert deepest.met
    assert told["tg >= 1.0 x q8_0"].met is None and told["pp >= 0.95 x f16"].verdict == "not run"


def test_medians_of_processes_keep_bytes_operations_and_floor():
    rows = [("m", "k2v4", 1, depth, us, 6000 / us, 300 / us, us / 5, 3000.0, 600.0) for depth, us in ((1, 10), (2, 30))]
    slow = [(*row[:4], 2 * row[4], *row[5:]) for row in rows]
    fast = [(*row[:4], row[4] - 1, *row[5:]) for row in rows]
    told = kernels.combine([pd.DataFrame(table, columns=kernels.COLUMNS) for table in (slow, rows, fast)])
    assert list(told["depth"]) == [1, 2] and list(told["us"]) == [10, 30]
    one = pd.DataFrame(rows, columns=kernels.COLUMNS)
    pd.testing.assert_frame_equal(kernels.combine([one, one.assign(us=99.0), one]), one, check_dtype=False)


def test_floor_is_of_all_that_the_operation_must_do():
    shape = kernels.SHAPES["llama-8b"]
    one = kernels.count_products(shape, 1, 131072)
    assert one == 4 * 32 * 128 * 131072
    seen = sum(range(1000 - 512 + 1, 1001))  # by each of the last 512 tokens of 1000
    assert kernels.count_products(shape, 512, 1000) == 4 * 32 * 128 * seen
    assert kernels.count_rebuild(shape, 131072) == 2 * 8 * 128 * 128 * 131072
    rows = [
        {"shape": "m", "type": kind, "tokens": "1", "depth": depth, "over_floor": x}
        for kind, depth, x in (("f16", "131072", "9"), ("k2v4", "1024", "9"), ("k2v4", "131072", "2.49"))
    ]
    decode, prompt = gpu_verdict.floors(rows, "m")
    assert decode.met and prompt.met is None


def test_memory_is_judged_by_the_cache_and_by_what_is_beside_it():
    def sizes(kind: str, cache: float, rest: float) -> dict[str, str]:
        return {"model": "m", "type": kind, "cache_mib": str(cache), "rest_mib": str(rest), "device_mib": "1"}

    cache, scratch = gpu_verdict.memories([sizes("f16", 1000, 500), sizes("kvtc-k2v4", 201, 755)], "m")
    assert (cache.met, scratch.met) == (False, True)
    assert gpu_verdict.memories([sizes("f16", 1000, 500)], "m")[0].met is None


def test_quality_is_within_two_percent_or_not_run():
    rows = [{"model": "m", "ubatch": "512", "kld_device": "0.1", "kld_cpu": "0.103", "change": "-0.029"}]
    assert [t.met for t in gpu_verdict.qualities(rows, ["m"])] == [False, None]


def test_bench_rows_are_read_and_broken_ones_refused():
    good = {"n_prompt": 512, "n_gen": 0, "n_depth": 4096, "samples_ts": [7.5, 10.5, 11.0], "stddev_ts": 0.5}
    assert parse_bench(f"noise\n{json.dumps(good)}\n", "m", "f16") == [Speed("m", "f16", "pp512", 4096, 10.5, 0.5)]
    with pytest.raises(ValueError, match="no row"):
        parse_bench("error: failed to load model\n", "m", "f16")
    with pytest.raises(ValueError, match="cannot be read"):
        parse_bench('{"n_prompt": 512', "m", "f16")
    with pytest.raises(ValueError, match="cannot be read"):
        parse_bench(json.dumps(good | {"samples_ts": []}), "m", "f16")


def steps(out: Path) -> dict[str, list[str]]:
    with (out / "steps.csv").open(encoding="utf-8") as file:
        return {name: rest for name, *rest in list(csv.reader(file))[1:]}


def fake_tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def invoke(*arguments: object):
    app = gpu_check.typer.Typer()
    app.command()(gpu_check.main)
    return CliRunner().invoke(app, [str(x) for x in arguments])


def test_failed_step_is_a_row_and_the_next_one_runs(tmp_path, monkeypatch):
    tools, out = tmp_path / "bin", tmp_path / "out"
    fake_tool(tools, "test-backend-ops", "echo KVTC_ATTN FAIL; exit 1")
    bench = f"echo x >> {tmp_path}/runs; "
    bench += 'echo \'{"n_prompt":0,"n_gen":32,"n_depth":0,"samples_ts":[9.5],"stddev_ts":0.1}\''
    fake_tool(tools, "llama-bench", bench)
    out.mkdir()
    (out / "llama-8b.gguf").touch()
    arguments = ["--bin", tools, "--out", out, "--shapes", "llama-8b", "--types", "f16,kvtc-k2v4"]
    monkeypatch.setenv("COLUMNS", "300")
    result = invoke(*arguments, "--only", "backend-ops,bench,quality")
    assert result.exit_code == 1
    told = steps(out)
    assert told["backend-ops"][0] == "failed" and "FAIL" in told["backend-ops"][1]
    assert told["bench"][0] == "ok"
    assert told["quality"][0] == "not run"
    assert "quality (no --model" in result.output and "memcheck (not asked for)" in result.output
    with (out / "bench.csv").open(encoding="utf-8") as file:
        assert [line["type"] for line in csv.DictReader(file)] == ["f16", "kvtc-k2v4"]
    verdicts = {line["target"]: line["verdict"] for line in csv.DictReader((out / "targets.csv").open())}
    assert verdicts["test-backend-ops passes"] == "NOT met" and verdicts["memcheck is clean"] == "not run"

    count = (tmp_path / "runs").read_text().count("x")
    result = invoke(*arguments, "--only", "bench")  # has passed, and the failed step is not forgotten
    assert result.exit_code == 0 and "2 commands had passed" in result.output
    assert (tmp_path / "runs").read_text().count("x") == count
    assert steps(out)["backend-ops"][0] == "failed"
    invoke(*arguments, "--only", "bench", "--redo")
    assert (tmp_path / "runs").read_text().count("x") == count + 2


def test_what_has_passed_counts_for_its_build_and_card(tmp_path, monkeypatch):
    fake_tool(tmp_path, "tool", f"echo x >> {tmp_path}/runs")

    def run(build: str, card: str, timed: bool, **more) -> int:
        runner = gpu_run.Runner(tmp_path, tmp_path / "out", build=build, card=card, timed=timed)
        runner.run("tool", tmp_path / "tool", **more)
        return (tmp_path / "runs").read_text().count("x")

    assert run("a", "A", False) == run("a", "B", False) == 1
    assert run("b", "B", False) == 2
    assert run("b", "B", True) == run("b", "B", True) == 3
    assert run("b", "A", True) == 4
    assert run("b", "A", True, makes=tmp_path / "none") == 5
    (tmp_path / "libx.so").write_bytes(b"1")
    before = gpu_run.hash_build(tmp_path)
    (tmp_path / "libx.so").write_bytes(b"2")
    assert gpu_run.hash_build(tmp_path) != before


def test_nothing_is_begun_when_the_time_is_over(tmp_path):
    runner = gpu_run.Runner(tmp_path, tmp_path / "out", seconds=1, began=time.monotonic() - 2)
    with pytest.raises(gpu_run.NotRun, match="again to go on"):
        runner.run("x", "true")


def test_absent_tools_are_named(tmp_path):
    with pytest.raises(gpu_run.StepError, match="make cuda"):
        gpu_run.Runner(tmp_path, tmp_path).run("x", tmp_path / "llama-bench")


def test_parts_of_the_cases_are_added_up(tmp_path, monkeypatch):
    runner = gpu_run.Runner(tmp_path, tmp_path)
    told = [
        "noise\n10 cases, 0 failed, largest error 1.9e-05, 3 s\n",
        "9 cases, 0 failed, largest error 2.0e-06, 4 s\n",
    ]
    monkeypatch.setattr(runner, "run_parts", lambda name, commands: told)
    check = gpu_steps.Check(runner, True, [], [], "0", [], None)
    assert gpu_steps.check_kernels(check) == "19 cases, 0 failed, largest error 1.9e-05"
    told[1] = "Segmentation fault\n"
    with pytest.raises(gpu_run.StepError, match=r"check-1\.log"):
        gpu_steps.check_kernels(check)


def test_unknown_step_is_refused():
    result = invoke("--only", "speed")
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
load_tensors:   CPU_Mapped model buffer size =   281.81 MiB
load_tensors:        CUDA0 model buffer size =  4155.99 MiB
"""  # noqa: E501


def test_memory_is_split_into_parts_that_add_up():
    found = parse_sizes(MEMORY)
    assert (found.codes, found.exact, found.bases) == pytest.approx((2.11, 4.31, 9.81))
    assert found.cache == pytest.approx(16.23)
    assert (found.compute, found.host, found.weights) == pytest.approx((62.0, 2.0, 4155.99))
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
