"""Sensitivity, measured: the KLD of the model's own predictions when K or V of one layer alone has few bits.

Between layers no rule from variances decides well where bits go (tried for values: KLD 0.0112 -> 0.013 to 0.017), as it
does not know what later layers make of an error. So each layer and side is perturbed alone, the others at the widest
budget, and the whole model is run. The reference is the f16 cache; what the widest budget alone loses (with quantised
weights on a CPU mostly flipped roundings of activations) is measured too and taken off.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np

from kvtc_gguf import format
from kvtc_gguf.capture.library import set_kvtc_params
from kvtc_gguf.capture.llama_cpp import LlamaCapture
from kvtc_gguf.format import Calibration
from kvtc_gguf.layout import FormatError

SIDES = ("k", "v")
ROW_STEP = 2  # of the second half of a chunk, every other row is scored
NOISY = 5e-4  # nats a token: a background above this drowns a layer at 2 bits, so layers are perturbed at 1
KVTC_TYPE = 42  # ggml's number of kvtc<b> is KVTC_TYPE + b

LayerBits = dict[str, list[int]]  # side -> bits by layer, 0 for layers without a cache


class Prober:
    """KLD of a model under a calibration with any bits by layer, on chunks i32 [n, T]. Use as a context manager.

    Keeps the log-probabilities of the f16 cache, f32 [n, T / 4, n_vocab]. Raises FormatError as `LlamaCapture` does.
    """

    def __init__(self, model: Path, calibration: Calibration, chunks: np.ndarray, threads: int) -> None:
        self.calibration = copy.copy(calibration)
        self.calibration.stats = {}
        self.chunks, self.threads = chunks, threads
        self.folder = tempfile.TemporaryDirectory(prefix="kvtc-")
        self.capture = LlamaCapture(model, chunks.shape[1], threads)
        self.api, self.runs = self.capture.api, 0
        self.rows = np.arange(chunks.shape[1] // 2, chunks.shape[1] - 1, ROW_STEP)
        self.base = self._log_probabilities(self.api.GGML_TYPE_F16, self.api.GGML_TYPE_F16)

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        set_kvtc_params(self.api)
        self.capture.__exit__(kind, error, trace)
        self.folder.cleanup()

    def kld(self, bits: LayerBits) -> float:
        """Mean KLD in nats a token against the f16 cache, with the default sinks and window."""
        self.runs += 1
        path = Path(self.folder.name) / f"{self.runs}.kvtc.gguf"
        asked = self.calibration.bits[-1]
        self.calibration.layer_bits = {side: [bits[side]] * len(self.calibration.bits) for side in SIDES}
        format.write(self.calibration, path)
        set_kvtc_params(self.api, path)
        try:
            other = self._log_probabilities(KVTC_TYPE + asked, KVTC_TYPE + asked)
        finally:
            path.unlink()
        total = 0.0
        for base, mine in zip(self.base, other, strict=True):
            total += float((np.exp(base) * (base - mine)).sum(axis=1, dtype=np.float64).mean())
        return total / len(self.base)

    def _log_probabilities(self, type_k: int, type_v: int) -> list[np.ndarray]:
        api, size = self.api, self.chunks.shape[1]
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = size
        params.n_ubatch = min(size, 512)
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k, params.type_v, params.flash_attn_type, params.no_perf = type_k, type_v, 1, True
        context = api.llama_init_from_model(self.capture.model, params)
        if not context:
            raise FormatError(
                self.capture._reason(f"{self.capture.path}: llama.cpp cannot make a context of {size} tokens")
            )
        batch = api.llama_batch_init(size, 0, 1)
        result = []
        try:
            for chunk in self.chunks:
                api.llama_memory_clear(api.llama_get_memory(context), True)
                for i, token in enumerate(chunk.tolist()):
                    batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
                    batch.logits[i] = 0
                for row in self.rows.tolist():
                    batch.logits[row] = 1
                batch.n_tokens = size
                if api.llama_decode(context, batch) != 0:
                    raise FormatError(self.capture._reason(f"{self.capture.path}: llama_decode failed"))
                shape = (len(self.rows), self.capture.n_vocab)
                logits = np.ctypeslib.as_array(api.llama_get_logits(context), shape)
                logits = logits - logits.max(axis=1, keepdims=True)
                logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
                result.append(logits)
        finally:
            api.llama_batch_free(batch)
            api.llama_free(context)
        return result


def uniform(calibration: Calibration, k: int, v: int) -> LayerBits:
    """The same bits for all layers that have a cache."""
    return {
        side: [bits if layer in calibration.layers else 0 for layer in range(calibration.block_count)]
        for side, bits in zip(SIDES, (k, v), strict=True)
    }


def measure(prober: Prober, step: Callable[[], None] | None = None) -> tuple[dict[str, np.ndarray], float]:
    """(side -> KLD f32 [len(bits), block_count] of that side of one layer alone, and of all layers in `curve.<side>`
    [len(bits)]; background). -1 where not measured.

    step is called after each run. The background is the KLD with all layers at the widest budget; it is taken off.
    """
    calibration = prober.calibration
    widest = calibration.bits[-1]
    background = prober.kld(uniform(calibration, widest, widest))
    perturbed = next(b for b in calibration.bits if b >= (1 if background > NOISY else 2) or b == widest)
    result = {s: np.full((len(calibration.bits), calibration.block_count), -1.0, np.float32) for s in SIDES}
    for side in SIDES:
        curve = np.full(len(calibration.bits), -1.0, np.float32)
        for i, b in enumerate(calibration.bits[:-1]):
            k, v = (b, widest) if side == "k" else (widest, b)
            curve[i] = max(prober.kld(uniform(calibration, k, v)) - background, 0.0)
            if step:
                step()
        result[f"curve.{side}"] = curve
        for layer in sorted(calibration.layers):
            bits = uniform(calibration, widest, widest)
            bits[side][layer] = perturbed
            result[side][calibration.bits.index(perturbed), layer] = max(prober.kld(bits) - background, 0.0)
            if step:
                step()
    return result, background
