"""Who competes for a head, and what coding its components costs under one transform."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvtc_gguf import score
from kvtc_gguf.codebook import distortion, lloyd_max, to_f16
from kvtc_gguf.layout import GROUP, WIDTHS
from kvtc_gguf.statistics import Histogram


@dataclass(frozen=True)
class Member:
    """A competitor: a transform of the registry with a gain rule (0 unbiased, 1 norm keeping)."""

    transform: str
    rule: int

    @property
    def label(self) -> str:
        return self.transform + ("" if self.rule == score.UNBIASED else "+norm")


# The first of each is the recipe that was measured end to end by KLD; the others must beat it clearly.
MEMBERS: dict[str, tuple[Member, ...]] = {
    "k": (
        Member("query_pca", score.UNBIASED),
        Member("pca", score.UNBIASED),
        Member("hadamard_centred", score.UNBIASED),
    ),
    "v": (
        Member("hadamard", score.KEEP_NORM),
        Member("hadamard_centred", score.KEEP_NORM),
        Member("pca", score.KEEP_NORM),
        Member("pca", score.UNBIASED),
    ),
}


@dataclass
class Candidate:
    """One head under one transform: components in falling order of cost, and what coding them costs at each width.

    order i64 [d]; error f64 [G, len(WIDTHS)]: mean square error of a vector in the side's metric;
    levels[width] f16 [d, 2**width], in the order of `order`.
    """

    order: np.ndarray
    error: np.ndarray
    signal: float
    levels: dict[int, np.ndarray]

    def books(self, widths: np.ndarray) -> list[np.ndarray | None]:
        """Levels f32 per component in the transform's own order, for group widths [G]."""
        books: list[np.ndarray | None] = [None] * len(self.order)
        for place, component in enumerate(self.order):
            width = int(widths[place // GROUP])
            if width:
                books[component] = self.levels[width][place].astype(np.float32)
        return books


def candidates(histogram: Histogram, heads: list[int], weight: np.ndarray) -> list[Candidate]:
    """Codebooks and measured errors of some heads under one transform; weight [H, d] of channels."""
    decode = histogram.transforms.decode[heads].astype(np.float64)
    cost = ((weight[heads][:, :, None] * decode) ** 2).sum(axis=1)
    variance = histogram.square[heads] / np.maximum(histogram.weight[heads], 1e-30)[:, None]
    order = np.argsort(-cost * variance, axis=1, kind="stable")
    data, shape = histogram.cumulative(heads, order), order.shape
    levels = {w: to_f16(lloyd_max(data, w)) for w in WIDTHS if w}
    scale = np.take_along_axis(cost, order, axis=1) * histogram.mean_norm_square()[heads, None]
    each = [distortion(data, levels[w].astype(np.float64) if w else None).reshape(shape) * scale for w in WIDTHS]
    error = np.stack(each, axis=2).reshape(len(heads), -1, GROUP, len(WIDTHS)).sum(axis=2)
    split = {w: book.reshape(*shape, -1) for w, book in levels.items()}
    return [
        Candidate(order[i], error[i], float(error[i, :, 0].sum()), {w: book[i] for w, book in split.items()})
        for i in range(len(heads))
    ]
