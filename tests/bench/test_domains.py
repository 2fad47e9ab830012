"""A matrix of domains that measures again what it has, loses what it had, or divides by another calibration's KLD."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import domains
from bench.domains import main, table
from bench.logs import RunError
from bench.perplexity import Perplexity


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A model that nothing runs: measured[(calibration, text)] counts; fail_at: the measurement that is interrupted."""
    made, measured, fail = [], [], SimpleNamespace(at=None)

    def calibrate(command: list[str], check: bool) -> None:
        made.append(command)
        Path(command[command.index("-o") + 1]).write_bytes(b"bases")

    def measure(run: Perplexity, cache: object) -> SimpleNamespace:
        name = Path(run.more[-1]).name.removeprefix("model-").removesuffix(".kvtc.gguf")
        if len(measured) == fail.at:
            raise RunError("stopped")
        measured.append((name, run.text.stem))
        return SimpleNamespace(kld=0.001 * len(measured), errors={"kld": 0.0001})

    monkeypatch.setattr(domains.subprocess, "run", calibrate)
    monkeypatch.setattr(Perplexity, "measure", measure)
    monkeypatch.setattr(Perplexity, "save_base", lambda run: run.base.write_bytes(b"logits"))
    monkeypatch.setattr(domains.corpora, "text", lambda kind, held_out: f"{kind} {held_out}")
    model = tmp_path / "model.gguf"

    def run(*candidate: str, judged: tuple[str, ...] = ("prose", "code")) -> list[dict[str, str]]:
        options = {"candidate": list(candidate), "judged": list(judged), "tokens": [512], "caches": ["kvtc-k2v4"]}
        main(model, tmp_path / "out.csv", tmp_path, work=tmp_path / "work", more="-ngl 9", threads=1, **options)
        with (tmp_path / "out.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return SimpleNamespace(run=run, made=made, measured=measured, fail=fail, folder=tmp_path)


def test_a_stopped_matrix_keeps_its_figures_and_goes_on(bench: SimpleNamespace) -> None:
    bench.fail.at = 7
    with pytest.raises(RunError):
        bench.run("docs=--corpus docs=1")
    assert not list((bench.folder / "work").glob("*.kld"))  # gigabytes
    with (bench.folder / "out.csv").open(newline="") as file:
        before = list(csv.DictReader(file))
    assert len(before) == 7 and len(bench.made) == 6
    bench.fail.at = None
    rows = bench.run("docs=--corpus docs=1")
    assert rows[:7] == before and len(rows) == 12 == len(set(bench.measured)) == len(bench.measured)
    assert len(bench.made) == 6 and bench.made[-1][-2:] == ["--corpus", "docs=1"]
    assert bench.run("docs=--corpus docs=1") == rows and len(bench.measured) == 12


def test_texts_that_are_there_stay(bench: SimpleNamespace) -> None:
    (bench.folder / "work").mkdir()
    (bench.folder / "work" / "prose-held-out.txt").write_text("another machine's")
    bench.run(judged=("prose",))
    assert (bench.folder / "work" / "prose-held-out.txt").read_text() == "another machine's"
    assert (bench.folder / "work" / "prose.txt").read_text() == "prose False"


def test_each_kind_is_divided_by_the_calibration_on_itself() -> None:
    values = {("prose-512", "prose"): 2, ("prose-512", "code"): 6, ("code-512", "prose"): 3, ("code-512", "code"): 4}
    values |= {("mix", "prose"): 5, ("mix", "code"): 5}
    rows = [
        {"calibrated": made, "judged": kind, "cache": "kvtc-k2v4", "kld": str(kld), "error": "0.0"}
        for (made, kind), kld in values.items()
    ]
    lines = [line.replace(" ± 0.000", "") for line in table(rows, "kvtc-k2v4").splitlines()]
    assert "| over 512 | prose | code |" in lines
    assert {"| prose-512 | 1.000 | 1.500 |", "| code-512 | 1.500 | 1.000 |", "| mix | 2.500 | 1.250 |"} <= set(lines)
