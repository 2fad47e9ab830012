"""Failures caught: sampled text with the token that begins a text in its middle, where contexts never have it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from kvtc_gguf.corpus import TEXTS, default_chunks

BOS, SIZE = 2, 64


@dataclass
class Sampler:
    """A capture that samples BOS at the start of each text and once more in it."""

    add_bos: bool
    bos: int = BOS

    def tokenize(self, text: str) -> np.ndarray:
        return np.arange(3, 3 + 4 * SIZE, dtype=np.int32)

    def sample(self, n_sequences: int, length: int, seed: int, progress: object = None) -> np.ndarray:
        texts = np.arange(1000, 1000 + n_sequences * length, dtype=np.int32).reshape(n_sequences, length)
        texts[:, 0] = texts[:, length // 2] = self.bos
        return texts


def test_bos_stands_at_a_chunks_start_alone_where_the_model_begins_contexts_with_it() -> None:
    chunks = default_chunks(Sampler(add_bos=True), 4, SIZE)
    assert chunks.shape == (4, SIZE) and chunks.dtype == np.int32
    assert (chunks[:, 0] == BOS).all() and (chunks[:, 1:] != BOS).all()


def test_sampled_text_stays_as_it_is_where_bos_is_a_token_like_others() -> None:
    chunks = default_chunks(Sampler(add_bos=False), 4, SIZE)
    assert ((chunks[1::2] == BOS).sum(axis=1) == 2 * TEXTS).all() and (chunks[0::2] != BOS).all()
