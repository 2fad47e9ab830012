"""Failures caught: a cache of another type, calibration, sink or window than `Llama` was asked for, its objects sharing
any of that, an error without its reason, a prompt cut back that goes on otherwise than a fresh one."""

from __future__ import annotations

import ctypes
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import llama_cpp
import numpy as np
import pytest
import tools
from llama_cpp import kvtc

from bench.logs import parse_sizes

EXACT = 1 << 20  # a window beyond any context here: nothing is read from codes
TEXT = b"The quick brown fox jumps over the lazy dog. " * 6


def logits(llama: llama_cpp.Llama, text: bytes = TEXT) -> np.ndarray:
    """f32 [n, n_vocab] of a fresh evaluation."""
    llama.reset()
    llama._ctx.kv_cache_clear()
    llama.eval(llama.tokenize(text))
    return llama._scores.copy()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


@pytest.mark.parametrize(
    ("arguments", "types"),
    [
        ({}, ("f16", "f16", None, None)),
        ({"cache_type": "kvtc-k2v4"}, ("kvtc2", "kvtc4", 4, 128)),
        ({"cache_type": "KVTC-K3V4", "kvtc_window": 32, "kvtc_sink": 0}, ("kvtc3", "kvtc4", 0, 32)),
        ({"cache_type": "kvtc2"}, ("kvtc2", "kvtc2", 4, 128)),
        ({"cache_type": "turbo3"}, ("turbo3", "turbo3", None, None)),
        ({"type_k": "kvtc2", "type_v": "q8_0"}, ("kvtc2", "q8_0", 4, 128)),
        ({"type_k": 8, "type_v": "8"}, ("q8_0", "q8_0", None, None)),
    ],
)
def test_cache_is_what_was_asked_for(open_llama, log, arguments, types) -> None:
    open_llama(**arguments)
    sizes = parse_sizes("".join(log))
    assert (sizes.type_k, sizes.type_v, sizes.sink or types[2], sizes.window or types[3]) == types


def test_layers_for_a_gpu_that_is_not_there_are_a_warning(open_llama, tmp_path, monkeypatch, recwarn) -> None:
    open_llama(n_gpu_layers=-1)  # made for the CPU alone: as upstream
    monkeypatch.setattr(llama_cpp.llama_cpp, "_base_path", tmp_path)
    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_supports_gpu_offload", lambda: False)
    (tmp_path / "libggml-cuda.so").touch()
    open_llama()
    assert not [w for w in recwarn if "n_gpu_layers" in str(w.message)]
    with pytest.warns(UserWarning, match="n_gpu_layers=-1 has no effect: no CUDA GPU was found"):
        open_llama(n_gpu_layers=-1)


@pytest.mark.parametrize("arguments", [{"cache_type": "kvtc-k2v4"}, {"type_v": "q8_0"}, {"cache_type": "turbo2"}])
def test_flash_attention_comes_on_and_says_so_to_who_refused_it(open_llama, recwarn, arguments) -> None:
    llama = open_llama(**arguments)
    assert llama.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    assert not [w for w in recwarn if w.category is UserWarning]
    with pytest.warns(UserWarning, match="flash_attn=False has no effect"):
        open_llama(flash_attn=False, **arguments)


def test_flash_attention_of_plain_types_stays_as_asked_for(open_llama, recwarn) -> None:
    for asked, got in ((None, 0), (False, 0), (True, 1)):
        assert open_llama(flash_attn=asked).context_params.flash_attn_type == got
    assert not [w for w in recwarn if w.category is UserWarning]


def test_options_without_a_type_that_takes_them_are_named(open_llama) -> None:
    with pytest.warns(UserWarning, match="kvtc_window without a kvtc cache type"):
        open_llama(kvtc_window=16)


def test_window_sinks_and_calibration_count(open_llama, model, other) -> None:
    f16 = logits(open_llama(flash_attn=True))
    exact, coded, foreign = (
        logits(open_llama(cache_type="kvtc-k2v4", kvtc_sink=0, **more))
        for more in ({"kvtc_window": EXACT}, {"kvtc_window": 0}, {"kvtc_window": 0, "kvtc_file": other})
    )
    again = logits(open_llama(cache_type="kvtc-k2v4", kvtc_sink=0, kvtc_window=0, kvtc_file=[other, _sidecar(model)]))
    assert difference(exact, f16) < 0.05 < difference(coded, f16)
    assert difference(foreign, coded) > 0.05
    assert difference(again, foreign) == 0


