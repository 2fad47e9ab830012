"""Streaming statistics of one (layer, K or V): memory does not depend on the number of tokens.

Pass 1 gathers moments (enough to build every transform), pass 2 histograms of what a transform makes of the vectors.
"""

from __future__ import annotations

import numpy as np

from kvtc_gguf.codebook import BINS, Cumulative, bins
from kvtc_gguf.transforms import HeadStatistics, Transform

WEIGHT_FLOOR = 1e-3
NORM_BINS = 512  # of log2(norm) over [-8, 8): resolves the median to 1%


class Moments:
    """Weighted count, mean and covariance of vectors [T, H, d], in f64, and for keys the query weights [H, d].

    All that it holds are sums over the text, named in SUMS: those of two runs added are those of one run over both
    texts, which is what `statistics_file` stores and merges.
    """

    SUMS = ("count", "total", "outer", "query", "chunks")

    def __init__(self, heads: int, d: int) -> None:
        self.count = np.zeros(heads)
        self.total = np.zeros((heads, d))
        self.outer = np.zeros((heads, d, d))
        self.query = np.zeros((heads, d))
        self.chunks = np.zeros(1)

    def add(self, x: np.ndarray, weight: np.ndarray) -> None:
        """Adds vectors f32 [T, H, d], each with its weight f32 [T, H]."""
        x = np.ascontiguousarray(x.transpose(1, 0, 2), np.float64)
        weighted = x * weight.T[:, :, None]
        self.count += weight.sum(axis=0, dtype=np.float64)
        self.total += weighted.sum(axis=1)
        self.outer += x.transpose(0, 2, 1) @ weighted

    def add_queries(self, mean_square: np.ndarray) -> None:
        """Adds the mean square f64 [H, d] of a chunk's pre-RoPE queries (`score.importance`)."""
        self.query += mean_square
        self.chunks += 1

    def mean_query(self) -> np.ndarray:
        """Mean square f64 [H, d] of the queries over all chunks."""
        return self.query / max(float(self.chunks[0]), 1.0)

    def merge(self, other: Moments) -> None:
        """Adds the sums of another run; both must be of the same shape (ValueError)."""
        for name in self.SUMS:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine.shape != theirs.shape:
                raise ValueError(f"{name} is {list(theirs.shape)}, not {list(mine.shape)}")
            mine += theirs

    def head(self, h: int, weight: np.ndarray | None = None) -> HeadStatistics:
        """Statistics of kv head h; weight [d] defaults to ones."""
        count = max(self.count[h], 1e-30)
        mean = self.total[h] / count
        covariance = self.outer[h] / count - np.outer(mean, mean)
        return HeadStatistics(mean, (covariance + covariance.T) / 2, np.ones_like(mean) if weight is None else weight)


def query_weight(mean_square: np.ndarray, pairs: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Square root of the query weight of each channel, [d], from the mean square of pre-RoPE queries [d].

    Averaged over each RoPE pair, pairs i64 [n, 2]: the relative rotation mixes the two channels. Channels that RoPE
    leaves alone keep their own weight. Floored, as some models have channels that no query uses: by what a channel of
    this variance [d] of keys adds to the logits, not by the weight itself, so that keys times s and queries by s give
    the same codes, whatever the scale s of a pair.
    """
    weight, variance = mean_square.astype(np.float64).copy(), np.maximum(variance, 1e-30)
    for each in (weight, variance):
        each[pairs] = each[pairs].mean(axis=1, keepdims=True)
    floor = WEIGHT_FLOOR * (weight * variance).mean() / variance
    return np.sqrt(np.maximum(weight, np.clip(floor, 1e-20, max(weight.max(), 1e-20))))


class HeadTransforms:
    """One transform for all H kv heads of a layer, stacked: mean, scale f32 [H, d], encode, decode f32 [H, d, d]."""

    def __init__(self, transforms: list[Transform]) -> None:
        self.names = [t.name for t in transforms]
        self.mean = np.stack([t.mean for t in transforms]).astype(np.float32)
        self.scale = np.stack([t.scale for t in transforms]).astype(np.float32)
        self.encode = np.stack([t.encode for t in transforms]).astype(np.float32)
        self.decode = np.stack([t.decode for t in transforms]).astype(np.float32)

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """z f32 [H, T, d] and whitened norm f32 [H, T, 1] of vectors f32 [T, H, d]."""
        z = (x.transpose(1, 0, 2) - self.mean[:, None]) @ self.encode.transpose(0, 2, 1)
        norm = np.sqrt(np.mean((z / self.scale[:, None]) ** 2, axis=2, keepdims=True))
        return z, np.maximum(norm, 1e-9)


class Histogram:
    """What pass 2 keeps of one transform: histograms of the unit-norm components, E[norm^2] and the median norm."""

    def __init__(self, transforms: HeadTransforms) -> None:
        self.transforms = transforms
        heads, d = transforms.mean.shape
        self.count = np.zeros((heads, d, BINS), np.float32)
        self.total = np.zeros((heads, d, BINS), np.float32)
        self.square = np.zeros((heads, d))
        self.norm_square = np.zeros(heads)
        self.norms = np.zeros((heads, NORM_BINS))
        self.weight = np.zeros(heads)

    def add(self, z: np.ndarray, norm: np.ndarray, weight: np.ndarray) -> None:
        """Adds the result of `HeadTransforms.forward`, each vector with its weight f32 [T, H]."""
        heads, _, d = z.shape
        y = z / norm
        each = np.ascontiguousarray(weight.T, np.float64)[:, :, None]
        spread = np.broadcast_to(each, y.shape).ravel()
        index = bins(y / self.transforms.scale[:, None])
        index += (np.arange(heads)[:, None, None] * d + np.arange(d)) * BINS
        flat, size = index.ravel(), heads * d * BINS
        self.count += np.bincount(flat, weights=spread, minlength=size).reshape(self.count.shape)
        self.total += np.bincount(flat, weights=y.ravel() * spread, minlength=size).reshape(self.total.shape)
        self.square += np.einsum("hto,htd,htd->hd", each, y, y, dtype=np.float64)
        self.norm_square += np.einsum("hto,hto,hto->h", each, norm, norm, dtype=np.float64)
        place = np.clip((np.log2(norm[:, :, 0]) + 8) * (NORM_BINS / 16), 0, NORM_BINS - 1).astype(np.int64)
        for h in range(heads):
            self.norms[h] += np.bincount(place[h], minlength=NORM_BINS)
        self.weight += weight.sum(axis=0, dtype=np.float64)

    def mean_norm_square(self) -> np.ndarray:
        """E[norm^2], f64 [H]."""
        return self.norm_square / np.maximum(self.weight, 1e-30)

    def median_norm(self) -> np.ndarray:
        """Median norm, f64 [H], to 1%."""
        running = np.cumsum(self.norms, axis=1)
        place = (running < running[:, -1:] / 2).sum(axis=1)
        return 2.0 ** ((place + 0.5) * (16 / NORM_BINS) - 8)

    def cumulative(self, heads: list[int], order: np.ndarray) -> Cumulative:
        """The histograms of some heads, one below the other, components in the given order [len(heads), d]."""
        rows = np.array(heads)[:, None]
        parts = (self.count, self.total, self.square, self.transforms.scale)
        return Cumulative(*(part[rows, order].reshape(order.size, *part.shape[2:]) for part in parts))
