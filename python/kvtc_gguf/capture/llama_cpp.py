"""Capture through the patched libllama: its graphs expose q, k, v of every cached layer as `kvtc_*` nodes.

`llama_kvtc_set_capture(true)` adds contiguous f32 nodes, read here by the scheduler's evaluation callback, one layer at
a time: nothing is kept longer than its layer takes.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np

from kvtc_gguf.capture import Capture, Consumer, LayerSample, library
from kvtc_gguf.layout import FormatError

NODE = re.compile(rb"kvtc_(q|k|v|q_rope|k_rope)(_swa)?-(\d+)")
PARTS = ("q", "k", "v", "q_rope", "k_rope")
LOG_ERROR = 4
CHAT_BYTES = 4096  # what a chat format puts around a question, at most: system prompts are short


class LlamaCapture(Capture):
    """A model in the patched libllama. Use as a context manager.

    Raises FormatError, with the library's own words where it has any, when something cannot be loaded or run.
    """

    def __init__(self, path: Path, ctx_size: int, threads: int) -> None:
        self.path, self.ctx_size, self.threads = path, ctx_size, threads
        self.model = self.ctx = None
        self.errors: list[str] = []
        self.api, self.base = library.load()
        self._keep = [self.api.llama_log_callback(self._log)]
        self.api.llama_log_set(self._keep[0], None)
        self._set_capture(False)
        self.api.llama_backend_init()
        self.model = self.api.llama_model_load_from_file(str(path).encode(), self.api.llama_model_default_params())
        if not self.model:
            raise FormatError(self._reason(f"{path}: llama.cpp cannot load this model"))
        self.vocab = self.api.llama_model_get_vocab(self.model)
        self.n_vocab = self.api.llama_vocab_n_tokens(self.vocab)
        self.n_swa = self.api.llama_model_n_swa(self.model)
        self.interleaved = self.api.llama_model_rope_type(self.model) == self.api.LLAMA_ROPE_TYPE_NORM
        self.bos = self.api.llama_vocab_bos(self.vocab)
        self.add_bos = bool(self.api.llama_vocab_get_add_bos(self.vocab)) and self.bos >= 0

    def __enter__(self) -> LlamaCapture:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close_context()
        if self.model:
            self.api.llama_model_free(self.model)
            self.model = None
        self._set_capture(False)
        self.api.llama_log_set(ctypes.cast(None, self.api.llama_log_callback), None)

    def tokenize(self, text: str) -> np.ndarray:
        """Tokens i32 [n] of a text, without BOS; special tokens are not parsed."""
        return self._tokens_of(text.encode(), False)

    def _tokens_of(self, data: bytes, special: bool) -> np.ndarray:
        size = len(data) + 16
        out = (self.api.llama_token * size)()
        n = self.api.llama_tokenize(self.vocab, data, len(data), out, size, False, special)
        if n < 0:
            raise FormatError(f"{self.path}: the model's tokenizer failed on the calibration text")
        return np.array(out[:n], np.int32)

    def run(self, tokens: np.ndarray, consumer: Consumer) -> None:
        """Runs one chunk (at most ctx_size tokens, from position 0) and hands every layer's sample to consumer."""
        if not self.ctx:
            self._set_capture(True)
            self._open_context(self.ctx_size, 1, callback=True)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.ctx), True)
        self._consumer, self._parts, self._failure, self._tokens = consumer, {}, None, len(tokens)
        self._samples = 0
        array = (self.api.llama_token * len(tokens))(*tokens.tolist())
        code = self.api.llama_decode(self.ctx, self.api.llama_batch_get_one(array, len(tokens)))
        self.api.llama_synchronize(self.ctx)
        if self._failure:
            raise self._failure
        if code != 0:
            raise FormatError(self._reason(f"{self.path}: llama_decode failed with code {code}"))
        if not self._samples:
            raise FormatError(
                self._reason(f"{self.path}: no layer has a plain K/V cache (kvtc serves no MLA or recurrent models)")
            )

    def chat(self, question: str) -> np.ndarray | None:
        """See `Capture`. llama.cpp knows the usual formats by their templates; with others the model counts as none."""
        template = self.api.llama_model_chat_template(self.model, None)
        if not template:
            return None
        message = (self.api.llama_chat_message * 1)(self.api.llama_chat_message(b"user", question.encode()))
        buffer = ctypes.create_string_buffer(CHAT_BYTES + 2 * len(question.encode()))
        n = self.api.llama_chat_apply_template(template, message, 1, True, buffer, len(buffer))
        return self._tokens_of(buffer.raw[:n], True) if 0 < n <= len(buffer) else None

    @contextmanager
    def generating(self, n_sequences: int, length: int) -> Iterator[None]:
        """See `Capture`."""
        self._close_context()
        self._set_capture(False)
        self._batch = self.api.llama_batch_init(n_sequences, 0, 1)
        try:
            self._open_context(n_sequences * length, n_sequences, callback=False)
            yield
        finally:
            self.api.llama_batch_free(self._batch)
            self._close_context()

    def steps(self, texts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """See `Capture`."""
        n_sequences, length = texts.shape
        batch = self._batch
        self.api.llama_memory_clear(self.api.llama_get_memory(self.ctx), True)
        for position in range(length - 1):
            batch.n_tokens = n_sequences
            for i in range(n_sequences):
                batch.token[i], batch.pos[i] = int(texts[i, position]), position
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, i, 1
            if self.api.llama_decode(self.ctx, batch) != 0:
                raise FormatError(self._reason(f"{self.path}: llama_decode failed while sampling text"))
            flat = np.ctypeslib.as_array(self.api.llama_get_logits(self.ctx), (n_sequences * self.n_vocab,))
            yield position, flat.reshape(n_sequences, self.n_vocab)

    def ends(self, tokens: np.ndarray) -> np.ndarray:
        """See `Capture`."""
        return np.array([self.api.llama_vocab_is_eog(self.vocab, int(token)) for token in tokens], bool)

    def _open_context(self, n_ctx: int, n_sequences: int, callback: bool) -> None:
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = n_ctx, n_sequences, False
        params.n_batch = params.n_ubatch = self.ctx_size if callback else max(n_sequences, 32)
        params.n_outputs_max = n_sequences  # else the logits of a whole chunk are reserved
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = self.api.GGML_TYPE_F16
        params.no_perf = True
        if callback:
            self._keep.append(self.api.ggml_backend_sched_eval_callback(self._evaluate))
            params.cb_eval = self._keep[-1]
        self.ctx = self.api.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise FormatError(self._reason(f"{self.path}: llama.cpp cannot make a context of {n_ctx} tokens"))

    def _close_context(self) -> None:
        if self.ctx:
            self.api.llama_free(self.ctx)
            self.ctx = None

    def _set_capture(self, on: bool) -> None:
        try:
            function = self.api._lib.llama_kvtc_set_capture
        except AttributeError as error:
            raise FormatError(
                "this llama.cpp is not the patched one: run `make build` (or set KVTC_LIB_DIR)"
            ) from error
        function.argtypes, function.restype = [ctypes.c_bool], None
        function(on)

    def _evaluate(self, tensor: int, ask: bool, _user: int) -> bool:
        """The scheduler's callback: asked first whether a node is wanted, then called once it has been computed."""
        try:
            match = NODE.fullmatch(self.base.ggml_get_name(tensor))
            if ask or not match:
                return match is not None
            self._take(int(match[3]), match[1].decode(), match[2] is not None, tensor)
            return True
        except BaseException as error:  # an exception must not unwind through C; run() raises it
            self._failure = error
            return False

    def _take(self, layer: int, part: str, sliding: bool, tensor: int) -> None:
        size, rows = self.base.ggml_nelements(tensor), self.base.ggml_nrows(tensor)
        values = np.empty((self._tokens, rows // self._tokens, size // rows), np.float32)
        if values.size != size:
            raise FormatError(f"{self.path}: layer {layer} does not hold {self._tokens} tokens in one piece")
        self.base.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
        parts = self._parts.setdefault(layer, {})
        parts[part] = values
        parts["window"] = max(parts.get("window", 0), self.n_swa if sliding else 0)
        if all(p in parts for p in PARTS):
            self._samples += 1
            self._consumer(LayerSample(layer=layer, **self._parts.pop(layer)))

    def _log(self, level: int, text: bytes, _user: int) -> None:
        if level == LOG_ERROR and text.strip():
            self.errors = [*self.errors, text.decode(errors="replace").strip()][-3:]

    def _reason(self, message: str) -> str:
        return f"{message}: {self.errors[-1]}" if self.errors else message
