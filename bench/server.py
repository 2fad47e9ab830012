"""llama-server on loopback for as long as a block runs, and what the bench asks of it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bench.engine import environment
from bench.logs import RunError, reason

STOP = 60  # seconds; sanitized servers are slow


@dataclass(frozen=True)
class Process:
    """A running server; others ask it other things."""

    port: int
    process: subprocess.Popen
    log: Path
    limit: float  # seconds of one answer

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def check(self) -> None:
        """Raises RunError if it has ended."""
        if self.process.poll() is not None:
            why = reason(self.log.read_text(errors="replace"))
            raise RunError(f"llama-server ended with {self.process.returncode}: {why}")


class Server(Process):
    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """The tokens of a text; special: with those that begin a prompt."""
        return self._post("/tokenize", {"content": text, "add_special": special})["tokens"]

    def complete(self, tokens: list[int], n: int, keep: bool) -> str:
        """The greedy continuation by `n` tokens; keep: what the last prompt began with alike need not be evaluated."""
        body = {"prompt": tokens, "n_predict": n, "temperature": 0, "cache_prompt": keep}
        return self._post("/completion", body)["content"]

    def _post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.limit) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RunError(f"llama-server refused {path}: {error.read(300).decode(errors='replace')}") from error
        except (OSError, ValueError) as error:
            raise RunError(f"llama-server did not answer {path}: {error}") from error


AnyServer = TypeVar("AnyServer", bound=Process)


@contextlib.contextmanager
def serve(
    kind: type[AnyServer],
    binary: Path,
    arguments: Sequence[object],
    log: Path,
    *,
    start: float,
    limit: float,
    more: dict[str, str] | None = None,
    clean: bool = False,
) -> Iterator[AnyServer]:
    """A server on a free port, of `kind`; leaving the block ends it.

    Args:
        start: seconds until it must be ready; limit: of one answer.
        more: of its environment.
        clean: it must still run when the block is left, and end without an error.

    Raises:
        RunError: it does not start, or not in time; and what `clean` forbids.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(x) for x in (binary, *arguments, "--host", "127.0.0.1", "--port", port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment(more)
        )
        server = kind(port, process, log, limit)
        try:
            deadline = time.monotonic() + start
            while not server.healthy():
                server.check()
                if time.monotonic() > deadline:
                    raise RunError(f"llama-server was not ready after {start:.0f} s")
                time.sleep(0.05)
            yield server
            if clean:
                server.check()
                process.terminate()
                try:
                    code = process.wait(STOP)
                except subprocess.TimeoutExpired:
                    raise RunError(f"llama-server did not stop within {STOP} s") from None
                if code != 0:
                    raise RunError(f"llama-server ended with {code}: {reason(log.read_text(errors='replace'))}")
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(STOP)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
