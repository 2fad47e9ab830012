"""A calibration worse than the measured recipe, or one that the format cannot hold, fails here."""

from __future__ import annotations

import numpy as np
import pytest
from kvtc_gguf import reference, score
from kvtc_gguf.capture import LayerSample, rope_pairs
from kvtc_gguf.fit import Fitter
from kvtc_gguf.format import SideCalibration
from kvtc_gguf.layout import BUDGETS, GROUP, WIDTHS, payload_bytes, row_bytes

H, G, D, T, CHUNKS = 2, 3, 64, 512, 12
GAUSS_MSE = {0: 1.0, 1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.000642, 8: 0.0000415}


@pytest.fixture(scope="module")
def samples() -> list[LayerSample]:
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((2, H, D, D)) * (0.9 ** np.arange(D))[None, None, :, None]
    mix[:, 1] *= 2
    channel = np.exp(rng.standard_normal(D))
    out = []
    for _ in range(CHUNKS):
        length = rng.gamma(4, 0.25, (2, T, H, 1))
        white = rng.standard_normal((2, T, H, D)) * length
        k, v = (np.einsum("thd,hde->the", w, m) for w, m in zip(white, mix, strict=True))
        q = rng.standard_normal((T, H * G, D)) * channel
        arrays = [a.astype(np.float32) for a in (q, k + 3, v, 0.01 * q, k + 3)]
        out.append(LayerSample(0, *arrays))
    return out


@pytest.fixture(scope="module")
def fitter(samples: list[LayerSample]) -> Fitter:
    gram = np.stack([np.eye(D, dtype=np.float32)] * (H * G))
    # The recipe below knows no importance: every key counts alike.
    fitter = Fitter(lambda d: rope_pairs(d, d, interleaved=False), lambda layer: gram, weigh=score.uniform)
    for sample in samples:
        fitter.observe_moments(sample)
    fitter.end_moments()
    for sample in samples[:9]:
        fitter.observe_histograms(sample)
    fitter.begin_scoring()
    for sample in samples[9:]:
        fitter.observe_histograms(sample, scoring=True)
    return fitter


@pytest.fixture(scope="module")
def sides(fitter: Fitter) -> dict[str, SideCalibration]:
    return fitter.finish(BUDGETS)[0]


def decoded(side: SideCalibration, x: np.ndarray, bits: int) -> np.ndarray:
    """x [T, H, d] through the codes of the numpy reference."""
    rows = reference.encode_rows(side, BUDGETS.index(bits), reference.transform(side, x), bits)
    return reference.reconstruct(side, reference.decode_rows(side, BUDGETS.index(bits), rows))


def lloyd_max(x: np.ndarray, bits: int) -> np.ndarray:
    reach = {1: 0.8, 2: 1.5, 3: 2.15, 4: 2.73, 5: 3.25, 6: 3.7, 8: 4.4}[bits]
    levels = x.mean() + x.std() * np.linspace(-reach, reach, 2**bits)
    for _ in range(12):
        index = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
        count, total = (np.bincount(index, weights=w, minlength=levels.size) for w in (None, x))
        levels = np.sort(np.where(count > 0, total / np.maximum(count, 1), levels))
    return levels


