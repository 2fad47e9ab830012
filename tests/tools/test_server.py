"""llama-server with a kvtc cache. Failures caught: slots that mix, an exact answer that is not that of f16, a cache
operation that costs quality without a word, a server that does not stop."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import tools
from tools import EXACT

PROMPTS = (
    "The quick brown fox jumps over the lazy dog. " * 4,
    "Pack my box with five dozen liquor jugs, she said. " * 4,
)
WARNING = "restored or copied tokens are read from their codes"
START, STOP = 30, 20  # seconds


@dataclass(frozen=True)
class Server:
    port: int
    log: Path

    def post(self, path: str, body: dict) -> dict:
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, kind)
        with urllib.request.urlopen(request, timeout=tools.LIMIT) as answer:
            return json.load(answer)

    def complete(self, prompt: str, slot: int = -1) -> dict:
        body = {"prompt": prompt, "n_predict": 24, "temperature": 0, "ignore_eos": True, "id_slot": slot}
        return self.post("/completion", body)

    def text(self, prompt: str, slot: int = -1) -> str:
        return self.complete(prompt, slot)["content"]

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


@contextlib.contextmanager
def serve(folder: Path, model: Path, *arguments: object) -> Iterator[Server]:
    """A server with two slots on a free port of loopback; leaving stops it and checks that it ended by itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(port, folder / "server.log")
    fixed = ("--host", "127.0.0.1", "--port", port, "-c", 1024, "-t", 1, "-np", 2, "--slot-save-path", folder, "-lv", 4)
    command = [str(part) for part in (tools.BIN / "llama-server", "-m", model, *fixed, *arguments)]
    with server.log.open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START
            while not server.healthy():
                assert process.poll() is None and time.monotonic() < deadline, server.log.read_text()
                time.sleep(0.05)
            yield server
            process.terminate()
            assert process.wait(STOP) == 0
        finally:
            process.kill()
            process.wait(STOP)


@pytest.fixture(scope="module")
def expected(llama, tmp_path_factory) -> tuple[str, str]:
    """What an f16 cache answers to each prompt alone."""
    with serve(tmp_path_factory.mktemp("f16"), llama, "-fa", "on", "--cache-ram", 0) as server:
        first, second = (server.text(prompt, slot) for slot, prompt in enumerate(PROMPTS))
    assert first != second
    return first, second


@pytest.mark.parametrize("unified", [(), ("-kvu",)], ids=["streams", "unified"])
def test_parallel_slots_answer_as_f16(llama, tmp_path, expected, unified):
    with serve(tmp_path, llama, "-ct", "kvtc-k2v4", *EXACT, "--cache-ram", 0, *unified) as server:
        for _ in range(3):
            with ThreadPoolExecutor(2) as pool:
                assert tuple(pool.map(server.text, PROMPTS)) == expected
            assert tuple(map(server.text, PROMPTS)) == expected
    assert WARNING not in server.log.read_text()


def test_prompt_that_is_still_in_its_slot_stays_exact(llama, tmp_path, expected):
    """The answer is removed from the cache again, the prompt is not computed again."""
    with serve(tmp_path, llama, "-ct", "kvtc-k2v4", *EXACT, "--cache-ram", 0) as server:
        assert server.text(PROMPTS[0], 0) == expected[0]
        again = server.complete(PROMPTS[0], 0)
        assert again["timings"]["cache_n"] > 100 and again["content"] == expected[0]
        other = server.complete(PROMPTS[0][:90] + PROMPTS[1], 0)
        assert other["timings"]["cache_n"] >= 90 and other["content"] == server.text(PROMPTS[0][:90] + PROMPTS[1], 1)


def test_restored_prompt_is_said_to_be_coded_only(llama, tmp_path):
    """A saved slot holds codes, not exact rows: the server goes on, and says once what that costs."""
    with serve(tmp_path, llama, "-ct", "kvtc-k2v4", *EXACT, "--cache-ram", 0) as server:
        server.text(PROMPTS[0], 0)
        saved = server.post("/slots/0?action=save", {"filename": "slot.bin"})
        server.post("/slots/0?action=erase", {})
        assert WARNING not in server.log.read_text()
        for _ in range(2):
            restored = server.post("/slots/0?action=restore", {"filename": "slot.bin"})
            assert restored["n_restored"] == saved["n_saved"] > 100
        answer = server.complete(PROMPTS[0], 0)
        assert answer["timings"]["cache_n"] > 100 and answer["tokens_predicted"] == 24
    assert server.log.read_text().count(WARNING) == 1
