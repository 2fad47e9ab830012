"""From streamed statistics to a calibration: a competition per (layer, kv head, side), then bits over the whole layer.

Pass 1: `observe_moments` on every chunk. Pass 2: `observe_histograms` on every chunk, held-out chunks last and after
`begin_scoring`, so that they are scored with codebooks that never saw them. Then `finish`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvtc_gguf import score
from kvtc_gguf.allocate import allocate
from kvtc_gguf.capture import LayerSample
from kvtc_gguf.codebook import Cumulative, distortion, lloyd_max, to_f16
from kvtc_gguf.format import SideCalibration
from kvtc_gguf.layout import GROUP, WIDTHS, row_bytes
from kvtc_gguf.statistics import HeadTransforms, Histogram, Moments, query_weight
from kvtc_gguf.transforms import build

SCORE_BITS = (2, 3)  # budgets at which the members are compared
CLEAR_WIN = 0.9  # a challenger must cut the incumbent's error to this, else the measured recipe stays
GAIN_HEADROOM = 16.0  # gain base = median norm / 16: codes 1 ... 255 reach from 1/16 to 16 times the median


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

    order i64 [d]; error f64 [G, len(WIDTHS)]: mean square error of a vector in the side's metric (keys: logit error);
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


@dataclass
class Side:
    """K or V of one layer while it is being fitted."""

    name: str
    moments: Moments
    weights: np.ndarray = field(default_factory=lambda: np.empty(0))  # [H, d] square root of a channel error's cost
    histograms: dict[str, Histogram] = field(default_factory=dict)
    candidates: dict[tuple[str, int], Candidate] = field(default_factory=dict)
    books: dict[tuple[str, int, int], list[np.ndarray | None]] = field(default_factory=dict)
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))  # f64 [H, members, len(SCORE_BITS)]
    energy: np.ndarray = field(default_factory=lambda: np.zeros(0))  # f64 [H], of the exact signal, same metric

    @property
    def members(self) -> tuple[Member, ...]:
        return MEMBERS[self.name]

    @property
    def heads(self) -> int:
        return len(self.moments.total)

    @property
    def head_dim(self) -> int:
        return self.moments.total.shape[1]


def candidate(histogram: Histogram, head: int, weight: np.ndarray) -> Candidate:
    """Codebooks and measured errors of one head under one transform, from its histograms; weight [d] in x space."""
    decode = histogram.transforms.decode[head].astype(np.float64)
    cost = ((weight[:, None] * decode) ** 2).sum(axis=0)
    variance = histogram.square[head] / max(histogram.weight[head], 1e-30)
    order = np.argsort(-cost * variance, kind="stable")
    data: Cumulative = histogram.cumulative(head, order)
    levels = {w: to_f16(lloyd_max(data, w)) for w in WIDTHS if w}
    scale = cost[order] * histogram.mean_norm_square()[head]
    error = [scale * distortion(data, levels[w].astype(np.float64) if w else None) for w in WIDTHS]
    grouped = np.stack(error, axis=1).reshape(-1, GROUP, len(WIDTHS)).sum(axis=1)
    return Candidate(order, grouped, float(grouped[:, 0].sum()), levels)


class Fitter:
    """Fits every layer of a model.

    pairs: head_dim -> RoPE pairs (see `capture.rope_pairs`); gram: layer -> W_o^T W_o by query head [n_head, d, d];
    weigh: what keys and queries count.
    """

    def __init__(
        self,
        pairs: Callable[[int], np.ndarray],
        gram: Callable[[int], np.ndarray],
        softcap: float = 0.0,
        weigh: Callable[[LayerSample, np.ndarray, np.ndarray], score.Importance] = score.importance,
    ) -> None:
        self.pairs, self.gram, self.softcap, self.weigh = pairs, gram, softcap, weigh
        self.layers: dict[int, dict[str, Side]] = {}

    def observe_moments(self, sample: LayerSample) -> None:
        """Pass 1. The sinks are left out here and below: the cache keeps them exact, and they are outliers."""
        if sample.layer not in self.layers:
            self.layers[sample.layer] = {
                name: Side(name, Moments(*x.shape[1:])) for name, x in (("k", sample.k), ("v", sample.v))
            }
        sides = self.layers[sample.layer]
        weight = self.importance(sample, score.far_attention(sample, self.softcap))
        sides["k"].moments.add(sample.k[score.SINKS :], weight.tokens[score.SINKS :])
        sides["v"].moments.add(sample.v[score.SINKS :], np.ones_like(weight.tokens[score.SINKS :]))
        sides["k"].moments.add_queries(weight.queries)

    def importance(self, sample: LayerSample, attention: np.ndarray) -> score.Importance:
        """Weights of the chunk's keys and queries."""
        return self.weigh(sample, attention, self.gram(sample.layer))

    def end_moments(self) -> None:
        """Builds every member's transforms."""
        for sides in self.layers.values():
            for side in sides.values():
                moments, pairs = side.moments, self.pairs(side.head_dim)
                side.weights = np.ones((side.heads, side.head_dim))
                if side.name == "k":
                    side.weights = np.stack([query_weight(m, pairs) for m in moments.mean_query()])
                statistics = [moments.head(h, side.weights[h]) for h in range(side.heads)]
                for name in dict.fromkeys(m.transform for m in side.members):
                    side.histograms[name] = Histogram(HeadTransforms([build(name, s) for s in statistics]))
                side.scores = np.zeros((side.heads, len(side.members), len(SCORE_BITS)))
                side.energy = np.zeros(side.heads)

    def begin_scoring(self) -> None:
        """Fits every member on what pass 2 has seen so far; from here on `observe_histograms` also scores."""
        for sides in self.layers.values():
            for side in sides.values():
                self._fit_candidates(side)
                for (name, h), fitted in side.candidates.items():
                    for bits in SCORE_BITS:
                        widths = allocate(fitted.error[None], row_bytes(1, side.head_dim, bits))[0]
                        side.books[name, h, bits] = fitted.books(widths)

    def observe_histograms(self, sample: LayerSample, scoring: bool = False) -> None:
        """Pass 2; with `scoring` the sample is held out: it is scored before it enters the histograms."""
        attention = score.far_attention(sample, self.softcap)
        weights = {"k": self.importance(sample, attention).tokens}
        weights["v"] = np.ones_like(weights["k"])
        for name, x in (("k", sample.k), ("v", sample.v)):
            side = self.layers[sample.layer][name]
            coordinates = {t: h.transforms.forward(x) for t, h in side.histograms.items()}
            if scoring and name == "k":
                self._score_keys(side, sample, coordinates, weights["k"])
            elif scoring:
                self._score_values(side, sample, coordinates, attention)
            for transform, (z, norm) in coordinates.items():
                side.histograms[transform].add(
                    z[:, score.SINKS :], norm[:, score.SINKS :], weights[name][score.SINKS :]
                )

    def _fit_candidates(self, side: Side) -> None:
        side.candidates = {
            (name, h): candidate(histogram, h, side.weights[h])
            for name, histogram in side.histograms.items()
            for h in range(side.heads)
        }

    def _errors(self, side: Side, h: int, coordinates: dict) -> np.ndarray:
        """x_hat - x of every member at every scored budget, f32 [T, members * len(SCORE_BITS), d]."""
        errors = []
        for member in side.members:
            z, norm = (a[h] for a in coordinates[member.transform])
            histogram = side.histograms[member.transform]
            base = histogram.median_norm()[h] / GAIN_HEADROOM
            for bits in SCORE_BITS:
                back = score.reconstruct(z, norm, side.books[member.transform, h, bits], member.rule, base)
                errors.append((back - z) @ histogram.transforms.decode[h].T)
        return np.stack(errors, axis=1)

    def _score_keys(self, side: Side, sample: LayerSample, coordinates: dict, weight: np.ndarray) -> None:
        for h in range(side.heads):
            cost = weight[score.SINKS :, h, None]
            error = self._errors(side, h, coordinates)[score.SINKS :] * side.weights[h].astype(np.float32)
            total = np.einsum("to,tmd,tmd->m", cost, error, error, dtype=np.float64)
            side.scores[h] += total.reshape(side.scores.shape[1:])
            centred = (sample.k[score.SINKS :, h] - side.moments.head(h).mean) * side.weights[h]
            side.energy[h] += (cost * centred**2).sum()

    def _score_values(self, side: Side, sample: LayerSample, coordinates: dict, attention: np.ndarray) -> None:
        gram = self.gram(sample.layer)
        group = len(attention) // side.heads
        for h in range(side.heads):
            mine = slice(h * group, (h + 1) * group)
            x = np.concatenate([self._errors(side, h, coordinates), sample.v[:, h, None]], axis=1)
            total = score.output_energy(attention[mine], x, gram[mine])
            side.scores[h] += total[:-1].reshape(side.scores.shape[1:])
            side.energy[h] += total[-1]

    def finish(self, budgets: Sequence[int]) -> dict[int, dict[str, SideCalibration]]:
        """Calibrations of every layer that was seen, able to serve every budget (bits per value)."""
        return {
            layer: {n: self._finish_side(s, budgets) for n, s in sides.items()} for layer, sides in self.layers.items()
        }

    def winners(self, side: Side) -> list[Member]:
        """The member that each head gets: the incumbent unless a challenger's error is clearly smaller."""
        relative = np.log(np.maximum(side.scores, 1e-30)).mean(axis=2)
        relative = np.exp(relative - relative[:, :1])
        best = relative.argmin(axis=1)
        return [side.members[b if relative[h, b] < CLEAR_WIN else 0] for h, b in enumerate(best)]

    def predicted(self, side: Side) -> np.ndarray:
        """Held-out error of the winners relative to the signal (amplitudes), [len(SCORE_BITS)], over the layer."""
        index = [side.members.index(m) for m in self.winners(side)]
        error = side.scores[np.arange(side.heads), index].sum(axis=0)
        return np.sqrt(error / max(side.energy.sum(), 1e-30))

    def _finish_side(self, side: Side, budgets: Sequence[int]) -> SideCalibration:
        winners = self.winners(side)
        fitted = [candidate(side.histograms[m.transform], h, side.weights[h]) for h, m in enumerate(winners)]
        error = np.stack([c.error for c in fitted])
        if side.name == "v":
            # A head's value error matters as much as what the head says outside sinks and window.
            share = side.energy / max(side.energy.sum(), 1e-30)
            error *= (np.maximum(share, 1e-6) / [max(c.signal, 1e-30) for c in fitted])[:, None, None]
        widths = np.stack([allocate(error, row_bytes(side.heads, side.head_dim, b)) for b in budgets], axis=1)
        codebooks = {}
        for h, c in enumerate(fitted):
            for g in range(side.head_dim // GROUP):
                for w in sorted(set(widths[h, :, g].tolist()) - {0}):
                    codebooks[h, g, w] = c.levels[w][g * GROUP : (g + 1) * GROUP]
        stacks = [side.histograms[m.transform] for m in winners]
        rows = range(side.heads)
        return SideCalibration(
            mean=np.stack([stacks[h].transforms.mean[h] for h in rows]),
            scale=np.stack([stacks[h].transforms.scale[h, fitted[h].order] for h in rows]),
            gain_base=np.array([stacks[h].median_norm()[h] / GAIN_HEADROOM for h in rows], np.float32),
            gain_rule=np.array([m.rule for m in winners], np.int32),
            decode=np.stack([stacks[h].transforms.decode[h][:, fitted[h].order] for h in rows]).astype(np.float16),
            widths=widths,
            codebooks=codebooks,
            transforms=[m.label for m in winners],
        )
