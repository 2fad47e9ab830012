"""The rotation that RoPE gave each token of a sample, read off the keys before and after it, whatever the rule."""

from __future__ import annotations

import numpy as np

from kvtc_gguf.capture import LayerSample
from kvtc_gguf.reference_rope import Turns


def rotation(sample: LayerSample, pairs: np.ndarray) -> np.ndarray:
    """Unit complex numbers c64 [T, n] by which token t's pair p was turned; 1 where keys say nothing.

    pairs i64 [n, 2]. Each is taken from the kv head whose key is largest there; a magnitude (YaRN) is divided out.
    """
    before, after = (as_complex(x, pairs) for x in (sample.k, sample.k_rope))
    best = np.abs(before).argmax(axis=1)[:, None]
    turned = np.take_along_axis(after * before.conj(), best, axis=1)[:, 0]
    size = np.abs(turned)
    return np.where(size > 1e-20, turned / np.maximum(size, 1e-20), 1).astype(np.complex64)


def turns(turn: np.ndarray, pairs: np.ndarray, scale: float) -> Turns:
    """The rotation of which `turn` c64 [T, n] are the turns of positions 0 ... T-1; scale: of what is turned."""
    return Turns(frequencies(turn), bool(pairs[0, 1] == len(pairs)), scale)


def frequencies(turn: np.ndarray) -> np.ndarray:
    """Radians per position f64 [n] of turns [T, n] that grow by one angle from token to token.

    Neighbours give the angle but for a small error; tokens 2, 4, 8 ... apart make it smaller.
    """
    found, lag = np.zeros(turn.shape[1]), 1
    while lag < len(turn):
        between = (turn[lag:] * turn[:-lag].conj()).astype(np.complex128).sum(axis=0)
        found += np.angle(between * np.exp(-1j * lag * found)) / lag
        lag *= 2
    return found


def as_complex(x: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Channel pairs of x [..., d] as complex numbers [..., n]."""
    return x[..., pairs[:, 0]] + 1j * x[..., pairs[:, 1]]


def rotate(x: np.ndarray, turn: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """x f32 [..., d] with its pairs turned by unit complex numbers [..., n]; other channels stay."""
    turned = as_complex(x, pairs) * turn
    out = x.copy()
    out[..., pairs[:, 0]], out[..., pairs[:, 1]] = turned.real, turned.imag
    return out
