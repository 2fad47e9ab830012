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

from bench.engine import environment
from bench.logs import RunError, reason

STOP = 30  # seconds


@dataclass(frozen=True)
class Server:
    port: int
    limit: float  # seconds of one answer

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """The tokens of a text; special: with those that begin a prompt."""
        return self._post("/tokenize", {"content": text, "add_special": special})["tokens"]

    def complete(self, tokens: list[int], n: int, keep: bool) -> str:
        """The greedy continuation by `n` tokens; keep: what the last prompt began with alike need not be evaluated."""
        body = {"prompt": tokens, "n_predict": n, "temperature": 0, "cache_prompt": keep}
        return self._post("/completion", body)["content"]

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

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


@contextlib.contextmanager
def serve(binary: Path, arguments: Sequence[object], more: dict[str, str], limit: float, log: Path) -> Iterator[Server]:
    """A server on a free port; leaving the block ends it.

    Raises:
        RunError: it does not start within `limit` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(port, limit)
    command = [str(x) for x in (binary, *arguments, "--host", "127.0.0.1", "--port", port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment(more)
        )
        try:
            deadline = time.monotonic() + limit
            while not server.healthy():
                if process.poll() is not None:
                    raise RunError(f"llama-server failed: {reason(log.read_text(errors='replace'))}")
                if time.monotonic() > deadline:
                    raise RunError(f"llama-server was not ready after {limit:.0f} s")
                time.sleep(0.05)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
