"""Failures caught: sampled text with the token that begins a text in its middle, where contexts never have it; a mix
that holds another share of a kind than asked for, or that is misread; chats of a model that has no format for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvtc_gguf.capture import SAMPLED_TOGETHER, Capture, begun
from kvtc_gguf.corpus import KINDS, Mix, mixed_chunks, parse_mix
from kvtc_gguf.layout import FormatError
from kvtc_gguf.openings import BEGINNINGS, QUESTIONS

BOS, SIZE = 2, 64


@dataclass
class Sampler:
    """A capture that samples BOS at the start of each text and once more in it, and keeps what it was asked."""

    add_bos: bool
    bos: int = BOS
    chats: bool = False
    asked: list[tuple] = field(default_factory=list)

    def tokenize(self, text: str) -> np.ndarray:
        return np.arange(3, 3 + 4 * SIZE, dtype=np.int32)

    def chat(self, question: str) -> np.ndarray | None:
        return np.array([7, 8, 9, QUESTIONS.index(question)], np.int32) if self.chats else None

    def sample(self, n_sequences: int, length: int, *rest: object) -> np.ndarray:
        self.asked.append((n_sequences, length, *rest))
        texts = np.arange(1000, 1000 + n_sequences * length, dtype=np.int32).reshape(n_sequences, length)
        texts[:, 0] = texts[:, length // 2] = self.bos
        return texts


def test_bos_stands_at_a_chunks_start_alone_where_the_model_begins_contexts_with_it() -> None:
    chunks = mixed_chunks(Sampler(add_bos=True, chats=True), Mix(), 6, SIZE)
    assert chunks.shape == (6, SIZE) and chunks.dtype == np.int32
    assert (chunks[:, 0] == BOS).all() and (chunks[:, 1:] != BOS).all()


def test_sampled_text_stays_as_it_is_where_bos_is_a_token_like_others() -> None:
    chunks = mixed_chunks(Sampler(add_bos=False), Mix({"docs": 1, "own": 1}), 4, SIZE)
    assert ((chunks[1::2] == BOS).sum(axis=1) == 2 * Mix.texts).all() and (chunks[0::2] != BOS).all()


def test_kinds_take_turns_so_that_held_out_chunks_are_of_all_of_them() -> None:
    kinds = parse_mix("docs=2,own=1,code=1").kinds(16)
    assert all(sorted(kinds[i : i + 4]) == ["code", "docs", "docs", "own"] for i in range(0, 16, 4))


@given(st.dictionaries(st.sampled_from(sorted(KINDS)), st.integers(1, 5), min_size=1), st.integers(1, 60))
def test_no_stretch_of_a_corpus_holds_another_share_of_a_kind(shares: dict[str, int], n_chunks: int) -> None:
    kinds = Mix(shares).kinds(n_chunks)
    for end in range(1, n_chunks + 1):
        for kind, share in shares.items():
            assert abs(kinds[:end].count(kind) - share * end / sum(shares.values())) < len(shares)
    assert set(kinds[: sum(shares.values())]) == set(shares) or n_chunks < sum(shares.values())


def test_a_mix_is_read_as_it_is_written() -> None:
    assert parse_mix("docs=2, chat=1,code=0,texts=8,temperature=0.7,seed=3,excerpt=500") == Mix(
        {"docs": 2, "chat": 1}, 500, 8, 0.7, 3
    )
    assert parse_mix(Mix().written) == Mix() and parse_mix("seed=2") == Mix(seed=2)  # shares stay the default's


def test_chats_and_beginnings_are_what_the_model_goes_on_from() -> None:
    capture = Sampler(add_bos=True, chats=True)
    chunks = mixed_chunks(capture, parse_mix("own=1,chat=6,begun=6"), 13, SIZE)
    assert chunks.shape == (13, SIZE)
    own, chat, begun_ = capture.asked
    assert own[4] is None and [call[6] for call in (own, chat, begun_)] == [False, True, False]  # ends stay in chats
    assert len({call[2] for call in capture.asked}) == 3  # seeds
    assert len(chat[4]) == 6 * Mix.texts and {tuple(o[:3]) for o in chat[4]} == {(7, 8, 9)}
    assert {int(o[3]) for o in chat[4]} == set(range(len(QUESTIONS)))  # each is asked before one is asked again
    assert len(begun_[4]) == 6 * Mix.texts and len(begun_[4][0]) == 4 * SIZE
    again = Sampler(add_bos=True, chats=True)
    np.testing.assert_array_equal(chunks, mixed_chunks(again, parse_mix("own=1,chat=6,begun=6"), 13, SIZE))
    assert [o.tolist() for o in again.asked[1][4]] == [o.tolist() for o in chat[4]]


def test_a_model_without_a_chat_format_is_asked_for_no_chats() -> None:
    base, chatty = Sampler(add_bos=False), Sampler(add_bos=False, chats=True)
    mix = parse_mix("docs=1,chat=2,own=1,seed=4")
    assert mix.of(chatty) == mix and mix.of(base) == Mix({"docs": 1, "own": 1}, seed=4)
    with pytest.raises(FormatError, match="no chat format"):
        parse_mix("chat=1").of(base)


def test_a_short_source_is_read_again_rather_than_too_little() -> None:
    chunks = mixed_chunks(Sampler(add_bos=True), parse_mix("tongues=1"), 6, SIZE)
    assert chunks.shape == (6, SIZE) and (chunks[:, 0] == BOS).all()
    np.testing.assert_array_equal(chunks[0], chunks[4])


def test_openings_stand_behind_one_bos_and_leave_room_in_no_text_for_more_than_it_holds() -> None:
    texts, given_ = begun(3, 4, BOS, [np.array([5, 6]), np.array([BOS, 7]), np.arange(10, 20)])
    assert texts.tolist() == [[BOS, 5, 6, BOS], [BOS, 7, BOS, BOS], [BOS, 10, 11, 12]] and given_.tolist() == [3, 2, 4]
    texts, given_ = begun(2, 3, BOS, None)
    assert texts.tolist() == [[BOS] * 3] * 2 and given_.tolist() == [1, 1]


def test_openings_differ_from_each_other() -> None:
    assert len(set(BEGINNINGS)) == len(BEGINNINGS) and len(set(QUESTIONS)) == len(QUESTIONS)


@pytest.mark.parametrize("text", ["poems=1", "docs=-1", "docs", "texts=0", "docs=0.5", "texts=0.5", "excerpt=0.2"])
def test_a_mix_that_cannot_be_read_is_told(text: str) -> None:
    with pytest.raises(FormatError, match=f"--corpus {text}"):
        parse_mix(text)


def test_more_texts_than_a_chunk_holds_are_refused() -> None:
    with pytest.raises(FormatError, match=f"--corpus texts=40: more than a chunk of {SIZE} tokens holds; at most 32"):
        mixed_chunks(Sampler(add_bos=True), parse_mix("own=1,texts=40"), 2, SIZE)


class Engine(Capture):
    """A model that says position + 20 everywhere, and ends its text with 25."""

    bos, add_bos = BOS, True

    def steps(self, texts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        for position in range(texts.shape[1] - 1):
            yield (
                position,
                np.where(np.arange(40) == position + 20, 1e3, 0.0).astype(np.float32)[None].repeat(len(texts), 0),
            )

    def ends(self, tokens: np.ndarray) -> np.ndarray:
        return tokens == 25


@pytest.mark.parametrize("keep_end", [False, True])
def test_all_batches_keep_their_openings_and_begin_again_where_a_text_ends(keep_end: bool) -> None:
    n, length, calls = SAMPLED_TOGETHER + 6, 9, []
    openings = [np.arange(30, 30 + i % 4) for i in range(n)]
    texts = Engine().sample(n, length, 1, lambda: calls.append(1), openings, keep_end=keep_end)
    for i, row in enumerate(texts.tolist()):
        said = [20 + p if keep_end or p != 5 else BOS for p in range(length - 1)]
        assert row == [BOS, *openings[i], *said[i % 4 :]]
    assert len(calls) == 2 * (length - 1)
