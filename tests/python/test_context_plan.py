"""A plan whose context does not fit, or that leaves room for a longer one: fails here.

Needs the patched libraries in build/bin (`make build`); tests/serving/test_planned_sizes.py asks llama-server.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import synthetic
from hypothesis import example, given
from hypothesis import strategies as st
from kvtc_gguf import plan
from kvtc_gguf.dry_run import DryRun, types_of
from kvtc_gguf.fingerprint import fingerprint
from kvtc_gguf.format import write
from kvtc_gguf.layout import FormatError
from typer.testing import CliRunner


@given(
    a=st.floats(0, 100), b=st.floats(1e-4, 1), kink=st.integers(0, 500), jump=st.floats(0, 50),
    budget=st.floats(0, 400), most=st.integers(0, 1000),
)  # fmt: skip
@example(a=0.0, b=1e-4, kink=40, jump=2.0, budget=0.0, most=80)
def test_the_longest_that_fits_is_found_in_few_steps(
    a: float, b: float, kink: int, jump: float, budget: float, most: int
) -> None:
    calls = []

    def measure(n: int) -> float:
        calls.append(n)
        return a + b * n + jump * (n > kink * 8)

    found = plan.longest(measure, budget, most * 8, 8)
    fitting = [n for n in range(8, most * 8 + 1, 8) if a + b * n + jump * (n > kink * 8) <= budget]
    assert found == (max(fitting) if fitting else 0)
    assert len(calls) == len(set(calls)) <= 24


@pytest.mark.parametrize(
    "text, mib", [("32GiB", 32768), ("1.5 GB", 1536), ("800m", 800), ("2097152", 2), ("64KiB", 1 / 16)]
)
def test_sizes_are_read_as_written(text: str, mib: float) -> None:
    assert plan.mib(text) == mib


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "3 apples", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="no size"):
        plan.mib(text)


def test_cache_names_are_those_of_the_tools() -> None:
    assert types_of("kvtc-k2v4") == ("kvtc2", "kvtc4") and types_of("q8_0") == ("q8_0", "q8_0")
    assert types_of("kvtc2/f16") == ("kvtc2", "f16")
    for wrong in ("kvtc-k9v4", "q9_0", "/f16"):
        with pytest.raises(FormatError, match="no cache type"):
            types_of(wrong)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "model.gguf"
    synthetic.tiny_model(path)
    write(
        synthetic.calibration(2, 2, 32, fingerprint=fingerprint(path)),
        path.with_name("model.kvtc.gguf"),
    )
    return path


def test_a_plan_names_the_longest_context_of_every_type(model: Path) -> None:
    arguments = [str(model), "--vram", "5MiB", "--json", "-np", "1", "-np", "3", "--ctx-max", "100000"]
    for name in ("f16", "kvtc-k2v4"):
        arguments += ["-ct", name]
    result = CliRunner().invoke(plan.app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["cache"], row["slots"]) for row in rows] == [
        ("f16", 1),
        ("f16", 3),
        ("kvtc-k2v4", 1),
        ("kvtc-k2v4", 3),
    ]
    with DryRun(model) as run:
        for row in rows:
            assert row["ctx"] % (256 * row["slots"]) == 0 and row["ctx"] and not row["limited"]
            sizes = run.sizes(row["cache"], row["ctx"], row["slots"])
            assert sizes.total == pytest.approx(row["total"]) and sizes.total <= 5
            assert run.sizes(row["cache"], row["ctx"] + 256 * row["slots"], row["slots"]).total > 5
            assert (sizes.bases > 0) == (sizes.exact > 0) == row["cache"].startswith("kvtc")
    assert rows[2]["ctx"] > 2 * rows[0]["ctx"]


def test_the_trained_context_and_too_little_memory_are_said(model: Path) -> None:
    table = CliRunner().invoke(plan.app, [str(model), "--vram", "1GiB", "-ct", "q8_0", "-np", "2"])
    assert table.exit_code == 0 and "8,192*" in table.stdout and "4,096" in table.stdout, table.output
    table = CliRunner().invoke(plan.app, [str(model), "--vram", "1MiB", "-ct", "q8_0", "-np", "2"])
    assert table.exit_code == 0 and "does not fit" in table.stdout


def test_bad_input_is_one_line(model: Path, tmp_path: Path) -> None:
    synthetic.tiny_model(tmp_path / "model.gguf", seed=1)
    for arguments, words in (
        ([model, "--vram", "lots"], "no size"),
        ([model, "--vram", "1GiB", "-ct", "q9"], "no cache type"),
        ([tmp_path / "absent.gguf", "--vram", "1GiB"], "no such model file"),
        ([tmp_path / "model.gguf", "--vram", "1GiB", "-ct", "kvtc-k2v4"], "kvtc_gguf.calibrate"),
    ):
        result = CliRunner().invoke(plan.app, [str(a) for a in arguments])
        assert result.exit_code == 1 and words in result.stderr, result.stderr
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
