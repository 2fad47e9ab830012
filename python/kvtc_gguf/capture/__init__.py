"""Running a model and handing its queries, keys and values, layer by layer, to a consumer.

`llama_cpp.LlamaCapture` does it through the patched libllama. Another engine only needs to be a `Capture`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class LayerSample:
    """One layer's attention inputs for one chunk of T tokens at positions 0 ... T-1; all f32.

    q [T, n_head, d] and k [T, H, d] are taken before RoPE (after QK-norm), v [T, H, d_v] as the cache stores it;
    q_rope [T, n_head, d] is rotated and already multiplied by the attention scale, k_rope [T, H, d] is rotated.
    window: tokens the layer can look back (sliding window), 0 for all.
    """

    layer: int
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_rope: np.ndarray
    k_rope: np.ndarray
    window: int = 0


Consumer = Callable[[LayerSample], None]


class Capture(Protocol):
    """A model that runs. Everything raises FormatError, one line, for what it cannot do."""

    interleaved: bool  # RoPE pairs neighbours (2i, 2i+1), in the channel order of the samples
    bos: int  # -1: the model has none
    add_bos: bool  # a text starts with it

    def tokenize(self, text: str) -> np.ndarray:
        """Tokens i32 [n] of a text, without BOS; special tokens are not parsed."""
        ...

    def run(self, tokens: np.ndarray, consumer: Consumer) -> None:
        """Runs one chunk i32 [T] from position 0 and hands every layer's sample to consumer."""
        ...

    def chat(self, question: str) -> np.ndarray | None:
        """Tokens i32 [n] of a question in the model's own chat format, up to where it answers; None: it has none."""
        ...

    def generating(self, n_sequences: int, length: int) -> AbstractContextManager:
        """What `steps` needs of n_sequences texts of this length, for as long as they are sampled."""
        return nullcontext()

    def steps(self, texts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(position, logits f32 [n, n_vocab] after it) of texts i32 [n, length]; the next token is written between."""
        ...

    def ends(self, tokens: np.ndarray) -> np.ndarray:
        """Which of the tokens [n] end a text, bool [n]."""
        ...

    def sample(
        self,
        n_sequences: int,
        length: int,
        seed: int,
        progress: Callable[[], None] | None = None,
        openings: Sequence[np.ndarray] | None = None,
        temperature: float = 1.0,
        keep_end: bool = False,
    ) -> np.ndarray:
        """Text the model samples itself, i32 [n_sequences, length], from BOS and openings, one for each text.

        Where the model ends its text it is started again with BOS, or with keep_end goes on as a chat does.
        progress: called once a step, of SAMPLED_TOGETHER texts.
        """
        rng = np.random.default_rng(seed)
        start = max(self.bos, 0)
        out, given = begun(n_sequences, length, start, openings)
        with self.generating(min(n_sequences, SAMPLED_TOGETHER), length):
            for first in range(0, n_sequences, SAMPLED_TOGETHER):
                texts, free_from = (x[first : first + SAMPLED_TOGETHER] for x in (out, given))
                for position, logits in self.steps(texts):
                    tokens = draw(logits, rng, temperature)
                    if not keep_end:
                        tokens = np.where(self.ends(tokens), start, tokens)
                    free = free_from <= position + 1
                    texts[free, position + 1] = tokens[free]
                    if progress:
                        progress()
        return out


SAMPLED_TOGETHER = 64  # texts sampled in one batch: wide enough for weights to be read seldom, and memory has a bound


def begun(
    n_sequences: int, length: int, start: int, openings: Sequence[np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Texts i32 [n_sequences, length] that hold `start` and their openings, and how many tokens of each that is."""
    out = np.full((n_sequences, length), start, np.int32)
    given = np.ones(n_sequences, np.int64)
    for i, opening in enumerate(openings or ()):
        text = opening if len(opening) and opening[0] == start else np.concatenate([[start], opening])
        given[i] = min(len(text), length)
        out[i, : given[i]] = text[:length]
    return out, given


def draw(logits: np.ndarray, rng: np.random.Generator, temperature: float = 1.0) -> np.ndarray:
    """One token i64 [n] from each row of logits [n, n_vocab]."""
    scaled = (logits - logits.max(axis=1, keepdims=True)) / np.float32(temperature)
    mass = np.cumsum(np.exp(scaled), axis=1, dtype=np.float64)
    target = rng.random(len(logits)) * mass[:, -1]
    places = [np.searchsorted(row, t, side="right") for row, t in zip(mass, target, strict=True)]
    return np.minimum(places, logits.shape[1] - 1)


def rope_pairs(head_dim: int, rotated: int, interleaved: bool) -> np.ndarray:
    """Channels that RoPE rotates together, i64 [n, 2]: (2i, 2i+1) if interleaved (llama), else (i, i + rotated/2)."""
    half = min(rotated, head_dim) // 2
    first = np.arange(half)
    return np.stack([2 * first, 2 * first + 1] if interleaved else [first, first + half], axis=1)
