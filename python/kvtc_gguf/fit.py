"""From streamed statistics to a calibration: a competition per (layer, kv head, side), then bits over the whole layer.

Pass 1: `observe_moments` on every chunk. Pass 2: `observe_histograms` on every chunk, held-out chunks last and after
`begin_scoring`, so that they are scored with codebooks that never saw them. Then `finish`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvtc_gguf import score
from kvtc_gguf.allocate import allocate
from kvtc_gguf.candidate import MEMBERS, Candidate, Member, candidates
from kvtc_gguf.capture import LayerSample
from kvtc_gguf.format import SideCalibration
from kvtc_gguf.layout import GROUP, WIDTHS, row_bytes
from kvtc_gguf.statistics import HeadTransforms, Histogram, Moments, query_weight
from kvtc_gguf.transforms import build

SCORE_BITS = (2, 3)  # budgets at which the members are compared
CLEAR_WIN = 0.9  # a challenger must cut the incumbent's error to this, else the measured recipe stays
GAIN_HEADROOM = 16.0  # gain base = median norm / 16: codes 1 ... 255 reach from 1/16 to 16 times the median


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
    cost: np.ndarray = field(default_factory=lambda: np.zeros(0))  # f64 [budgets], summed error after allocation

    @property
    def members(self) -> tuple[Member, ...]:
        return MEMBERS[self.name]

    @property
    def heads(self) -> int:
        return len(self.moments.total)

    @property
    def head_dim(self) -> int:
        return self.moments.total.shape[1]


class Fitter:
    """Fits every layer of a model.

    pairs: head_dim -> RoPE pairs (see `capture.rope_pairs`); gram: layer -> W_o^T W_o by query head [n_head, d, d];
    weigh: what keys and queries count; each_layer: `map`, or that of a pool of threads. Layers share nothing, so
    samples of different layers may be observed at the same time.
    """

    def __init__(
        self,
        pairs: Callable[[int], np.ndarray],
        gram: Callable[[int], np.ndarray],
        softcap: float = 0.0,
        weigh: Callable[[LayerSample, np.ndarray, np.ndarray], score.Importance] = score.importance,
        each_layer: Callable[[Callable, Iterable], Iterable] = map,
    ) -> None:
        self.pairs, self.gram, self.softcap, self.weigh = pairs, functools.cache(gram), softcap, weigh
        self.each_layer = each_layer
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
        list(self.each_layer(lambda sides: [self._build(side) for side in sides.values()], self.layers.values()))

    def _build(self, side: Side) -> None:
        moments, pairs = side.moments, self.pairs(side.head_dim)
        side.weights = np.ones((side.heads, side.head_dim))
        if side.name == "k":
            square = moments.mean_query()
            variance = [np.diag(moments.head(h).covariance) for h in range(side.heads)]
            side.weights = np.stack([query_weight(square[h], pairs, variance[h]) for h in range(side.heads)])
        statistics = [moments.head(h, side.weights[h]) for h in range(side.heads)]
        for name in dict.fromkeys(m.transform for m in side.members):
            side.histograms[name] = Histogram(HeadTransforms([build(name, s) for s in statistics]))
        side.scores = np.zeros((side.heads, len(side.members), len(SCORE_BITS)))
        side.energy = np.zeros(side.heads)

    def begin_scoring(self) -> None:
        """Fits every member on what pass 2 has seen so far; from here on `observe_histograms` also scores."""
        list(self.each_layer(lambda sides: [self._fit_candidates(s) for s in sides.values()], self.layers.values()))

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
        heads = list(range(side.heads))
        for name, histogram in side.histograms.items():
            fitted = candidates(histogram, heads, side.weights)
            side.candidates |= {(name, h): fitted[h] for h in heads}
        for (name, h), candidate in side.candidates.items():
            for bits in SCORE_BITS:
                widths = allocate(candidate.error[None], row_bytes(1, side.head_dim, bits))[0]
                side.books[name, h, bits] = candidate.books(widths)

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
        finished = self.each_layer(
            lambda sides: {n: self._finish_side(s, budgets) for n, s in sides.items()}, self.layers.values()
        )
        return dict(zip(self.layers, finished, strict=True))

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
        fitted: list[Candidate] = [side.candidates[m.transform, h] for h, m in enumerate(winners)]
        for name in {m.transform for m in winners}:  # once more: the histograms have seen the held-out text since
            heads = [h for h, m in enumerate(winners) if m.transform == name]
            for h, again in zip(heads, candidates(side.histograms[name], heads, side.weights), strict=True):
                fitted[h] = again
        error = np.stack([c.error for c in fitted])
        if side.name == "v":
            # A head's value error matters as much as what the head says outside sinks and window.
            share = side.energy / max(side.energy.sum(), 1e-30)
            error *= (np.maximum(share, 1e-6) / [max(c.signal, 1e-30) for c in fitted])[:, None, None]
        widths = np.stack([allocate(error, row_bytes(side.heads, side.head_dim, b)) for b in budgets], axis=1)
        index = np.searchsorted(WIDTHS, widths)
        chosen = np.take_along_axis(error[:, None].repeat(len(budgets), axis=1), index[..., None], axis=3)
        side.cost = chosen.sum(axis=(0, 2, 3))
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
