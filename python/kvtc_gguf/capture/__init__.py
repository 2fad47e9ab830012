"""Running a model and handing its queries, keys and values, layer by layer, to a consumer.

`llama_cpp.LlamaCapture` does it through the patched libllama. Another engine only needs to yield `LayerSample`s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LayerSample:
    """One layer's attention inputs for one chunk of T tokens at positions 0 ... T-1; all f32.

    q [T, n_head, d] and k [T, H, d] are taken before RoPE (after QK-norm), v [T, H, d_v] as the cache stores it;
    q_rope [T, n_head, d] is rotated and already multiplied by the attention scale, k_rope [T, H, d] is rotated.
    window: tokens the layer can look back (sliding window), 0 for all.
    """

    layer: int
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_rope: np.ndarray
    k_rope: np.ndarray
    window: int = 0


Consumer = Callable[[LayerSample], None]


def rope_pairs(head_dim: int, rotated: int, interleaved: bool) -> np.ndarray:
    """Channels that RoPE rotates together, i64 [n, 2]: (2i, 2i+1) if interleaved (llama), else (i, i + rotated/2)."""
    half = min(rotated, head_dim) // 2
    first = np.arange(half)
    return np.stack([2 * first, 2 * first + 1] if interleaved else [first, first + half], axis=1)
