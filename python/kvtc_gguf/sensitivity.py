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
from kvtc_gguf.format import SIDES, Calibration
from kvtc_gguf.layout import FormatError

ROWS_BYTES = 128 * 2**20  # log-probabilities kept of a chunk: its second half, of a large vocabulary fewer rows
NOISY = 5e-4  # nats a token: a background above this drowns a layer at 2 bits, so layers are perturbed at 1
KVTC_TYPE = 42  # ggml's number of kvtc<b> is KVTC_TYPE + b

LayerBits = dict[str, list[int]]  # side -> bits by layer, 0 for layers without a cache


class Prober:
    """KLD of a model under a calibration with any bits by layer, on chunks i32 [n, T]. Use as a context manager.

    Keeps the log-probabilities of the f16 cache in the second half of each chunk, as many rows as ROWS_BYTES holds.
    Chunks should be as long as contexts are: values' random errors average out over the tokens that are attended to,
    keys' do not, so on chunks of 512 keys seem to matter less than they do. Raises FormatError as `LlamaCapture` does.
    """

    def __init__(self, model: Path, calibration: Calibration, chunks: np.ndarray, threads: int) -> None:
        self.calibration = copy.copy(calibration)
        self.calibration.stats = {}
        self.chunks, self.threads = chunks, threads
        self.folder = tempfile.TemporaryDirectory(prefix="kvtc-")
        self.capture = LlamaCapture(model, chunks.shape[1], threads)
        self.api, self.runs = self.capture.api, 0
        size = chunks.shape[1]
        step = max(1, -(-(size // 2) * self.capture.n_vocab * 4 // ROWS_BYTES))
        self.rows = np.arange(size // 2, size - 1, step)
        self.base = self._log_probabilities(self.api.GGML_TYPE_F16, self.api.GGML_TYPE_F16)

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        set_kvtc_params(self.api)
        self.capture.__exit__(kind, error, trace)
        self.folder.cleanup()

    def kld(self, bits: LayerBits) -> np.ndarray:
        """KLD of each scored row in nats, f64 [rows], against the f16 cache, with the default sinks and window."""
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
        each = [
            np.einsum("rv,rv->r", np.exp(base), base - mine, dtype=np.float64)
            for base, mine in zip(self.base, other, strict=True)
        ]
        return np.concatenate(each)

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


def measure(prober: Prober, step: Callable[[], None] | None = None) -> dict[str, np.ndarray]:
    """The statistics `kld.*` of a calibration, all f32, in nats a token; step is called after each run.

    `kld.{k,v}` [len(bits), block_count]: that side of one layer alone, -1 where not measured; `kld.spread.{k,v}`: its
    standard error; `kld.curve.{k,v}` [len(bits)]: that side of all layers; `kld.background` [1]: all layers at the
    widest budget, which is taken off the others, row by row.
    """
    calibration = prober.calibration
    widest = calibration.bits[-1]
    rest = prober.kld(uniform(calibration, widest, widest))
    perturbed = next(b for b in calibration.bits if b >= (1 if rest.mean() > NOISY else 2) or b == widest)
    result = {"kld.background": np.array([rest.mean()])}
    for side in SIDES:
        result[f"kld.curve.{side}"] = curve = np.full(len(calibration.bits), -1.0)
        for i, b in enumerate(calibration.bits[:-1]):
            k, v = (b, widest) if side == "k" else (widest, b)
            curve[i] = max((prober.kld(uniform(calibration, k, v)) - rest).mean(), 0.0)
            if step:
                step()
        shape = (len(calibration.bits), calibration.block_count)
        result[f"kld.{side}"], result[f"kld.spread.{side}"] = alone, spread = np.full((2, *shape), -1.0)
        for layer in sorted(calibration.layers):
            bits = uniform(calibration, widest, widest)
            bits[side][layer] = perturbed
            rows, place = prober.kld(bits) - rest, (calibration.bits.index(perturbed), layer)
            alone[place], spread[place] = max(rows.mean(), 0.0), standard_error(rows)
            if step:
                step()
    return {name: array.astype(np.float32) for name, array in result.items()}


def standard_error(rows: np.ndarray) -> float:
    """Of the mean of rows [n]."""
    return float(rows.std() / np.sqrt(len(rows)))
