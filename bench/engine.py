"""An engine: a folder of llama.cpp's binaries, ours or any other, what is known of it, and running its tools."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bench.logs import RunError, reason

SUFFIX = ".exe" if os.name == "nt" else ""
TOOLS = ("llama-bench", "llama-perplexity", "llama-completion", "llama-cli", "llama-server")
# A user's settings must not reach what is measured; a cache's own environment is set on purpose.
FOREIGN = ("LLAMA_ARG_", "LLAMA_ATTN_ROT")


class MissingTool(RunError):
    """An engine has no such program."""


@dataclass(frozen=True)
class Output:
    out: str
    err: str

    @property
    def log(self) -> str:
        return self.out + self.err


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment without llama.cpp's settings, and more of it."""
    return {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)} | (more or {})


def run_tool(
    binary: Path,
    arguments: Sequence[object],
    more: dict[str, str] | None = None,
    limit: float | None = None,
    log: Path | None = None,
) -> Output:
    """Run a tool to its end with nothing to read; what it printed also goes to `log`.

    Raises:
        RunError: it cannot be started, takes longer than `limit` seconds, or fails; with its own reason.
    """
    name, command = binary.stem, [str(binary), *map(str, arguments)]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment(more),
            start_new_session=True,
        )
    except OSError as error:
        raise MissingTool(f"{binary}: {error.strerror}; run `make build`") from error
    late = False
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        late = True
        _kill(process)
        out, err = process.communicate()
    except BaseException:  # a user's Ctrl-C must not leave a measurement running
        _kill(process)
        process.wait()
        raise
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"{' '.join(command)}\n{out}{err}", encoding="utf-8")
    if late:
        raise RunError(f"{name} ran longer than {limit:.0f} s")
    if process.returncode < 0:
        raise RunError(f"{name} was ended by {signal.Signals(-process.returncode).name}")
    if process.returncode != 0:
        raise RunError(f"{name} failed: {reason(out + err)}")
    return Output(out, err)


def _kill(process: subprocess.Popen) -> None:
    if os.name == "nt":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Engine:
    """A folder of binaries under the name that the tables give it."""

    name: str
    folder: Path

    @classmethod
    def parse(cls, text: str) -> Engine:
        """`NAME=FOLDER`, or a folder that is called after itself.

        Raises:
            RunError: there is no such folder, or none of the tools is in it.
        """
        name, equals, folder = text.partition("=")
        engine = cls(name, Path(folder)) if equals else cls(Path(text).resolve().parent.name, Path(text))
        if not re.fullmatch(r"[\w.+-]+", engine.name):
            raise RunError(f"engine name '{engine.name}' has other characters than letters, digits and . _ + -")
        if not engine.tools():
            raise RunError(f"engine {engine.name}: {engine.folder} holds none of {', '.join(TOOLS)}")
        return engine

    def tools(self) -> list[str]:
        return [name for name in TOOLS if (self.folder / f"{name}{SUFFIX}").is_file()]

    def tool(self, *names: str) -> Path:
        """The first of these programs that the engine has."""
        for name in names:
            if name in self.tools():
                return self.folder.resolve() / f"{name}{SUFFIX}"
        raise MissingTool(f"engine {self.name} has no {' or '.join(names)}")

    @cached_property
    def build(self) -> str:
        """12 hex digits over the bytes of the tools and libraries: what was measured, whatever its commit says."""
        digest = hashlib.sha256()
        names = [f"{name}{SUFFIX}" for name in self.tools()]
        libraries = [p.name for p in self.folder.iterdir() if re.search(r"\.(so|dylib|dll)$", p.name)]
        for name in sorted({*names, *libraries}):
            digest.update(name.encode())
            with (self.folder / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()[:12]

    @cached_property
    def upstream(self) -> str:
        """The commit of llama.cpp that the binaries name, "" where they do not."""
        try:
            said = run_tool(self.folder.resolve() / f"{self.tools()[0]}{SUFFIX}", ["--version"], limit=60).log
        except RunError:
            return ""
        found = re.search(r"commit (\w+)|version: \d+ \((\w+)\)", said)
        return (found[1] or found[2]) if found else ""

    @cached_property
    def commit(self) -> str:
        """The commit of the source tree that the folder was built from, `-dirty` with changes; "" where unknown."""
        source = self.folder.resolve()
        cmake = source.parent / "CMakeCache.txt"
        if cmake.is_file() and (home := re.search(r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.+)$", cmake.read_text(), re.M)):
            source = Path(home[1])
            if re.search(r"^KVTC_STOCK:BOOL=ON$", cmake.read_text(), re.M):
                return ""  # our build files, none of our code: upstream's commit says all
        try:
            # a tree that only lies inside another repository is not that repository's
            subprocess.run(
                ["git", "-C", source, "ls-files", "--error-unmatch", "CMakeLists.txt"], capture_output=True, check=True
            )
            told = subprocess.run(
                ["git", "-C", source, "describe", "--always", "--dirty", "--exclude=*"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
        except (OSError, subprocess.CalledProcessError):
            return ""
        return told.stdout.strip()

    @property
    def on_gpu(self) -> bool:
        """True if it was built for GPUs."""
        return any(re.search(r"ggml-(cuda|vulkan|metal|hip|sycl)", p.name) for p in self.folder.iterdir())
