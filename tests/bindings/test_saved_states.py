"""Failures caught: a saved state, a cache of prompts or an embedding that says otherwise when the KV cache is coded, a
state of another cache that is taken, or leaves the object half changed."""

from __future__ import annotations

import llama_cpp
import numpy as np
import pytest

TEXT = b"How vexingly quick daft zebras jump over the moon! " * 4
MORE = b"And what then?"
KVTC = {"cache_type": "kvtc-k2v4", "kvtc_window": 16}


def go_on(llama: llama_cpp.Llama) -> np.ndarray:
    """f32 [n, n_vocab]: logits of MORE after what the cache holds."""
    start = llama.n_tokens
    llama.eval(llama.tokenize(MORE, add_bos=False))
    return llama._scores[start:].copy()


def filled(llama: llama_cpp.Llama) -> llama_cpp.Llama:
    llama.eval(llama.tokenize(TEXT))
    return llama


@pytest.mark.parametrize("arguments", [KVTC, {"cache_type": "turbo3"}, {"type_k": "kvtc3", "type_v": "f16"}, {}])
def test_saved_state_goes_on_as_before_here_and_elsewhere(open_llama, arguments) -> None:
    first = filled(open_llama(**arguments))
    state = first.save_state()
    expected = go_on(first)
    elsewhere = open_llama(**arguments)
    for llama in (first, elsewhere):
        llama.load_state(state)
        assert np.array_equal(go_on(llama), expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({**KVTC, "kvtc_window": 32}, "window"),
        ({"cache_type": "kvtc-k3v4", "kvtc_window": 16}, "the state holds kvtc2"),
        ({}, ""),
    ],
)
def test_state_of_another_cache_is_refused_and_leaves_an_empty_one(open_llama, arguments, words) -> None:
    state = filled(open_llama(**KVTC)).save_state()
    llama = filled(open_llama(**arguments))
    with pytest.raises(RuntimeError, match=f"Failed to set llama state data: .*{words}"):
        llama.load_state(state)
    assert llama.n_tokens == 0
    fresh = go_on(filled(open_llama(**arguments)))
    assert np.array_equal(go_on(filled(llama)), fresh)


def test_damaged_state_is_refused(open_llama) -> None:
    llama = filled(open_llama(**KVTC))
    state = llama.save_state()
    with pytest.raises(RuntimeError, match="Failed to set llama state data"):
        llama.load_state(replace_state(state, state.llama_state[:-7]))


def replace_state(state: llama_cpp.LlamaState, data: bytes) -> llama_cpp.LlamaState:
    copy = llama_cpp.LlamaState.__new__(llama_cpp.LlamaState)
    copy.__dict__.update({**state.__dict__, "llama_state": data, "llama_state_size": len(data)})
    return copy


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_prompt_cache_gives_what_a_fresh_evaluation_gives(open_llama, tmp_path, kind) -> None:
    def complete(llama: llama_cpp.Llama, text: bytes) -> str:
        return llama.create_completion(text.decode(), max_tokens=12, temperature=0)["choices"][0]["text"]

    fresh = [complete(open_llama(**KVTC), text) for text in (TEXT, TEXT[::-1], TEXT)]
    llama = open_llama(**KVTC)
    cache = llama_cpp.LlamaRAMCache() if kind == "ram" else llama_cpp.LlamaDiskCache(str(tmp_path / "cache"))
    llama.set_cache(cache)
    assert [complete(llama, text) for text in (TEXT, TEXT[::-1], TEXT)] == fresh
    if kind == "disk":  # another process's, so to say
        later = open_llama(**KVTC)
        later.set_cache(llama_cpp.LlamaDiskCache(str(tmp_path / "cache")))
        assert complete(later, TEXT) == fresh[0]


def test_embeddings_of_several_sequences_are_those_of_f16(open_llama) -> None:
    texts = [TEXT.decode(), MORE.decode(), "Pack my box."]

    def embed(**arguments: object) -> np.ndarray:
        llama = open_llama(embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN, **arguments)
        assert llama.context_params.n_seq_max > len(texts)
        return np.array(llama.embed(texts, normalize=True))

    f16 = embed(flash_attn=True)
    exact, coded = embed(cache_type="kvtc-k2v4", kvtc_window=1 << 20), embed(**KVTC)
    assert np.abs(exact - f16).max() < 1e-3 < np.abs(coded - f16).max()
