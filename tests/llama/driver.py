"""libllama as the tests of this folder see it: a context with chosen cache types, its memory operations, its states."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tools
from kvtc_gguf.capture import library

TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8, **{f"kvtc{bits}": 42 + bits for bits in range(1, 7)}}
TYPES |= {f"turbo{bits}": 47 + bits for bits in (2, 3, 4)}
EXACT = 1 << 20  # a window beyond any context here: nothing is read from codes
HUGE = -1  # as the end of a range: to the end of the sequence

api, _ = library.load()


log: list[str] = []  # what libllama has said since `log.clear()`


@api.llama_log_callback
def _on_log(_level: int, text: bytes, _data: object) -> None:
    log.append(text.decode(errors="replace"))


def listen() -> None:
    """Fill `log` from now on. Others in this process listen too, and libllama tells the last one alone."""
    api.llama_log_set(_on_log, None)


listen()
api.llama_backend_init()


class Model:
    """A loaded model; freed at the end of the process, since its contexts refer to it."""

    def __init__(self, path: Path) -> None:
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        self.pointer = api.llama_model_load_from_file(str(path).encode(), params)
        assert self.pointer, "".join(log)
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.pointer))


class Context:
    """A context of a model. cache: types of keys and values; sink, window: as --kvtc-sink and --kvtc-window."""

    def __init__(
        self,
        model: Model,
        cache: tuple[str, str] = ("kvtc2", "kvtc4"),
        *,
        sink: int = 4,
        window: int = 16,
        n_ctx: int = 256,
        n_seq: int = 1,
        unified: bool = True,
        swa_full: bool = True,
        n_ubatch: int = 512,
    ) -> None:
        tools.set_exact(api, sink, window)
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = n_ctx, n_seq, unified
        params.n_batch, params.n_ubatch = 512, n_ubatch
        params.n_threads = params.n_threads_batch = 1
        params.type_k, params.type_v = (TYPES[name] for name in cache)
        params.flash_attn_type = 1
        params.swa_full = swa_full
        self.model, self.n_seq = model, n_seq
        self.pointer = api.llama_init_from_model(model.pointer, params)
        assert self.pointer, "".join(log)
        self.memory = api.llama_get_memory(self.pointer)
        self._batch = api.llama_batch_init(512, 0, 1)

    def close(self) -> None:
        api.llama_batch_free(self._batch)
        api.llama_free(self.pointer)

    def decode(self, tokens: Sequence[int], start: int, seq: int = 0) -> np.ndarray:
        """Tokens at positions from `start` on. Returns logits f32 [n, n_vocab]."""
        return self.decode_each([(token, start + i, seq) for i, token in enumerate(tokens)])

    def decode_each(self, rows: Iterable[tuple[int, int, int]]) -> np.ndarray:
        """One batch of (token, position, sequence). Returns logits f32 [n, n_vocab]."""
        batch, n = self._batch, 0
        for n, (token, pos, seq) in enumerate(rows, 1):
            batch.token[n - 1], batch.pos[n - 1] = token, pos
            batch.n_seq_id[n - 1], batch.seq_id[n - 1][0], batch.logits[n - 1] = 1, seq, 1
        batch.n_tokens = n
        code = api.llama_decode(self.pointer, batch)
        assert code == 0, f"llama_decode gave {code}: {''.join(log[-5:])}"
        return np.ctypeslib.as_array(api.llama_get_logits(self.pointer), (n, self.model.n_vocab)).copy()

    def greedy(self, first: int, start: int, n: int, seq: int = 0) -> tuple[list[int], np.ndarray]:
        """n greedy tokens after the token `first` at position `start`, and their logits f32 [n, n_vocab]."""
        tokens, logits = [first], []
        for i in range(n):
            logits.append(self.decode(tokens[-1:], start + i, seq)[0])
            tokens.append(int(logits[-1].argmax()))
        return tokens[1:], np.stack(logits)

    def rm(self, seq: int, p0: int, p1: int) -> bool:
        return bool(api.llama_memory_seq_rm(self.memory, seq, p0, p1))

    def cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        api.llama_memory_seq_cp(self.memory, src, dst, p0, p1)

    def keep(self, seq: int) -> None:
        api.llama_memory_seq_keep(self.memory, seq)

    def add(self, seq: int, p0: int, p1: int, shift: int) -> None:
        api.llama_memory_seq_add(self.memory, seq, p0, p1, shift)

    def div(self, seq: int, p0: int, p1: int, by: int) -> None:
        api.llama_memory_seq_div(self.memory, seq, p0, p1, by)

    def clear(self, data: bool = True) -> None:
        api.llama_memory_clear(self.memory, data)

    def shift(self, keep: int, discard: int, seq: int = 0) -> None:
        """A context shift as llama-server does it: `discard` tokens after the first `keep` go, the rest moves up."""
        assert self.rm(seq, keep, keep + discard)
        self.add(seq, keep + discard, HUGE, -discard)

    def range(self, seq: int) -> tuple[int, int]:
        """(least, greatest) position of a sequence, -1 where it is empty."""
        least = api.llama_memory_seq_pos_min(self.memory, seq)
        return least, api.llama_memory_seq_pos_max(self.memory, seq)

    def save(self, seq: int | None = None) -> bytes:
        """The state of a sequence, or of the whole context."""
        size = (
            api.llama_state_get_size(self.pointer) if seq is None else api.llama_state_seq_get_size(self.pointer, seq)
        )
        data = (ctypes.c_uint8 * size)()
        if seq is None:
            written = api.llama_state_get_data(self.pointer, data, size)
        else:
            written = api.llama_state_seq_get_data(self.pointer, data, size, seq)
        assert 0 < written <= size
        return bytes(data[:written])

    def restore(self, state: bytes, seq: int | None = None) -> bool:
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if seq is None:
            return api.llama_state_set_data(self.pointer, data, len(state)) == len(state)
        return api.llama_state_seq_set_data(self.pointer, data, len(state), seq) == len(state)

    def save_file(self, path: Path, tokens: Sequence[int], seq: int | None = None) -> None:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        name = str(path).encode()
        if seq is None:
            assert api.llama_state_save_file(self.pointer, name, array, len(tokens))
        else:
            assert api.llama_state_seq_save_file(self.pointer, name, seq, array, len(tokens))

    def restore_file(self, path: Path, seq: int | None = None) -> list[int] | None:
        """The tokens that were saved with the state, or None if it was refused."""
        array, count = (ctypes.c_int32 * 4096)(), ctypes.c_size_t(0)
        name = str(path).encode()
        if seq is None:
            done = api.llama_state_load_file(self.pointer, name, array, 4096, ctypes.byref(count))
        else:
            done = api.llama_state_seq_load_file(self.pointer, name, seq, array, 4096, ctypes.byref(count))
        return list(array[: count.value]) if done else None


def kld(base: np.ndarray, other: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of rows of logits, in nats a token."""
    p, q = (x.astype(np.float64) - x.max(axis=-1, keepdims=True) for x in (base, other))
    p, q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def text(n: int, seed: int = 0) -> list[int]:
    """n random tokens of single bytes."""
    return [int(t) for t in np.random.default_rng(seed).integers(3, 259, n)]
