"""Who competes for a head, and what coding its components costs under one transform."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvtc_gguf import score
from kvtc_gguf.codebook import distortion, lloyd_max, stretched, to_f16
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


# The first of each is the incumbent, measured end to end by KLD; the others must beat it clearly.
MEMBERS: dict[str, tuple[Member, ...]] = {
    "k": (
        Member("metric_pca", score.UNBIASED),
        Member("query_pca", score.UNBIASED),
        Member("mixed_metric_pca", score.UNBIASED),
        Member("pca", score.UNBIASED),
        Member("hadamard_centred", score.UNBIASED),
    ),
    "v": (
        Member("hadamard", score.KEEP_NORM),
        Member("hadamard_centred", score.KEEP_NORM),
        Member("pca", score.KEEP_NORM),
        Member("metric_pca", score.KEEP_NORM),
        Member("mixed_metric_pca", score.KEEP_NORM),
    ),
}
STRETCH = {"k": 0.0, "v": 0.5}  # see `codebook.stretched`


@dataclass
class Candidate:
    """One head under one transform: components in falling order of cost, and what coding them costs at each width.

    order i64 [d]; error f64 [G, len(WIDTHS)]: mean square error of a vector in the side's metric;
    levels[width] f16 [d, 2**width], in the order of `order`.
    """

    order: np.ndarray
    error: np.ndarray
    levels: dict[int, np.ndarray]

    def books(self, widths: np.ndarray) -> list[np.ndarray | None]:
        """Levels f32 per component in the transform's own order, for group widths [G]."""
        books: list[np.ndarray | None] = [None] * len(self.order)
        for place, component in enumerate(self.order):
            width = int(widths[place // GROUP])
            if width:
                books[component] = self.levels[width][place].astype(np.float32)
        return books


def candidates(
    histogram: Histogram, heads: list[int], metric: np.ndarray, stretch: float, orders: list[np.ndarray] | None = None
) -> list[Candidate]:
    """Codebooks and measured errors of some heads under one transform, from its histograms; metric [H, d, d].

    orders: of earlier candidates, to keep, one for each of `heads`. stretch: see `codebook.stretched`.
    """
    decode = histogram.transforms.decode[heads].astype(np.float64)
    cost = np.einsum("hic,hij,hjc->hc", decode, metric[heads], decode, optimize=True)
    variance = histogram.square[heads] / np.maximum(histogram.weight[heads], 1e-30)[:, None]
    order = np.argsort(-cost * variance, axis=1, kind="stable") if orders is None else np.stack(orders)
    data, shape = histogram.cumulative(heads, order), order.shape
    levels = {w: to_f16(stretched(data, lloyd_max(data, w), stretch)) for w in WIDTHS if w}
    scale = np.take_along_axis(cost, order, axis=1) * histogram.mean_norm_square()[heads, None]
    each = [distortion(data, levels[w].astype(np.float64) if w else None).reshape(shape) * scale for w in WIDTHS]
    error = np.stack(each, axis=2).reshape(len(heads), -1, GROUP, len(WIDTHS)).sum(axis=2)
    split = {w: book.reshape(*shape, -1) for w, book in levels.items()}
    return [Candidate(order[i], error[i], {w: book[i] for w, book in split.items()}) for i in range(len(heads))]
