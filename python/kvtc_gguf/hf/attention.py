"""Attention over a KVTCCache: which of two versions of a key counts depends on the query, so they come side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import eager_mask

if TYPE_CHECKING:
    from kvtc_gguf.hf.cache import KVTCLayer

NAME = "kvtc"


def register() -> None:
    """Make `attn_implementation="kvtc"` known to transformers."""
    transformers.AttentionInterface.register(NAME, attend)
    transformers.AttentionMaskInterface.register(NAME, eager_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; attention_mask [B, 1, T, N] is added to the logits.

    query [B, n_head, T, d]; key, value [B, H, N, d], or of a KVTCLayer [B, H, N + E, d]: N decoded tokens, then the
    exact ones of its `exact_index`. s_aux [n_head]: one more logit, of no key, in every softmax of a head.
    """
    layer: KVTCLayer | None = getattr(key, "kvtc_layer", None)
    group = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (key, value))
    logits = (query @ keys.transpose(2, 3)).float() * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if attention_mask is None:
        n = key.shape[2] if layer is None else layer.get_seq_length()
        ends = torch.arange(n - query.shape[2], n, device=query.device)
        hidden = torch.arange(n, device=query.device)[None] > ends[:, None]
        attention_mask = torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, float("-inf"))[None, None]
    if layer is not None:
        attention_mask = layer.split_mask(attention_mask.float(), query.shape[2])
    logits = logits + attention_mask
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.float()[None, :, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    weights = logits.softmax(-1)[..., : keys.shape[2]].to(value.dtype)
    return (weights @ values).transpose(1, 2).contiguous(), None
