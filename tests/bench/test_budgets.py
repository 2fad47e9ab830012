"""Layers measured on text with the token that begins a text in its middle: sampled texts lie one behind the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import budgets

BOS = 2


class Sampler:
    """A capture whose samples begin with BOS."""

    add_bos, bos = True, BOS

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None: ...

    def tokenize(self, text: str) -> np.ndarray:
        return np.arange(3, 3 + 4 * budgets.CTX, dtype=np.int32)

    def sample(self, n_sequences: int, length: int, *_: object) -> np.ndarray:
        texts = np.arange(9000, 9000 + n_sequences * length, dtype=np.int32).reshape(n_sequences, length)
        texts[:, 0] = BOS
        return texts


def test_bos_begins_each_chunk_and_stands_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "LlamaCapture", Sampler)
    chunks = budgets.texts(Path("model.gguf"), 1)
    assert chunks.shape == (2 * budgets.CHUNKS, budgets.CTX)
    assert (chunks[:, 0] == BOS).all() and (chunks[:, 1:] != BOS).all()
    assert (chunks[0, 1:] < 9000).all() and (chunks[1, 1:] >= 9000).all()
