"""Failures caught: sampled text with the token that begins a text in its middle, where contexts never have it; a mix
that holds another share of a kind than asked for, or that is misread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from kvtc_gguf.corpus import Mix, mixed_chunks, parse_mix
from kvtc_gguf.layout import FormatError

BOS, SIZE = 2, 64


@dataclass
class Sampler:
    """A capture that samples BOS at the start of each text and once more in it."""

    add_bos: bool
    bos: int = BOS

    def tokenize(self, text: str) -> np.ndarray:
        return np.arange(3, 3 + 4 * SIZE, dtype=np.int32)

    def chat(self, question: str) -> None:
        return None

    def sample(self, n_sequences: int, length: int, *rest: object) -> np.ndarray:
        texts = np.arange(1000, 1000 + n_sequences * length, dtype=np.int32).reshape(n_sequences, length)
        texts[:, 0] = texts[:, length // 2] = self.bos
        return texts


def test_bos_stands_at_a_chunks_start_alone_where_the_model_begins_contexts_with_it() -> None:
    chunks = mixed_chunks(Sampler(add_bos=True), Mix(), 4, SIZE)
    assert chunks.shape == (4, SIZE) and chunks.dtype == np.int32
    assert (chunks[:, 0] == BOS).all() and (chunks[:, 1:] != BOS).all()


def test_sampled_text_stays_as_it_is_where_bos_is_a_token_like_others() -> None:
    chunks = mixed_chunks(Sampler(add_bos=False), Mix(), 4, SIZE)
    assert ((chunks[1::2] == BOS).sum(axis=1) == 2 * Mix.texts).all() and (chunks[0::2] != BOS).all()


def test_kinds_take_turns_so_that_held_out_chunks_are_of_all_of_them() -> None:
    kinds = parse_mix("docs=2,own=1,code=1").kinds(16)
    assert all(sorted(kinds[i : i + 4]) == ["code", "docs", "docs", "own"] for i in range(0, 16, 4))


@pytest.mark.parametrize("text", ["poems=1", "docs=-1", "docs", "texts=0", "docs=0.5"])
def test_a_mix_that_cannot_be_read_is_told(text: str) -> None:
    with pytest.raises(FormatError, match=f"--corpus {text}"):
        parse_mix(text)
