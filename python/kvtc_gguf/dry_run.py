"""What a context of libllama would take, without taking it: a model loaded with `no_alloc`, and what its log says.

Sizes are llama.cpp's own, so they hold for every architecture and for the backends of this build.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

from kvtc_gguf.capture import library
from kvtc_gguf.layout import FormatError
from kvtc_gguf.model_info import ModelInfo

# As llama.cpp and kvtc print them; the number of MiB in each is the group `mib`, `exact`, `bases`, `codes`.
CACHE = re.compile(
    r"llama_kv_cache\w*: size =\s*(?P<mib>[\d.]+) MiB(?:.*?K \((?P<k>\w+)\):.*?V \((?P<v>\w+)\):)?", re.ASCII
)
BESIDE = re.compile(
    r"(?P<bpv>[\d.]+) bpv, codes\s+(?P<codes>[\d.]+) MiB, exact rows\s+(?P<exact>[\d.]+) MiB.*?"
    r"\bbases\s+(?P<bases>[\d.]+) MiB"
)
COMPUTE = re.compile(r"\w+:\s+(\S+) compute buffer size =\s*([\d.]+) MiB")
RECURRENT = re.compile(r"llama_memory_recurrent: size =\s*([\d.]+) MiB")
OUTPUT = re.compile(r"output buffer size =\s*([\d.]+) MiB")

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
TYPES |= {f"kvtc{bits}": 42 + bits for bits in range(1, 7)} | {f"turbo{bits}": 47 + bits for bits in (2, 3, 4)}
PRESET = re.compile(r"kvtc-k(\d)v(\d)")
PAD = 256  # llama.cpp rounds contexts up to this
MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """MiB of a context and its model. codes: K and V of the cache; exact: sinks and windows; compute: with outputs."""

    weights: float
    codes: float
    exact: float
    bases: float
    compute: float

    @property
    def total(self) -> float:
        return self.weights + self.codes + self.exact + self.bases + self.compute


def types_of(cache: str) -> tuple[str, str]:
    """Types of K and V of a cache as users name it: `f16`, `kvtc-k2v4`, `K/V`. Raises FormatError for unknown ones."""
    preset = PRESET.fullmatch(cache)
    key, _, value = cache.partition("/")
    pair = (f"kvtc{preset[1]}", f"kvtc{preset[2]}") if preset else (key, value or key)
    if unknown := [name for name in pair if name not in TYPES]:
        raise FormatError(f"{cache}: {unknown[0]} is no cache type; known are {', '.join(TYPES)} and kvtc-k<a>v<b>")
    return pair


class DryRun:
    """A model whose contexts can be sized. Use as a context manager. sink, window: -1 is the default of the type.

    gpu: whether layers and caches lie on this build's GPUs, whose memory alone is counted then.
    """

    def __init__(self, path: Path, calibration: Path | None = None, sink: int = -1, window: int = -1) -> None:
        self.path = path
        self.log: list[str] = []
        self.api, _ = library.load()
        self._keep = self.api.llama_log_callback(lambda level, text, _: self.log.append(text.decode(errors="replace")))
        self.api.llama_log_set(self._keep, None)
        library.set_kvtc_params(self.api, calibration, sink, window)
        self.api.llama_backend_init()
        self.gpu = bool(self.api.llama_supports_gpu_offload())
        params = self.api.llama_model_default_params()
        params.no_alloc, params.load_mode = True, self.api.LLAMA_LOAD_MODE_NONE
        self.model = self.api.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise FormatError(self._reason(f"{path}: llama.cpp cannot load this model"))
        self.trained_ctx = int(self.api.llama_model_n_ctx_train(self.model))
        tensors = ModelInfo(path).tensors
        sizes = {name: int(tensor.n_bytes) for name, tensor in tensors.items()}
        # token embeddings stay with the CPU; where they are the output matrix too, the GPU gets a copy
        own = sizes.get("token_embd.weight", 0) if self.gpu and "output.weight" in sizes else 0
        self.weights = (sum(sizes.values()) - own) / MIB

    def __enter__(self) -> DryRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.api.llama_model_free(self.model)
        self.api.llama_log_set(ctypes.cast(None, self.api.llama_log_callback), None)

    def sizes(self, cache: str, n_ctx: int, n_seq: int, unified: bool = False, n_ubatch: int = 512) -> Sizes:
        """What llama-server takes with `-c n_ctx -np n_seq -ub n_ubatch`. Raises FormatError, with its reason."""
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = n_ctx, n_seq, unified
        params.n_batch, params.n_ubatch = max(2048, n_ubatch), n_ubatch
        params.n_outputs_max, params.n_outputs_max_per_seq = min(params.n_batch, n_seq), 1
        params.type_k, params.type_v = (TYPES[name] for name in types_of(cache))
        params.swa_full = False
        self.log.clear()
        context = self.api.llama_init_from_model(self.model, params)
        if not context:
            raise FormatError(self._reason(f"{self.path}: a context of {n_ctx} tokens with {cache} cannot be made"))
        self.api.llama_free(context)
        return self._parse("".join(self.log))

    def _parse(self, log: str) -> Sizes:
        caches = [float(line["mib"]) for line in CACHE.finditer(log)]
        buffers = {name: float(mib) for name, mib in COMPUTE.findall(log)}  # of each device, the last reservation
        if self.gpu:
            buffers = {name: mib for name, mib in buffers.items() if name != "CPU" and not name.endswith("_Host")}
        else:
            buffers |= {f"output {i}": float(mib) for i, mib in enumerate(OUTPUT.findall(log))}
        beside = list(BESIDE.finditer(log))
        return Sizes(
            self.weights,
            sum(caches) + sum(map(float, RECURRENT.findall(log))),
            sum(float(line["exact"]) for line in beside),
            sum(float(line["bases"]) for line in beside),
            sum(buffers.values()),
        )

    def _reason(self, message: str) -> str:
        errors = [line.strip() for line in "".join(self.log).splitlines() if "error" in line or "failed" in line]
        errors = [line for line in errors if line] or [line.strip() for line in self.log[-1:]]
        return f"{message}: {errors[0]}" if errors else message