def test_objects_made_at_once_keep_their_own_calibration_and_window(open_llama, other) -> None:
    options = [{"kvtc_window": w, "kvtc_file": f} for w in (0, 16) for f in (None, other)]
    alone = [logits(open_llama(cache_type="kvtc-k2v4", **o)) for o in options]
    with ThreadPoolExecutor(len(options)) as pool:
        made = list(pool.map(lambda o: open_llama(cache_type="kvtc-k2v4", **o), options))
    assert [difference(logits(llama), expected) for llama, expected in zip(made, alone, strict=True)] == [0] * 4
    assert all(difference(a, alone[0]) > 0 for a in alone[1:])


def test_two_threads_with_a_lock_get_the_tokens_of_one(open_llama) -> None:
    llama, lock = open_llama(cache_type="kvtc-k2v4", kvtc_window=16), threading.Lock()
    prompts = [TEXT.decode()[i:] for i in range(8)]

    def complete(prompt: str) -> str:
        with lock:
            return llama.create_completion(prompt, max_tokens=12, temperature=0)["choices"][0]["text"]

    alone = [complete(prompt) for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(complete, prompts)) == alone


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"cache_type": "kvtc-k2v4", "kvtc_file": "/nowhere.gguf"}, "kvtc: cannot open calibration /nowhere.gguf"),
        ({"cache_type": "kvtc-k2v9"}, "cache_type takes kvtc-k<a>v<b> with a, b from 1 to 6.*not 'kvtc-k2v9'"),
        ({"cache_type": "kvtc-k2v4", "type_k": "f16"}, "give either it, or type_k and type_v"),
        ({"type_k": "q9"}, "'q9' is no KV cache type: choose one of f32"),
        ({"type_k": 14}, "14 is no KV cache type"),
        ({"type_k": "turbo9"}, "'turbo9' is no KV cache type"),
        (
            {"cache_type": "kvtc2", "kvtc_window": -1},
            "kvtc_window takes a number of tokens from 0 to 999999999, not -1",
        ),
        ({"cache_type": "kvtc2", "kvtc_sink": 10**10}, "kvtc_sink takes a number of tokens"),
        ({"cache_type": "kvtc2", "kvtc_sink": "4"}, "kvtc_sink takes a number of tokens.*not '4'"),
        ({"cache_type": 42}, "cache_type takes kvtc-k<a>v<b>.*not 42"),
        ({"cache_type": "kvtc2", "kvtc_file": 42}, "kvtc_file takes a path without commas, or several, not 42"),
        ({"cache_type": "kvtc2", "kvtc_file": "a,b.gguf"}, "kvtc_file takes a path without commas.*'a,b.gguf'"),
        ({"cache_type": "kvtc2", "kvtc_file": "/"}, "context: .*kvtc.* /: "),
    ],
)
def test_what_cannot_be_served_raises_with_its_reason(open_llama, arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        open_llama(**arguments)
    open_llama(cache_type="kvtc-k2v4")  # nothing of the failure stays


def test_model_without_a_calibration_raises_with_the_command_that_makes_one(open_llama, model, tmp_path) -> None:
    shutil.copy(model, tmp_path / "bare.gguf")
    with pytest.raises(ValueError, match=r"no calibration for .*bare.gguf: run `python -m kvtc_gguf.calibrate"):
        open_llama(path=tmp_path / "bare.gguf", cache_type="kvtc-k2v4")


def current() -> int:
    """The logger in place."""
    callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    return ctypes.cast(callback, ctypes.c_void_p).value


def test_threads_that_leave_in_the_order_they_came_leave_the_users_logger(log) -> None:
    before, blocks = current(), [kvtc._errors(), kvtc._errors()]
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for thread, block in zip((first, second), blocks, strict=True):
            thread.submit(block.__enter__).result()
        for thread, block in zip((first, second), blocks, strict=True):
            thread.submit(block.__exit__, None, None, None).result()
    assert current() == before


def test_failed_context_leaves_the_users_logger_in_place(open_llama, log) -> None:
    before = current()
    with pytest.raises(ValueError, match="cannot open"):
        open_llama(cache_type="kvtc-k2v4", kvtc_file="/nowhere.gguf")
    assert current() == before
    assert any("cannot open calibration" in line for line in log)


def test_threads_hear_their_own_errors_and_the_logger_outlives_them(log, tmp_path) -> None:
    """A callback freed while another thread logs ends the process."""

    def work(n: int) -> None:
        for turn in range(60):
            path = str(tmp_path / f"absent-{n}-{turn}.gguf")
            with kvtc._errors() as lines:
                assert not llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
            named = [line for line in lines if "absent-" in line]
            assert named and all(path in line for line in named)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert not kvtc._heard
    log.clear()
    llama_cpp.llama_model_load_from_file(b"/nowhere.gguf", llama_cpp.llama_model_default_params())
    assert any("/nowhere.gguf" in line for line in log)


def test_libllama_without_kvtc_is_named(monkeypatch) -> None:
    with pytest.raises(RuntimeError, match="has no kvtc cache types"):
        kvtc._function("llama_kvtc_of_another_day", [], None)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("chatml", {}),
        ("llama-2", {}),
        ("chatml", {"response_format": {"type": "json_object", "schema": {"type": "boolean"}}}),
        ("chatml-function-calling", {"tools": [TOOL], "tool_choice": "auto"}),
    ],
)
def test_chat_handlers_answer_as_over_an_exact_cache(open_llama, form, more) -> None:
    messages = [{"role": "user", "content": TEXT.decode()}]
    limit = 24 if more else 4  # a few tokens on, a random model picks between two as likely

    def answer(**arguments) -> dict:
        llama = open_llama(chat_format=form, n_ctx=1024, **arguments)
        return llama.create_chat_completion(messages, max_tokens=limit, temperature=0, **more)["choices"][0]

    exact = answer(cache_type="kvtc-k2v4", kvtc_window=EXACT)
    assert exact == answer(flash_attn=True)
    coded = answer(cache_type="kvtc-k2v4")
    assert coded["message"].keys() == exact["message"].keys()


