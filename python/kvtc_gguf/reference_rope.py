"""Rotary position embedding as ggml computes it (`ggml_compute_forward_rope`), in f64: normal and NeoX pairing,
partial rotation, frequency factors, YaRN."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Turns:
    """A rotation by one position, whatever rule its frequencies come from."""

    frequencies: np.ndarray  # radians per position f64 [n]
    neox: bool  # pairs (i, i + n) rather than (2 i, 2 i + 1)
    scale: float = 1.0  # factor on the rotated channels
    n_offs: int = 0  # first rotated channel

    @property
    def n_dims(self) -> int:
        """Rotated channels."""
        return 2 * len(self.frequencies)

    def rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """x [n, H, d] rotated to positions [n], f64."""
        angle = positions.astype(np.float64)[:, None, None] * self.frequencies
        cos, sin = np.cos(angle) * self.scale, np.sin(angle) * self.scale
        result = x.astype(np.float64)
        half, end = self.n_dims // 2, self.n_offs + self.n_dims
        first = slice(self.n_offs, self.n_offs + half) if self.neox else slice(self.n_offs, end, 2)
        second = slice(self.n_offs + half, end) if self.neox else slice(self.n_offs + 1, end, 2)
        x0, x1 = result[..., first].copy(), result[..., second].copy()
        result[..., first] = x0 * cos - x1 * sin
        result[..., second] = x0 * sin + x1 * cos
        return result


@dataclass
class Rope:
    """Parameters of one GGML_OP_ROPE; the names are ggml's."""

    n_dims: int  # rotated channels, even
    neox: bool  # pairs (i, i + n_dims / 2) rather than (2 i, 2 i + 1)
    freq_base: float = 10000.0
    freq_scale: float = 1.0
    ext_factor: float = 0.0  # 0: no YaRN
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    n_ctx_orig: int = 0
    freq_factors: np.ndarray | None = None  # f32 [n_dims / 2]
    n_offs: int = 0  # first rotated channel

    def frequencies(self) -> tuple[np.ndarray, float]:
        """Radians per position f64 [n_dims / 2], and the factor on the rotated channels."""
        index = np.arange(self.n_dims // 2)
        extrapolated = float(self.freq_base) ** (-2.0 * index / self.n_dims)
        if self.freq_factors is not None:
            extrapolated = extrapolated / self.freq_factors[: index.size].astype(np.float64)
        theta, scale = self.freq_scale * extrapolated, self.attn_factor
        if self.ext_factor != 0.0:
            low, high = self._corrected_dims()
            ramp = 1 - np.clip((index - low) / max(0.001, high - low), 0, 1)
            mix = ramp * self.ext_factor
            theta = theta * (1 - mix) + extrapolated * mix
            scale *= 1.0 + 0.1 * math.log(1.0 / self.freq_scale)
        return theta, scale

    def _corrected_dims(self) -> tuple[float, float]:
        def dim(rotations: float) -> float:
            turns = math.log(self.n_ctx_orig / (rotations * 2 * math.pi))
            return self.n_dims * turns / (2 * math.log(self.freq_base))

        return max(0, math.floor(dim(self.beta_fast))), min(self.n_dims - 1, math.ceil(dim(self.beta_slow)))

    def rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """x [n, H, d] rotated to positions [n], f64."""
        theta, scale = self.frequencies()
        return Turns(theta, self.neox, scale, self.n_offs).rotate(x, positions)
