"""Commands of `bench.gpu_check`: each leaves a log, and is not run again once it has passed on the same build.

`done.json` in the output folder says which command of which build passed. What was timed counts for its card alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from bench.engine import environment
from bench.gpu_memory import watched

DEVICE_LINE = "device memory in use at most: "  # added to the log of a watched command


class StepError(Exception):
    """A step failed; the message is one line for the user."""


class NotRun(Exception):
    """A step cannot be run here, or not now; the message says what is missing."""


def hash_build(folder: Path) -> str:
    """Of the libraries' contents, so that a new build's figures are not taken for an old one's."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("lib*.so*")):
        if not path.is_symlink():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


def name_card() -> str:
    """The first GPU's name and number, or "" where nvidia-smi does not tell."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,uuid", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


@dataclass
class Runner:
    """Runs commands for the build in `binaries`."""

    binaries: Path
    out: Path
    device: str = "CUDA0"
    redo: bool = False
    seconds: float = 0.0  # after which no command is begun any more; 0: no end
    limit: float = 1800.0  # of one command
    timed: bool = False  # what is run now counts for this card alone
    build: str = ""
    card: str = ""
    began: float = field(default_factory=time.monotonic)
    again: int = 0  # commands that had passed before

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.build = self.build or hash_build(self.binaries)
        self.card = self.card or name_card()
        try:
            self.done = json.loads((self.out / "done.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.done = {}

    def run(self, name: str, *command: object, watch: bool = False, makes: Path | None = None) -> str:
        """The output of a command, which is also `name`.log; watch: with the device's memory in its last line; makes:
        a file without which it has not passed.

        Raises:
            StepError: it cannot be started, fails, or takes too long.
            NotRun: this call's time is over.
        """
        words, log = [str(word) for word in command], self.out / f"{name}.log"
        key = hashlib.sha256(json.dumps([words, self.build, self.card if self.timed else ""]).encode()).hexdigest()[:16]
        if not self.redo and self.done.get(name) == key and log.is_file() and (makes is None or makes.exists()):
            self.again += 1
            return log.read_text(encoding="utf-8", errors="replace")
        if self.seconds and time.monotonic() - self.began > self.seconds:
            raise NotRun("this call's time is over; run it again to go on")
        variables = {
            "KVTC_LIB_DIR": str(self.binaries),
            "KVTC_BIN": str(self.binaries),
            "KVTC_TEST_DEVICE": self.device,
        }
        try:
            with watched() if watch else nullcontext() as peak:
                result = subprocess.run(
                    words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                    timeout=self.limit, env=environment(variables), stdin=subprocess.DEVNULL,
                )  # fmt: skip
        except OSError as error:
            raise StepError(f"{words[0]}: {error.strerror}; build with `make cuda`, or set --bin") from error
        except subprocess.TimeoutExpired as error:
            raise StepError(f"{words[0]} ran longer than {self.limit:.0f} s") from error
        text = result.stdout
        if watch:
            text += f"\n{DEVICE_LINE}{'not told' if peak is None or peak.mib is None else peak.mib}\n"
        log.write_text(text, encoding="utf-8")
        if result.returncode != 0:
            last = [line for line in text.splitlines() if line.strip()][-1:] or ["no output"]
            raise StepError(f"{Path(words[0]).name} exited with {result.returncode}: {last[0][:200]} ({name}.log)")
        self.keep(name, key)
        return text

    def run_parts(self, name: str, commands: Sequence[Sequence[object]]) -> list[str]:
        """The same for several commands side by side; the first failure is raised when all have ended."""
        with ThreadPoolExecutor(len(commands)) as pool:
            jobs = [pool.submit(self.run, f"{name}-{i}", *words) for i, words in enumerate(commands)]
        return [job.result() for job in jobs]

    def keep(self, name: str, key: str) -> None:
        self.done[name] = key
        partial = self.out / f"done.{os.getpid()}.partial"
        partial.write_text(json.dumps(dict(self.done), indent=1), encoding="utf-8")
        partial.replace(self.out / "done.json")
