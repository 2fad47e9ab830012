"""Which channel of a checkpoint's heads is which of the GGUF's: llama.cpp's converter reorders rows of W_q and W_k."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gguf import quants

from kvtc_gguf.capture import rope_pairs
from kvtc_gguf.layout import FormatError

ALIKE = 0.9  # cosine of weights that are the same but for quantization (2 bits: 0.95); in another order it is near 0


def pairing(k: np.ndarray, k_rope: np.ndarray, rotated: int) -> bool | None:
    """Whether RoPE turned neighbours (2i, 2i+1) of keys [T, H, d] together (True) or (i, i + rotated/2) (False).

    The length of a pair survives a rotation, up to one factor for all. None: the keys were not rotated.
    """
    if np.allclose(k, k_rope, rtol=1e-3, atol=1e-3 * float(np.abs(k).max())):
        return None
    spread = []
    for interleaved in (False, True):
        pairs = rope_pairs(k.shape[2], rotated, interleaved)
        before, after = (np.linalg.norm(x[..., pairs].astype(np.float64), axis=-1) for x in (k, k_rope))
        factor = (before * after).sum() / np.square(before).sum()
        spread.append(float(np.square(after - factor * before).sum()))
    return spread[1] < spread[0]


def orders(d: int, rotated: int, interleaved: bool) -> Iterator[tuple[np.ndarray, bool]]:
    """(order i64 [d], interleaved afterwards) of channels that a converter may have made of a checkpoint's.

    x[..., order] are the converted channels: as they are, or in the other kind of RoPE pairs.
    """
    yield np.arange(d), interleaved
    for n in {rotated, d}:  # converters reorder whole heads
        halves, neighbours = (rope_pairs(d, n, kind).reshape(-1) for kind in (False, True))
        order = np.arange(d)
        if interleaved:
            order[halves] = neighbours
        else:
            order[neighbours] = halves
        yield order, not interleaved


def match(own: np.ndarray, theirs: np.ndarray, heads: int, rotated: int, interleaved: bool) -> tuple[np.ndarray, bool]:
    """The order that makes the checkpoint's key weights `own` [H * d, n] the GGUF's, `theirs`, see `orders`.

    Raises FormatError if none does.
    """
    if own.shape != theirs.shape:
        raise FormatError(f"key weights are {list(theirs.shape)}, the checkpoint's {list(own.shape)}: another model")
    d = len(own) // heads
    scale = np.linalg.norm(own.astype(np.float64)) * np.linalg.norm(theirs.astype(np.float64))
    found = []
    for order, after in orders(d, rotated, interleaved):
        moved = own.reshape(heads, d, -1)[:, order].reshape(theirs.shape)
        found.append((float(np.vdot(moved, theirs)) / max(scale, 1e-30), order, after))
    cosine, order, after = max(found, key=lambda entry: entry[0])
    if cosine < ALIKE:
        raise FormatError(
            f"key weights are not the checkpoint's in any known order (cosine {cosine:.2f}): "
            "this GGUF is not made from this checkpoint"
        )
    return order, after


def key_rows(weight: np.ndarray, n_head: int, heads: int, d: int) -> np.ndarray:
    """Rows [H * d, n] of the keys in W_k, or in a fused [W_q; W_k; W_v]."""
    return weight if len(weight) == heads * d else weight[n_head * d : (n_head + heads) * d]


def gguf_weight(tensors: dict, layer: int) -> np.ndarray | None:
    """W_k or fused W_qkv f32 of a layer of a GGUF; None where it has neither or the gguf package cannot decode it."""
    for name in (f"blk.{layer}.attn_k.weight", f"blk.{layer}.attn_qkv.weight"):
        if name in tensors:
            try:
                return np.asarray(quants.dequantize(tensors[name].data, tensors[name].tensor_type), np.float32)
            except NotImplementedError:
                return None
    return None
