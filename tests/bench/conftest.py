"""A fake engine, a model and a text, and benches of them."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake
import pytest
import typer
from typer.testing import CliRunner

from bench import run


@dataclass
class Workshop:
    """A folder with engines `ours` and `stock`, a model with a calibration, a text; and runs of the bench there."""

    folder: Path
    ours: fake.FakeEngine
    stock: fake.FakeEngine

    @property
    def csv(self) -> Path:
        return self.folder / "out.csv"

    def matrix(self, caches: list, tests: list[dict], **more: object) -> Path:
        path = self.folder / "matrix.yaml"
        document = {"models": ["model.gguf"], "caches": caches, "tests": tests, "threads": 1} | more
        path.write_text(json.dumps(document))  # which is YAML
        return path

    def run(self, matrix: Path, *arguments: object, engines: tuple[str, ...] = ("ours",)) -> Any:
        app = typer.Typer()
        app.command()(run.main)
        words = [str(matrix), "-o", str(self.csv), "--models", str(self.folder), "--work", str(self.folder / "work")]
        words += [
            "-f",
            str(self.folder / "text.txt"),
            *(x for e in engines for x in ("--engine", f"{e}={self.folder / e}")),
        ]
        words += [*map(str, arguments), *([] if "--report" in arguments else ["--no-report"])]
        return CliRunner().invoke(app, words)

    def measured(self, matrix: Path, *arguments: object, **more) -> list[dict[str, str]]:
        """The rows after a run that must succeed."""
        result = self.run(matrix, *arguments, **more)
        assert result.exit_code == 0, result.output
        return self.rows()

    def rows(self) -> list[dict[str, str]]:
        with self.csv.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return furnish(tmp_path)


def furnish(folder: Path) -> Workshop:
    (folder / "model.gguf").write_bytes(b"weights")
    (folder / "model.kvtc.gguf").write_bytes(b"bases")
    (folder / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 200)
    return Workshop(folder, fake.make(folder / "ours"), fake.make(folder / "stock"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Workshop:
    """After a run of all kinds of tests on both engines, with its report; not to be changed."""
    workshop = furnish(tmp_path_factory.mktemp("measured"))
    workshop.ours.behave(kld={"f16": 0.0, "q8_0": 0.004, "kvtc2": 0.008})
    tests = [
        {"kind": "quality", "ctx": 256, "chunks": 2},
        {"kind": "speed", "depths": [0, 64], "prompt": 16, "generate": 4, "repetitions": 2},
        {"kind": "memory", "contexts": [256, 1024]},
        {"kind": "retrieval", "task": "multikey", "depths": [1024], "samples": 8, "engines": "ours"},
    ]
    caches = ["f16", "q8_0", {"type": "kvtc-k2v4", "engines": "ours"}, "turbo9"]
    result = workshop.run(workshop.matrix(caches, tests), "--report", engines=("ours", "stock"))
    assert result.exit_code == 0, result.output
    return workshop
