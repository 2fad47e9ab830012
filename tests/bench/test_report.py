"""Failures caught: a table that hides a failure, mixes engines or loses a depth; a front with a point that another
beats; a change called noise or noise called a change; plots that cannot be made again from the file."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from bench import plot, table
from bench.compare import changes
from bench.frame import frame, front, load
from bench.results import COLUMNS, Figure, Results
from bench.table import report
from bench.verdict import verdicts


def row(metric: str, value: float | None, **more: object) -> dict[str, str]:
    facts = {"engine": "ours", "model": "m", "cache": "q8_0", "test": "speed", "depth": 0, "unit": "t/s", "cpu": "c"}
    facts |= {"threads": 2, "metric": metric, "value": "" if value is None else value}
    return dict.fromkeys(COLUMNS, "") | {name: str(x) for name, x in (facts | more).items()}


def test_report_has_every_figure_and_every_failure(measured):
    text = (measured.folder / "out.md").read_text()
    quality = next(x for x in text.splitlines() if "kvtc2 / kvtc4" in x)
    cells = [cell.strip() for cell in quality.split("|")[1:-1]]
    assert cells[:5] == ["model", "ours", "kvtc2 / kvtc4", "3", "4 + 128"]
    assert cells[5:] == ["0.0080 ± 0.0010", "0.754", "26.79 ± 1.27", "86.5", "9.07"]
    assert "| model | kvtc-k2v4 (ours) | 200.0 ± 0.0 (2.00) | 200.0 ± 0.0 (2.00) |" in text  # pp16 at 0 and 64
    assert "| model | q8_0 (stock) | 1.000 ± 0.000 | 1.000 ± 0.000 |" in text
    assert "| model | kvtc-k2v4 (ours) | 9.07 | 12.24 |" in text
    assert "| model | q8_0 (ours) | 100% of 8 |" in text
    assert "| model | turbo9 (ours) | quality | " in text and "| model | turbo9 (stock) | quality | " in text
    assert "| model | turbo9 (ours) | speed, memory, multikey | llama-completion failed: error: invalid" in text
    assert "| model | turbo9 (stock) | speed, memory | llama-completion failed: error: invalid" in text
    told = verdicts(load(measured.csv))
    assert "the front of KLD over bpv is kvtc-k2v4 (ours) (3 bpv, 0.0080), q8_0 (ours) (8.5 bpv, 0.0040)." in told[0]
    assert any("stock over ours: 8 of 8 speeds are equal" in line for line in told)
    assert any("stock and ours: KLD of 2 caches differs by at most 0.04422 (model, f16)" in line for line in told)


def test_plots_are_written_and_the_same_again(measured):
    paths = [measured.folder / f"out-{name}.svg" for name in ("kld", "speed", "memory")]
    before = [path.read_bytes() for path in paths]
    assert [b"kvtc-k2v4" in image for image in before] == [True] * 3
    assert plot.write(measured.csv, measured.folder) == paths
    assert [path.read_bytes() for path in paths] == before


def test_front_has_no_point_that_another_beats():
    import pandas as pd

    points = pd.DataFrame({"bpv": [2, 3, 3, 4, 8.5], "kld": [0.02, 0.03, 0.01, 0.01, 0.004]})
    assert list(front(points)["bpv"]) == [2, 3, 8.5]
    assert list(front(points)["kld"]) == [0.02, 0.01, 0.004]


def test_slower_engine_is_told():
    rows = [row("pp512", 100), row("pp512/ours", 0.9, engine="stock", unit="ratio", spread=0.02, n=5),
            row("tg32/ours", 0.99, engine="stock", unit="ratio", spread=0.02, n=4)]  # fmt: skip
    (line,) = [x for x in verdicts(frame(rows)) if "stock over ours" in x]
    assert "1 of 2 speeds are equal" in line and "not q8_0 pp512 at 0: 0.900" in line


@pytest.mark.parametrize(("old", "new", "spreads", "told"), [
    (100, 96, (3, 3), ""),  # within two combined spreads
    (100, 90, (3, 3), "worse"),
    (100, 110, (3, 3), "better"),
    (100, 96, ("", ""), ""),  # one repetition: 5%
    (100, 90, ("", 3), "worse"),
])  # fmt: skip
def test_change_is_told_beyond_the_spread_alone(old, new, spreads, told):
    lines = changes([row("tg32", old, spread=spreads[0])], [row("tg32", new, spread=spreads[1])])
    assert [told in line for line in lines] == ([True] if told else [])


def test_change_of_sizes_and_errors_is_told_by_its_direction():
    (line,) = changes([row("total", 10.0, unit="MiB", test="memory")], [row("total", 10.1, unit="MiB", test="memory")])
    assert "worse" in line and "10 -> 10.1 MiB (+1.0%)" in line
    (line,) = changes([row("kld", 0.02, unit="nats/token", spread=0.001)],
                      [row("kld", 0.01, unit="nats/token", spread=0.001)])  # fmt: skip
    assert "better" in line


def test_lost_and_failing_figures_are_told_and_other_machines_are_not_compared():
    old = [row("tg32", 100), row("tg32", 100, cache="f16"), row("tg32", 100, cache="q4_0")]
    new = [row("tg32", 50, cpu="another"), row("", None, cache="f16", error="out of memory")]
    lines = changes(old, new)
    assert any("f16" in x and "now fails: out of memory" in x for x in lines)
    assert any("q4_0" in x and "no longer there" in x for x in lines)
    assert lines[-1].startswith("1 speeds are of another machine") and len(lines) == 3


def test_command_compares_with_an_older_file(tmp_path):
    app = typer.Typer()
    app.command()(table.main)
    for name, speed in (("old", 100.0), ("new", 50.0)):
        results = Results(tmp_path / f"{name}.csv")
        results.put(row("", None), [Figure("tg32", speed, "t/s", 1.0, 3)])
    result = CliRunner().invoke(app, [str(tmp_path / "new.csv"), "--compare", str(tmp_path / "old.csv")])
    assert result.exit_code == 0 and "tg32 at 0: 100 -> 50 t/s (-50.0%), worse" in result.output
    result = CliRunner().invoke(app, [str(tmp_path / "none.csv")])
    assert result.exit_code == 1 and result.output.startswith("kvtc: ")


def test_report_of_failures_alone_is_no_crash():
    rows = [row("", None, error="no such type")]
    assert "| m | q8_0 | speed | no such type |" in report(frame(rows))
