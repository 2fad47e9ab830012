"""A report that lacks a figure, needs another file or the network, or leaves half a page: fails here."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import synthetic
from damage import adaptive
from kvtc_gguf import inspect, report
from kvtc_gguf.fit import SCORE_BITS
from kvtc_gguf.format import Calibration, read, write
from kvtc_gguf.report_figures import FIGURES
from typer.testing import CliRunner


def measured(seed: int = 0) -> Calibration:
    """A calibration with all that a report draws."""
    rng, calibration = np.random.default_rng(seed), adaptive(synthetic.calibration(3, 2, 64, 32, bits=(2, 4)))
    for layer in calibration.layers:
        for side, d in (("k", 64), ("v", 32)):
            calibration.stats[f"blk.{layer}.{side}.error"] = rng.random(len(SCORE_BITS)).astype(np.float32)
            calibration.stats[f"blk.{layer}.{side}.histogram"] = rng.random((2, d // 8, 64)).astype(np.float32)
        spectrum = np.sort(rng.random((2, 2, 64)), axis=2)[..., ::-1].astype(np.float32)
        calibration.stats[f"blk.{layer}.k.spectra"] = np.ascontiguousarray(spectrum)
    kld = rng.random((2, 3)).astype(np.float32)
    kld[1, 2] = -1
    calibration.stats |= {"kld.k": kld, "kld.v": np.full((2, 3), -1, np.float32)}
    return calibration


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(report.app, [str(a) for a in arguments])
    return result.exit_code, result.output


def figures(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_a_page_has_every_figure_and_needs_nothing_else(tmp_path: Path) -> None:
    calibration = measured()
    calibration.corpus = "a <b> & c"
    write(calibration, tmp_path / "a.kvtc.gguf")
    code, output = run(tmp_path / "a.kvtc.gguf", "-o", tmp_path / "report.html")
    assert code == 0, output
    text = (tmp_path / "report.html").read_text()
    assert len(figures(text)) == len(FIGURES) and 'class="absent"' not in text
    for title, _, _ in FIGURES:
        assert f"<h2>{title}</h2>" in text
    assert "a &lt;b&gt; &amp; c" in text and calibration.fingerprint in text
    outside = re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"|url\((?!#)([^)]*)\)|@import|<script', text)
    assert not outside
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text))
    assert {a or b for a, b in used} <= set(ids)
    assert report.page(read(tmp_path / "a.kvtc.gguf"), "a.kvtc.gguf") == text  # the same every time


def test_a_calibration_without_statistics_says_what_is_missing(tmp_path: Path) -> None:
    write(synthetic.calibration(2, 2, 64, bits=(3,)), tmp_path / "a.kvtc.gguf")
    code, output = run(tmp_path / "a.kvtc.gguf", "-o", tmp_path / "report.html")
    assert code == 0, output
    text = (tmp_path / "report.html").read_text()
    assert len(figures(text)) == 2 and text.count('class="absent"') == len(FIGURES) - 2


def test_bad_input_is_one_line_and_leaves_files_alone(tmp_path: Path) -> None:
    (tmp_path / "old.html").write_text("keep me")
    (tmp_path / "text.txt").write_text("no calibration")
    write(measured(), tmp_path / "a.kvtc.gguf")
    for words, *arguments in (
        ("exists already", tmp_path / "a.kvtc.gguf", "-o", tmp_path / "old.html"),
        ("not a complete GGUF", tmp_path / "text.txt", "-o", tmp_path / "new.html"),
        ("No such file", tmp_path / "a.kvtc.gguf", "-o", tmp_path / "no" / "new.html"),
    ):
        code, output = run(*arguments)
        assert code == 1 and output.startswith("error: ") and words in output and output.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"old.html", "text.txt", "a.kvtc.gguf"}
    assert (tmp_path / "old.html").read_text() == "keep me"


def test_json_holds_what_was_measured(tmp_path: Path) -> None:
    calibration = measured()
    write(calibration, tmp_path / "a.kvtc.gguf")
    rows = json.loads(CliRunner().invoke(inspect.app, [str(tmp_path / "a.kvtc.gguf"), "--json"]).stdout)["layers"]
    for row in rows:
        assert row["error"] == pytest.approx(calibration.stats[f"blk.{row['layer']}.{row['side']}.error"].tolist())
        kld = calibration.stats[f"kld.{row['side']}"][:, row["layer"]]
        assert row["kld"] == [pytest.approx(x) if x >= 0 else None for x in kld.tolist()]