def recipe_keys(train: np.ndarray, queries: np.ndarray, test: np.ndarray, bits: int) -> np.ndarray:
    """Small twin of the recipe that design measured: test keys [N, H, d] coded after fitting on train [M, H, d]."""
    prepared, variances = [], []
    for h in range(H):
        square = (queries[:, h * G : (h + 1) * G].astype(np.float64) ** 2).mean(axis=(0, 1))
        pair = (square[: D // 2] + square[D // 2 :]) / 2
        weight = np.sqrt(np.tile(np.maximum(pair, 1e-3 * pair.mean()), 2))
        mean = train[:, h].mean(axis=0)
        centred = (train[:, h] - mean) * weight
        vectors = np.linalg.eigh(centred.T @ centred)[1][:, ::-1]
        z = centred @ vectors
        scale = z.std(axis=0)
        norm = np.sqrt(((z / scale) ** 2).mean(axis=1, keepdims=True))
        variances.append((((z / norm) ** 2).mean(axis=0) * (norm**2).mean()).reshape(-1, GROUP).sum(axis=1))
        prepared.append((mean, weight, vectors, scale, z / norm, np.median(norm) / 16))
    budget, flat = (H * (D * bits - 8)) // GROUP, np.concatenate(variances)
    steps = np.zeros(len(flat), int)
    while True:
        rate = [
            v * (GAUSS_MSE[WIDTHS[s]] - GAUSS_MSE[WIDTHS[s + 1]]) / (WIDTHS[s + 1] - WIDTHS[s])
            if s + 1 < len(WIDTHS) and WIDTHS[s + 1] - WIDTHS[s] <= budget
            else -1
            for v, s in zip(flat, steps, strict=True)
        ]
        best = int(np.argmax(rate))
        if rate[best] < 0:
            break
        budget -= WIDTHS[steps[best] + 1] - WIDTHS[steps[best]]
        steps[best] += 1
    widths = np.array(WIDTHS)[steps].reshape(H, -1)
    out = np.empty(test.shape)
    for h, (mean, weight, vectors, scale, unit, base) in enumerate(prepared):
        z = (test[:, h] - mean) * weight @ vectors
        y = z / np.sqrt(((z / scale) ** 2).mean(axis=1, keepdims=True))
        coded = np.zeros_like(y)
        for i, bits_i in enumerate(np.repeat(widths[h], GROUP)):
            if bits_i:
                book = lloyd_max(unit[:, i], int(bits_i))
                coded[:, i] = book[np.searchsorted((book[1:] + book[:-1]) / 2, y[:, i])]
        gain = (z * z).sum(axis=1) / np.maximum((z * coded).sum(axis=1), 1e-12)
        gain = base * 2.0 ** (np.clip(np.rint(32 * np.log2(np.maximum(gain, 1e-30) / base)), 1, 255) / 32)
        out[:, h] = coded * gain[:, None] @ vectors.T / weight + mean
    return out


def logit_error(samples: list[LayerSample], back: np.ndarray) -> float:
    error = back - np.concatenate([s.k for s in samples])
    queries = np.concatenate([s.q for s in samples])
    return float(sum(((queries[::7, i] @ error[::5, i // G].T) ** 2).mean() for i in range(H * G)))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_keys_reach_the_logit_error_of_the_recipe(
    samples: list[LayerSample], sides: dict[str, SideCalibration], bits: int
) -> None:
    train, queries = (np.concatenate([getattr(s, n) for s in samples[:9]]) for n in ("k", "q"))
    test = samples[9:]
    keys = np.concatenate([s.k for s in test])
    mine = logit_error(test, decoded(sides["k"], keys, bits))
    slack = 1.2 if bits == 1 else 1.05  # the recipe does not pad heads to 4 bytes, which shows in rows of 16 bytes
    assert mine <= slack * logit_error(test, recipe_keys(train, queries, keys, bits))


def test_every_budget_fits_its_row_and_has_its_codebooks(sides: dict[str, SideCalibration]) -> None:
    for side in sides.values():
        assert side.widths.shape == (H, len(BUDGETS), D // GROUP)
        for i, bits in enumerate(BUDGETS):
            assert payload_bytes(side.widths[:, i]) <= row_bytes(H, D, bits)
        for h, g in np.ndindex(H, D // GROUP):
            for width in set(side.widths[h, :, g].tolist()) - {0}:
                assert side.codebooks[h, g, width].shape == (GROUP, 2**width)


def test_error_falls_with_every_bit(samples: list[LayerSample], sides: dict[str, SideCalibration]) -> None:
    for name in ("k", "v"):
        x = getattr(samples[-1], name)
        errors = [((decoded(sides[name], x, b) - x) ** 2).mean() for b in BUDGETS]
        # Not by a factor of 4: the gain's own steps leave an error that no component's bits remove.
        assert all(a > b for a, b in zip(errors, errors[1:], strict=False))


def test_incumbent_stays_without_a_clear_win(fitter: Fitter) -> None:
    side = fitter.layers[0]["v"]
    kept = side.scores.copy()
    try:
        side.scores = np.ones_like(kept)
        side.scores[:, 1] = 0.95
        assert [m.transform for m in fitter.winners(side)] == ["hadamard"] * H
        side.scores[1, 2] = 0.5
        assert [m.transform for m in fitter.winners(side)] == ["hadamard", "pca"]
    finally:
        side.scores = kept


def test_scored_coding_is_the_reference_coding(samples: list[LayerSample], sides: dict[str, SideCalibration]) -> None:
    side = sides["k"]
    x = samples[-1].k
    z = reference.transform(side, x)
    for h in range(H):
        books: list[np.ndarray | None] = []
        for g, width in enumerate(side.widths[h, 1].tolist()):
            books += [b.astype(np.float32) for b in side.codebooks[h, g, width]] if width else [None] * GROUP
        norm = np.sqrt(((z[:, h] / side.scale[h]) ** 2).mean(axis=1, keepdims=True))
        mine = score.reconstruct(z[:, h], norm, books, int(side.gain_rule[h]), float(side.gain_base[h]))
        rows = reference.encode_rows(side, 1, z, 2)
        theirs = reference.decode_rows(side, 1, rows)[:, h]
        assert np.mean(np.abs(mine - theirs) > 1e-4 * np.abs(theirs).max()) < 1e-3


def test_far_attention_drops_sinks_window_and_tokens_out_of_the_sliding_window(samples: list[LayerSample]) -> None:
    sample = samples[0]
    sliding = LayerSample(0, sample.q, sample.k, sample.v, sample.q_rope, sample.k_rope, window=200)
    full, cut = score.far_attention(sample), score.far_attention(sliding)
    rows = np.arange(score.SINKS + score.WINDOW, T, score.ROW_STEP)
    for r, row in enumerate(rows):
        assert not full[:, r, : score.SINKS].any() and not full[:, r, row - score.WINDOW + 1 :].any()
        assert full[:, r, score.SINKS : row - score.WINDOW + 1].all()
        assert not cut[:, r, : max(row - 199, 0)].any()


def test_scaled_key_channels_change_nothing(samples: list[LayerSample]) -> None:
    """Keys up to 64 times larger in some RoPE pairs, queries smaller by as much: the model's function is the same."""
    scale = np.tile(2.0 ** np.random.default_rng(5).integers(0, 7, D // 2), 2).astype(np.float32)
    gram = np.stack([np.eye(D, dtype=np.float32)] * (H * G))
    costs = []
    for s in (np.ones_like(scale), scale):
        fitter = Fitter(lambda d: rope_pairs(d, d, interleaved=False), lambda layer: gram)
        few = [LayerSample(0, x.q / s, x.k * s, x.v, x.q_rope / s, x.k_rope * s) for x in samples[:4]]
        for sample in few[:3]:
            fitter.observe_moments(sample)
        fitter.end_moments()
        for sample in few[:3]:
            fitter.observe_histograms(sample)
        fitter.begin_scoring()
        fitter.observe_histograms(few[3], scoring=True)
        side = fitter.layers[0]["k"]
        costs.append(side.scores[:, 0] / side.energy[:, None])
    np.testing.assert_allclose(costs[1], costs[0], rtol=0.02)
