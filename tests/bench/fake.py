"""An engine of small Python scripts: they act as llama.cpp's tools, note every call, and fail as they are told."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.engine import TOOLS

TOOL = Path(__file__).with_name("fake_tool.py")
SPEEDS = {"f16": 100.0, "q8_0": 50.0, "kvtc2": 200.0}


@dataclass(frozen=True)
class FakeEngine:
    """folder: of the tools; calls of all engines of a test go to one file, in their order."""

    folder: Path

    def behave(self, **options: object) -> None:
        """Set what the tools do from now on; see `fake_tool.py`."""
        path = self.folder / "behaviour.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | options))

    def calls(self, tool: str = "") -> list[list[str]]:
        """What was called, as [engine, tool, argument, …]."""
        path = self.folder.parent / "calls.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if not tool or line[1] == tool]

    def forget(self) -> None:
        (self.folder.parent / "calls.jsonl").unlink(missing_ok=True)


def make(folder: Path, **options: object) -> FakeEngine:
    folder.mkdir(parents=True)
    for name in TOOLS:
        path = folder / name
        path.write_text(f"#!{sys.executable} -IS\n{TOOL.read_text()}")
        path.chmod(0o755)
    engine = FakeEngine(folder)
    engine.behave(speeds=SPEEDS, **options)
    return engine


def value(call: list[str], flag: str) -> str:
    return call[call.index(flag) + 1]
