"""A transformers Cache that stores what kvtc's cache in llama.cpp stores: codes, and sinks and window exactly.

For evaluation: every step decodes all rows. Models that turn halves of a head against each other (`rotate_half`: Llama,
Qwen, Mistral, Gemma and most others); batches without padding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from kvtc_gguf.hf.prepare import CACHE_ARGUMENTS, Codecs, cache_argument, prepare, watch


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """Keys f32 [B, H, N, d] turned by cos, sin [B or 1, N, r] (their first r channels), or turned back."""
    cos, sin = cos[:, None].float(), sin[:, None].float()
    r = cos.shape[-1]
    turned = x[..., :r] * cos + rotate_half(x[..., :r]) * (-sin if back else sin)
    if back:
        turned = turned / (cos**2 + sin**2)  # YaRN scales what it turns
    return torch.cat([turned, x[..., r:]], dim=-1)


class KVTCLayer(CacheLayerMixin):
    """One layer: rows u8 [B, N, row_bytes] of both sides, and z f16 [B, E, H, d] of its exact tokens."""

    is_compileable = False
    is_sliding = False

    def __init__(self, codecs: Codecs, sink: int, window: int) -> None:
        super().__init__()
        self.codecs, self.sink, self.window = codecs, sink, window
        self.rotation: tuple[Tensor, Tensor] | None = None  # cos and sin of this forward's tokens
        self.clear()

    def clear(self) -> None:
        self.rows: list[Tensor | None] = [None, None]
        self.exact: list[Tensor | None] = [None, None]
        self.exact_index = torch.zeros(0, dtype=torch.long)
        self.cos = self.sin = None
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes keys after RoPE and values [B, H, T, d]; gives both [B, H, N + E, d], see `attention.attend`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.rotation is None:
            raise RuntimeError("this model does not hand cos and sin to its attention; kvtc_gguf.hf cannot serve it")
        (cos, sin), self.rotation = self.rotation, None
        plain = rotate(key_states.float(), cos, sin, back=True)
        batch, _, n_new, _ = key_states.shape
        index = torch.arange(self.length, self.length + n_new)
        for side, x in enumerate((plain, value_states)):
            codec = self.codecs[side]
            z = codec.transform(x.transpose(1, 2).reshape(batch * n_new, *x.shape[1::2]))
            rows, z = codec.encode(z).view(batch, n_new, -1), z.half().view(batch, n_new, *z.shape[1:])
            self.rows[side] = _cat(self.rows[side], rows, 1)
            self.exact[side] = _cat(self.exact[side], z, 1)
        self.cos, self.sin = _cat(self.cos, cos, 1), _cat(self.sin, sin, 1)
        self.exact_index = torch.cat([self.exact_index, index])
        self.length += n_new
        keys, values = (self._read(side) for side in (0, 1))
        keys = keys.to(self.dtype)
        keys.kvtc_layer = self.snapshot()  # type: ignore[attr-defined]
        self._forget()
        return keys, values.to(self.dtype)

    def _read(self, side: int) -> Tensor:
        """What attention reads of a side, f32 [B, H, N + E, d]: decoded rows, then exact tokens."""
        codec, rows, exact = self.codecs[side], self.rows[side], self.exact[side]
        assert rows is not None and exact is not None
        decoded = codec.reconstruct(codec.decode(rows.flatten(0, 1))).unflatten(0, rows.shape[:2])
        kept = codec.reconstruct(exact.flatten(0, 1)).unflatten(0, exact.shape[:2])
        x = torch.cat([decoded, kept], dim=1).transpose(1, 2)
        if side == 1:
            return x
        index = self.exact_index.to(self.cos.device)
        cos, sin = (torch.cat([a, a[:, index]], dim=1) for a in (self.cos, self.sin))
        return rotate(x, cos, sin)

    def snapshot(self) -> KVTCLayer:
        """The lengths and indices that this step's attention needs, apart from what comes later."""
        copy = object.__new__(KVTCLayer)
        copy.sink, copy.window, copy.length, copy.exact_index = self.sink, self.window, self.length, self.exact_index
        return copy

    def _forget(self) -> None:
        """Drops exact tokens that no later query sees as such."""
        keep = (self.exact_index < self.sink) | (self.exact_index > self.length - self.window)
        self.exact = [None if x is None else x[:, keep.to(x.device)] for x in self.exact]
        self.exact_index = self.exact_index[keep]

    def split_mask(self, mask: Tensor, n_queries: int) -> Tensor:
        """A mask [B, 1, T, N] for decoded tokens, then exact ones: [B, 1, T, N + E], each key once for a query."""
        index = self.exact_index.to(mask.device)
        query = torch.arange(self.length - n_queries, self.length, device=mask.device)
        counts = (query[:, None] - index[None] < self.window) | (index[None] < self.sink)  # exactly
        counts &= index[None] <= query[:, None]
        hidden = torch.zeros(n_queries, self.length, dtype=torch.bool, device=mask.device)
        hidden[:, index] = counts
        lowest = torch.finfo(mask.dtype).min
        mask = mask[..., : self.length]
        return torch.cat([mask.masked_fill(hidden, lowest), mask[..., index].masked_fill(~counts, lowest)], dim=-1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + int(query_length if isinstance(query_length, int) else len(query_length)), 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in older versions

    def reset(self) -> None:
        self.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for part in (self.rows, self.exact):
            part[:] = [None if x is None else x.index_select(0, beam_idx.to(x.device)) for x in part]

    @property
    def nbytes(self) -> int:
        """Bytes of rows and exact tokens."""
        return sum(x.nbytes for x in (*self.rows, *self.exact) if x is not None)


def _cat(old: Tensor | None, new: Tensor, dim: int) -> Tensor:
    return new if old is None else torch.cat([old, new], dim=dim)


class KVTCCache(Cache):
    """`model(ids, past_key_values=KVTCCache(model, "model.gguf"))`, or the same in `generate`.

    model: a causal language model of transformers; its attention implementation becomes "kvtc", which serves other
    caches as before. gguf: the GGUF made from the same checkpoint. calibration: a sidecar; else that in the GGUF's
    metadata, else model.kvtc.gguf beside it. cache_type: "kvtc-k<a>v<b>" or "kvtc<a>". sink, window: as --kvtc-sink and
    --kvtc-window. Raises FormatError, one line, where these do not belong together or the model is not served.
    """

    def __init__(
        self,
        model: nn.Module,
        gguf: str | os.PathLike[str],
        calibration: str | os.PathLike[str] | None = None,
        *,
        cache_type: str = "kvtc-k2v4",
        sink: int = 4,
        window: int = 128,
    ) -> None:
        codecs = prepare(model, Path(gguf), None if calibration is None else Path(calibration), cache_type)
        watch(model)
        self._set(codecs, sink, window)

    def _set(self, codecs: list[Codecs], sink: int, window: int) -> None:
        super().__init__(layers=[KVTCLayer(pair, sink, window) for pair in codecs])
        self.codecs, self.sink, self.window = codecs, sink, window

    def fresh(self) -> KVTCCache:
        """An empty cache of the same kind, whose tables are shared."""
        cache = object.__new__(KVTCCache)
        cache._set(self.codecs, self.sink, self.window)
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes of rows and exact tokens of all layers; the cos and sin of positions are apart."""
        return sum(layer.nbytes for layer in self.layers)


@contextmanager
def everywhere(cache: KVTCCache, model: nn.Module) -> Iterator[None]:
    """Inside, each call of the model without a cache gets a fresh one of this kind: for harnesses that pass none."""
    forward, name = model.forward, cache_argument(model)

    def with_cache(*arguments: Any, **options: Any) -> Any:
        if all(options.get(argument) is None for argument in CACHE_ARGUMENTS):
            given = {key: value for key, value in options.items() if key not in CACHE_ARGUMENTS}
            options = {**given, name: cache.fresh(), "use_cache": True}
        return forward(*arguments, **options)

    model.forward = with_cache
    try:
        yield
    finally:
        model.forward = forward