def test_pickled_object_comes_back_with_its_cache(open_llama, other) -> None:
    llama = open_llama(cache_type="kvtc-k2v4", kvtc_window=8, kvtc_file=str(other))
    copy = pickle.loads(pickle.dumps(llama))
    try:
        assert difference(logits(copy), logits(llama)) == 0
    finally:
        copy.close()


def test_prompt_cut_back_far_goes_on_as_a_fresh_one(open_llama, tmp_path) -> None:
    """A cut of more than 64 tokens leaves codes alone in what becomes the window: they must be computed again."""
    one_layer = tools.calibrated_model(tmp_path / "one.gguf", n_layer=1)  # its keys depend on their own token alone
    llama = open_llama(path=one_layer, cache_type="kvtc-k2v4", kvtc_window=32, n_ctx=1024)
    first = llama.tokenize(TEXT * 2)
    second = first[:300] + llama.tokenize(b" And then something else.", add_bos=False)

    def evaluate(tokens: list[int]) -> np.ndarray:
        next(llama.generate(tokens, temp=0))
        return llama._scores[len(tokens) - 1].copy()

    fresh = evaluate(second)
    llama.reset()
    llama._ctx.kv_cache_clear()
    evaluate(first)
    kept: list[int] = []
    original = llama._ctx.kv_cache_seq_rm
    llama._ctx.kv_cache_seq_rm = lambda seq, start, end: kept.append(start) or original(seq, start, end)
    resumed = evaluate(second)
    assert kept[0] == 300 - 2 * 32
    assert difference(resumed, fresh) < 1e-3


def test_sizes_at_8k_are_those_promised(open_llama, log) -> None:
    f16, coded = [], []
    for arguments, sizes in (({}, f16), ({"cache_type": "kvtc-k2v4"}, coded)):
        log.clear()
        open_llama(n_ctx=8192, logits_all=False, **arguments)
        sizes.append(parse_sizes("".join(log)))
    assert coded[0].codes == pytest.approx(f16[0].codes * 3 / 16)
    assert coded[0].codes + coded[0].exact <= f16[0].codes / 4.5


def _sidecar(model):
    return model.with_suffix(".kvtc.gguf")
