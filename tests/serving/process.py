"""llama-server on loopback for the tests: a process with a cache type, and what is asked of it."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import tools
from openai import OpenAI

from bench import server

KVTC = ("-ct", "kvtc-k2v4")
EXACT = (*KVTC, *tools.EXACT)
CODED = (*KVTC, "--kvtc-window", 16)  # most of a prompt is read from codes
START = 60  # seconds; sanitized servers are slow

PROMPTS = (
    "The quick brown fox jumps over the lazy dog. " * 4,
    "Pack my box with five dozen liquor jugs, she said. " * 4,
    "How vexingly quick daft zebras jump over the moon! " * 4,
    "Sphinx of black quartz, judge my vow, if you please. " * 4,
)


class Server(server.Process):
    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=self.limit)

    def post(self, path: str, body: dict) -> dict:
        """The answer's body; an error of HTTP becomes {"status": its number, "message": ...}."""
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, kind)
        try:
            with urllib.request.urlopen(request, timeout=self.limit) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return {"status": error.code, "message": json.load(error)["error"]["message"]}

    def complete(self, prompt: str, slot: int = -1, n: int = 24, **more) -> dict:
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, "id_slot": slot}
        return self.post("/completion", body | more)

    def text(self, prompt: str, slot: int = -1, n: int = 24, **more) -> str:
        return self.complete(prompt, slot, n, **more)["content"]

    def slot(self, action: str, slot: int, filename: str = "slot.bin") -> dict:
        return self.post(f"/slots/{slot}?action={action}", {"filename": filename})


@contextlib.contextmanager
def serve(folder: Path, model: Path, *arguments: object) -> Iterator[Server]:
    """A server with two slots on a free port of loopback; leaving stops it and checks that it ended by itself."""
    fixed = ("-m", model, "-c", 1024, "-t", 1, "-np", 2, "--slot-save-path", folder, "-lv", 4)
    binary, log = tools.BIN / "llama-server", folder / "server.log"
    with server.serve(Server, binary, (*fixed, *arguments), log, start=START, limit=tools.LIMIT, clean=True) as running:
        yield running
