"""The requests of the soak: every kind that a server with shifting context gets, made from one text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

N_PROBS = 8  # candidates reported for every token, to tell a tie from an error


@dataclass(frozen=True)
class Request:
    """One request. hang_up: events of the stream after which the client goes away, 0: before the answer starts."""

    name: str
    body: dict = field(repr=False)
    path: str = "/completion"
    hang_up: int | None = None
    status: int = 200  # what the server must answer

    @property
    def compared(self) -> bool:
        """Whether the answer is a function of the request alone: greedy, whole, with token ids."""
        return self.status == 200 and self.hang_up is None and self.body.get("temperature") == 0 and not self.chat

    @property
    def chat(self) -> bool:
        return self.path.startswith("/v1/")

    @property
    def n_predict(self) -> int:
        return self.body["n_predict"]


def requests(tokens: Sequence[int], n_ctx: int) -> list[Request]:
    """All kinds of requests, once each, in a fixed order.

    Args:
        tokens: of a text, at least 8 * n_ctx; every prompt but those with the shared prefix is a slice of its own.
        n_ctx: tokens of context that a slot has.
    """
    starts = itertools.count(n_ctx // 2, n_ctx // 3)

    def length(share: float) -> int:
        return max(2, round(share * n_ctx))

    def part(share: float) -> list[int]:
        start = next(starts)
        result = list(tokens[start : start + length(share)])
        if len(result) < length(share):
            raise ValueError(f"{len(tokens)} tokens of text are too few for slots of {n_ctx}")
        return result

    def body(prompt: list[int], share: float, **more: object) -> dict:
        fixed = {"n_predict": length(share), "temperature": 0, "ignore_eos": True, "n_probs": N_PROBS}
        return {"prompt": prompt, **fixed, **more}

    shared = list(tokens[: length(0.4)])
    stream, sampled = {"stream": True}, {"temperature": 0.8, "seed": 1}
    chat = {"messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0, "max_tokens": length(0.1)}
    return [
        Request("short", body(part(0.05), 0.1)),
        Request("long prompt", body(part(0.7), 0.15)),
        Request("streamed", body(part(0.3), 0.2, **stream)),
        *(Request(f"shared prefix {n}", body(shared + part(0.1), 0.12)) for n in (1, 2, 3)),
        Request("shared prefix, streamed", body(shared + part(0.2), 0.1, **stream)),
        Request("prefix of a prefix", body(shared[: length(0.3)] + part(0.1), 0.1)),
        Request("shift", body(part(0.6), 0.6, n_keep=length(0.1))),
        Request("two shifts, streamed", body(part(0.5), 1.1, **stream)),
        Request("sampled", body(part(0.2), 0.2, **sampled)),
        Request("sampled, shared prefix, shift", body(shared + part(0.1), 0.7, **sampled, **stream)),
        Request("cancelled", body(part(0.3), 0.8, **stream), hang_up=5),
        Request("cancelled, shared prefix", body(shared + part(0.2), 0.5, **stream), hang_up=1),
        Request("cancelled after a shift", body(part(0.8), 1.0, **stream), hang_up=length(0.3)),
        Request("cancelled prompt", body(part(0.9), 0.1, **stream), hang_up=0),
        Request("chat", chat, path="/v1/chat/completions"),
        Request("too long", body(list(tokens[: length(1.2)]), 0.1), status=400),
    ]
