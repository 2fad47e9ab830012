"""A llama-server process for the soak: started on a free port of loopback, asked, measured, and stopped."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import server
from bench.logs import RunError as ServerError
from bench.logs import reason
from tests.soak.workload import Request

START, ANSWER = 120, 600  # seconds; sanitized servers are slow, a hang must still end


@dataclass(frozen=True)
class Answer:
    """What a request got. tokens: ids as delivered; top: for each of them log probabilities by token id."""

    status: int
    tokens: tuple[int, ...] = ()
    top: tuple[dict[int, float], ...] = field(default=(), repr=False)


class Server(server.Process):
    def ask(self, request: Request, alone: bool = False) -> Answer:
        """Send a request and read its answer, or what is read of it before hanging up.

        alone: on the first slot, with nothing reused from earlier requests.
        """
        body = request.body | ({"cache_prompt": False, "id_slot": 0} if alone else {})
        with self._post(request.path, body) as connection:
            if request.hang_up == 0:
                return Answer(0)
            response = connection.getresponse()
            if response.status != 200:
                response.read()
                return Answer(response.status)
            if not body.get("stream"):
                return _answer(response.status, [json.load(response)])
            return _answer(response.status, _events(response, request.hang_up))

    def tokenize(self, text: str) -> list[int]:
        with self._post("/tokenize", {"content": text}) as connection:
            return json.load(connection.getresponse())["tokens"]

    def memory(self) -> int:
        """Resident bytes of the process (VmRSS)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))

    @contextlib.contextmanager
    def _post(self, path: str, body: dict) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.limit)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            yield connection
        except (OSError, http.client.HTTPException) as error:
            self.check()
            raise ServerError(f"{path}: {error!r}; {reason(self.log.read_text(errors='replace'))}") from error
        finally:
            connection.close()


@contextlib.contextmanager
def serve(binary: Path, model: Path, log: Path, arguments: Sequence[object]) -> Iterator[Server]:
    """A ready server; leaving asks it to stop. Raises ServerError where it does not start, or ends with an error."""
    # glibc gives every thread a heap of its own: with one for all, RSS settles in a minute instead of in an hour
    more = {"MALLOC_ARENA_MAX": "1"}
    with server.serve(
        Server, binary, ("-m", model, *arguments), log, start=START, limit=ANSWER, more=more, clean=True
    ) as running:
        yield running


def _events(response: http.client.HTTPResponse, limit: int | None) -> list[dict]:
    """The events of a stream, up to the one after which the client hangs up."""
    events: list[dict] = []
    while (limit is None or len(events) < limit) and (line := response.readline()):
        if line.startswith(b"error:"):
            raise ServerError(f"in a stream: {line.decode(errors='replace').strip()}")
        if line.startswith(b"data: {"):
            events.append(json.loads(line[6:]))
    return events


def _answer(status: int, parts: list[dict]) -> Answer:
    entries = [entry for part in parts for entry in part.get("completion_probabilities", ())]
    top = tuple({t["id"]: t["logprob"] for t in entry["top_logprobs"]} for entry in entries)
    return Answer(status, tuple(entry["id"] for entry in entries), top)
