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
from kvtc_gguf.candidate import MEMBERS, STRETCH, Candidate, Member, candidates
from kvtc_gguf.capture import LayerSample
from kvtc_gguf.format import SideCalibration
from kvtc_gguf.layout import GROUP, WIDTHS, row_bytes
from kvtc_gguf.rotation import rotate, rotation
from kvtc_gguf.statistics import HeadTransforms, Histogram, Moments
from kvtc_gguf.transforms import build

SCORE_BITS = (2, 3)  # budgets at which the members are compared
CLEAR_WIN = 0.9  # a challenger must cut the incumbent's error to this, else the measured recipe stays
MEASURED = 4  # widest width whose error of values is measured in attention's output; wider ones follow in proportion
GAIN_HEADROOM = 16.0  # gain base = median norm / 16: codes 1 ... 255 reach from 1/16 to 16 times the median


@dataclass
class Side:
    """K or V of one layer while it is being fitted."""

    name: str
    moments: Moments
    metric: np.ndarray = field(default_factory=lambda: np.empty(0))  # f64 [H, d, d], see `HeadStatistics`
    histograms: dict[str, Histogram] = field(default_factory=dict)
    candidates: dict[tuple[str, int], Candidate] = field(default_factory=dict)
    output: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)  # [G, widths]: values' errors, measured
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
    weigh: what keys and queries count.
    """

    def __init__(
        self,
        pairs: Callable[[int], np.ndarray],
        gram: Callable[[int], np.ndarray],
        softcap: float = 0.0,
        weigh: Callable[[LayerSample, score.Attention, np.ndarray, np.ndarray], score.Importance] = score.importance,
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
        weight = self.importance(sample, score.attend(sample, self.softcap))
        sides["k"].moments.add(sample.k[score.SINKS :], weight.keys[score.SINKS :])
        sides["v"].moments.add(sample.v[score.SINKS :], weight.values[score.SINKS :])
        sides["k"].moments.add_metric(weight.metric)

    def importance(self, sample: LayerSample, attention: score.Attention) -> score.Importance:
        """Weights of the chunk's tokens and the metric of its key errors."""
        return self.weigh(sample, attention, self.gram(sample.layer), self.pairs(sample.k.shape[2]))

    def end_moments(self) -> None:
        """Builds every member's transforms."""
        for layer, sides in self.layers.items():
            for side in sides.values():
                if side.name == "k":
                    metric, pairs = side.moments.mean_metric(), self.pairs(side.head_dim)
                else:
                    gram = self.gram(layer)
                    metric, pairs = gram.reshape(side.heads, -1, *gram.shape[1:]).sum(axis=1, dtype=np.float64), None
                statistics = [side.moments.head(h, metric[h], pairs) for h in range(side.heads)]
                side.metric = np.stack([s.metric for s in statistics])
                for name in dict.fromkeys(m.transform for m in side.members):
                    side.histograms[name] = Histogram(HeadTransforms([build(name, s) for s in statistics]))
                side.scores = np.zeros((side.heads, len(side.members), len(SCORE_BITS)))
                side.energy = np.zeros(side.heads)

    def begin_scoring(self) -> None:
        """Fits every member on what pass 2 has seen so far; from here on `observe_histograms` also scores."""
        for sides in self.layers.values():
            for side in sides.values():
                heads = list(range(side.heads))
                for name, histogram in side.histograms.items():
                    fitted = candidates(histogram, heads, side.metric, STRETCH[side.name])
                    side.candidates |= {(name, h): fitted[h] for h in heads}

    def observe_histograms(self, sample: LayerSample, scoring: bool = False) -> None:
        """Pass 2; with `scoring` the sample is held out: it is scored before it enters the histograms."""
        attention = score.attend(sample, self.softcap)
        importance = self.importance(sample, attention)
        for name, x, weight in (("k", sample.k, importance.keys), ("v", sample.v, importance.values)):
            side = self.layers[sample.layer][name]
            coordinates = {t: h.transforms.forward(x) for t, h in side.histograms.items()}
            if scoring and name == "k":
                self._score_keys(side, sample, coordinates, attention)
            elif scoring:
                self._score_values(side, sample, coordinates, attention)
            for transform, (z, norm) in coordinates.items():
                side.histograms[transform].add(z[:, score.SINKS :], norm[:, score.SINKS :], weight[score.SINKS :])

    def _errors(self, side: Side, h: int, coordinates: dict) -> np.ndarray:
        """x_hat - x of every member at every scored budget, f32 [T, members * len(SCORE_BITS), d]."""
        errors = []
        for member in side.members:
            z, norm = (a[h] for a in coordinates[member.transform])
            histogram = side.histograms[member.transform]
            base = histogram.median_norm()[h] / GAIN_HEADROOM
            fitted, table = side.candidates[member.transform, h], self._table(side, member.transform, h)
            for bits in SCORE_BITS:
                widths = allocate(table[None], row_bytes(1, side.head_dim, bits))[0]
                back = score.reconstruct(z, norm, fitted.books(widths), member.rule, base)
                errors.append((back - z) @ histogram.transforms.decode[h].T)
        return np.stack(errors, axis=1)

    def _table(self, side: Side, transform: str, h: int) -> np.ndarray:
        """Cost f64 [G, len(WIDTHS)] of every group at every width, in units that heads of a side share."""
        fitted, measured = side.candidates[transform, h], side.output.get((transform, h))
        if measured is None:
            return fitted.error
        last = measured.shape[1] - 1
        ratio = fitted.error[:, last:] / np.maximum(fitted.error[:, last : last + 1], 1e-30)
        return np.hstack([measured[:, :last], measured[:, last:] * ratio])

    def _score_keys(self, side: Side, sample: LayerSample, coordinates: dict, attention: score.Attention) -> None:
        rows, pairs, gram = score.query_rows(len(sample.k)), self.pairs(side.head_dim), self.gram(sample.layer)
        turn = rotation(sample, pairs)[:, None]
        group = len(gram) // side.heads
        for h in range(side.heads):
            mine = slice(h * group, (h + 1) * group)
            # The energy is that of keys replaced by their mean.
            mean = (side.moments.head(h).mean - sample.k[:, h]).astype(np.float32)
            error = rotate(np.concatenate([self._errors(side, h, coordinates), mean[:, None]], axis=1), turn, pairs)
            total = score.key_cost(
                sample.q_rope[rows, mine],
                attention.probability[mine],
                attention.coded,
                error,
                sample.v[:, h],
                gram[mine],
            )
            side.scores[h] += total[:-1].reshape(side.scores.shape[1:])
            side.energy[h] += total[-1]

    def _score_values(self, side: Side, sample: LayerSample, coordinates: dict, attention: score.Attention) -> None:
        gram = self.gram(sample.layer)
        group = len(gram) // side.heads
        for h in range(side.heads):
            mine = slice(h * group, (h + 1) * group)
            far = np.stack([attention.far(i) for i in range(mine.start, mine.stop)])
            for name, histogram in side.histograms.items():
                z, norm = (a[h] for a in coordinates[name])
                table = self._output_errors(
                    side.candidates[name, h], z, norm, histogram.transforms.decode[h], far, gram[mine]
                )
                side.output[name, h] = side.output.get((name, h), 0.0) + table
            x = np.concatenate([self._errors(side, h, coordinates), sample.v[:, h, None]], axis=1)
            total = score.value_cost(far, x, gram[mine])
            side.scores[h] += total[:-1].reshape(side.scores.shape[1:])
            side.energy[h] += total[-1]

    @staticmethod
    def _output_errors(
        fitted: Candidate, z: np.ndarray, norm: np.ndarray, decode: np.ndarray, far: np.ndarray, gram: np.ndarray
    ) -> np.ndarray:
        """What coding each group alone does to attention's output, f64 [G, MEASURED + 1], at widths 0 ... MEASURED.

        Unlike its mean square error this knows what averages out over the attended tokens: noise does, bias does not.
        """
        y, groups = z / norm, len(fitted.error)
        errors = []
        for width in range(MEASURED + 1):
            coded = score.coded_directions(y, fitted.books(np.full(groups, width)))
            errors.append((coded * norm - z)[:, fitted.order])
        flat = np.stack(errors, axis=1)  # [T, widths, d], components in order
        ordered = decode[:, fitted.order].astype(np.float32)
        total = np.zeros((groups, MEASURED + 1))
        for p, metric in zip(far, gram, strict=True):
            out = (p @ flat.reshape(len(z), -1)).reshape(len(p), MEASURED + 1, groups, GROUP)
            inner = ordered.T @ metric.astype(np.float32) @ ordered
            for g in range(groups):
                block = inner[g * GROUP : (g + 1) * GROUP, g * GROUP : (g + 1) * GROUP]
                total[g] += np.einsum(
                    "rwi,ij,rwj->w", out[:, :, g], block, out[:, :, g], dtype=np.float64, optimize=True
                )
        return total

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
        error = np.stack([self._table(side, m.transform, h) for h, m in enumerate(winners)])
        widths = np.stack([allocate(error, row_bytes(side.heads, side.head_dim, b)) for b in budgets], axis=1)
        index = np.searchsorted(WIDTHS, widths)
        chosen = np.take_along_axis(error[:, None].repeat(len(budgets), axis=1), index[..., None], axis=3)
        side.cost = chosen.sum(axis=(0, 2, 3))
        # Once more, now that the histograms have seen the held-out text too; the order stays what `error` knows.
        fitted: list[Candidate] = [side.candidates[m.transform, h] for h, m in enumerate(winners)]
        for name in {m.transform for m in winners}:
            heads = [h for h, m in enumerate(winners) if m.transform == name]
            orders = [fitted[h].order for h in heads]
            again = candidates(side.histograms[name], heads, side.metric, STRETCH[side.name], orders)
            for h, c in zip(heads, again, strict=True):
                fitted[h] = c
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
