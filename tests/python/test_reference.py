"""The numpy twin: bytes as the README lays them out, the error the format promises, attention against a plain one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from kvtc_gguf.layout import WIDTHS, row_bytes
from kvtc_gguf.reference import decode_rows, encode_rows, lane_dot, pack, reconstruct, transform, unpack
from kvtc_gguf.reference_attention import CodedCells, PlainCells, alibi_slopes, attention, softmax
from kvtc_gguf.reference_rope import Rope

BITS = (1, 2, 3, 4, 5, 6)


@settings(deadline=None)
@given(width=st.sampled_from(WIDTHS), data=st.data())
def test_packed_codes_come_back_and_sit_where_the_readme_says(width, data):
    row = st.lists(st.integers(0, (1 << width) - 1), min_size=8, max_size=8)
    codes = np.array(data.draw(st.lists(row, min_size=1, max_size=5)), np.uint8)
    packed = pack(codes, width)
    assert packed.shape == (len(codes), width)
    for i, line in enumerate(codes.tolist()):
        assert int.from_bytes(packed[i].tobytes(), "little") == sum(code << (k * width) for k, code in enumerate(line))
    np.testing.assert_array_equal(unpack(packed, width), codes)


def encode_by_the_readme(side, budget, z, bits):
    """One row from z f32 [H, d], in scalar steps: a second reading of the README, sharing no code with the twin."""
    out = bytearray()
    for h in range(side.n_head):
        out += bytes(-len(out) % 4)
        d, f32 = side.head_dim, np.float32
        floor = f32(1e-3) * max(side.scale[h])
        u = [f32(z[h, c] * (f32(1) / max(side.scale[h, c], floor))) for c in range(d)]

        def lanes(a, b):
            sums = [0.0] * 8
            for c in range(len(a)):
                sums[c % 8] += float(a[c]) * float(b[c])
            total = sums[0]
            for lane in range(1, 8):
                total += sums[lane]
            return total

        norm = math.sqrt(lanes(u, u) / d)
        codes, levels = [0] * d, [f32(0)] * d
        widths = side.widths[h, budget].tolist()
        if norm >= 1e-9:
            for c in range(d):
                if not widths[c // 8]:
                    continue
                book = side.codebooks[h, c // 8, widths[c // 8]][c % 8].astype(np.float32)
                y = f32(z[h, c] * f32(1 / norm))
                codes[c] = sum(bool((book[i] + book[i + 1]) * f32(0.5) < y) for i in range(len(book) - 1))
                levels[c] = book[codes[c]]
        against = lanes(levels, levels) if side.gain_rule[h] else lanes(z[h], levels)
        gain = 0
        if against > 0:
            g = lanes(z[h], z[h]) / against
            g = math.sqrt(g) if side.gain_rule[h] else g
            gain = min(max(round(32 * math.log2(g / float(side.gain_base[h]))), 1), 255)
        out.append(gain)
        for group, width in enumerate(widths):
            number = sum(codes[group * 8 + i] << (i * width) for i in range(8))
            out += number.to_bytes(width, "little")
    return bytes(out) + bytes(row_bytes(side.n_head, side.head_dim, bits) - len(out))


@pytest.mark.parametrize(("n_head", "d"), [(1, 64), (3, 32), (2, 80)])
def test_rows_are_the_bytes_of_the_readme(n_head, d):
    calibration = synthetic.calibration(1, n_head, d, seed=d)
    for name, side in calibration.layers[0].items():
        z = synthetic.draw(np.random.default_rng(1), side, 6)
        z[0] = 0
        z[1, 0] *= 1e-12
        z[2, 0] *= 1e6
        z[3, 0] *= 1e-5
        side.scale[0, -1] = 1e-7
        for i, bits in enumerate(calibration.bits):
            rows = encode_rows(side, i, z, bits)
            for n in range(len(z)):
                assert rows[n].tobytes() == encode_by_the_readme(side, i, z[n], bits), (name, bits, n)


def test_zero_and_not_finite_vectors_decode_to_zero():
    side = synthetic.calibration(1, 2, 32, bits=(2,)).layers[0]["k"]
    z = synthetic.draw(np.random.default_rng(0), side, 4)
    z[0], z[1, 0, 3], z[2, 0, 31], z[3, 0, 31] = 0, np.nan, np.inf, 3e38
    back = decode_rows(side, 0, encode_rows(side, 0, z, 2))
    assert not back[0].any() and not back[:, 0].any()
    assert back[1:, 1].any(axis=1).all() and np.isfinite(back).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), d=st.sampled_from([32, 64, 96]), n_head=st.integers(1, 3))
def test_error_falls_with_every_bit(seed, d, n_head):
    calibration = synthetic.calibration(1, n_head, d, bits=BITS, seed=seed)
    for side in calibration.layers[0].values():
        z = synthetic.draw(np.random.default_rng(seed), side, 300)
        errors = [((decode_rows(side, i, encode_rows(side, i, z, b)) - z) ** 2).mean() for i, b in enumerate(BITS)]
        assert (np.diff(errors) < 0).all(), errors
        assert errors[-1] < 0.02 * (z**2).mean()


@pytest.mark.parametrize("rule", [0, 1])
def test_gain_is_unbiased_or_keeps_the_norm(rule):
    calibration = synthetic.calibration(1, 2, 64, bits=BITS, seed=4)
    side = calibration.layers[0]["k"]
    side.gain_rule[:] = rule
    z = synthetic.draw(np.random.default_rng(0), side, 500)
    for i, bits in enumerate(BITS):
        rows = encode_rows(side, i, z, bits)
        back = decode_rows(side, i, rows)
        for head in range(2):
            code = rows[:, side.head_plan(head, i).offset]
            inside = (code > 1) & (code < 255)
            assert inside.mean() > 0.95
            power, dot = lane_dot(z[:, head], z[:, head]), lane_dot(z[:, head], back[:, head])
            kept = np.sqrt(lane_dot(back[:, head], back[:, head]) / power) if rule else dot / power
            # half a step of 1/32 octave, and f32
            assert np.abs(np.log2(kept[inside])).max() <= 0.5 / 32 + 1e-5


def test_transform_and_reconstruct_are_inverse():
    side = synthetic.calibration(1, 3, 64).layers[0]["k"]
    x = np.random.default_rng(0).standard_normal((50, 3, 64)).astype(np.float32)
    np.testing.assert_allclose(reconstruct(side, transform(side, x)), x, atol=2e-5)
    plan = side.head_plan(1, 0)
    np.testing.assert_allclose(plan.encode @ (x[0, 1] - plan.mean), transform(side, x)[0, 1], atol=1e-4)


def rope_by_pairs(x, position, theta, pairs, scale=1.0):
    result = x.astype(np.float64).copy()
    for (a, b), t in zip(pairs, theta, strict=True):
        z = complex(x[a], x[b]) * complex(math.cos(position * t), math.sin(position * t)) * scale
        result[a], result[b] = z.real, z.imag
    return result


def test_rope_pairs_neighbours_or_halves_and_leaves_the_rest():
    x = np.random.default_rng(0).standard_normal((1, 1, 16))
    theta = 100.0 ** (-np.arange(4) / 4)
    factors = np.array([1, 2, 3, 4], np.float32)
    for neox, pairs in ((False, [(0, 1), (2, 3), (4, 5), (6, 7)]), (True, [(0, 4), (1, 5), (2, 6), (3, 7)])):
        rope = Rope(8, neox, 100.0, freq_scale=0.5, freq_factors=factors)
        want = rope_by_pairs(x[0, 0], 37, 0.5 * theta / factors, pairs)
        np.testing.assert_allclose(rope.rotate(x, np.array([37]))[0, 0], want, atol=1e-12)
        shifted = Rope(8, neox, 100.0, n_offs=8).rotate(x, np.array([37]))[0, 0]
        want = rope_by_pairs(x[0, 0], 37, theta, [(a + 8, b + 8) for a, b in pairs])
        np.testing.assert_allclose(shifted, want, atol=1e-12)


def test_yarn_keeps_fast_frequencies_and_stretches_slow_ones():
    rope = Rope(64, True, freq_scale=0.25, ext_factor=1.0, n_ctx_orig=2048)
    theta, scale = rope.frequencies()
    plain = 10000.0 ** (-np.arange(32) / 32)
    ratio = theta / plain
    assert ratio[0] == 1 and ratio[-1] == 0.25 and (np.diff(ratio) <= 0).all()
    assert scale == pytest.approx(1 + 0.1 * math.log(4))


def attention_case(seed=0, n_head=4, d=32, dv=16, cells=40, queries=6):
    rng = np.random.default_rng(seed)
    sides = synthetic.calibration(1, 2, d, dv, bits=(2,), seed=seed).layers[0]
    x = {s: rng.standard_normal((cells, 2, size)).astype(np.float32) for s, size in (("k", d), ("v", dv))}
    coded, z = {}, {}
    for s, side in sides.items():
        z[s] = transform(side, x[s]).astype(np.float16)
        coded[s] = encode_rows(side, 0, z[s].astype(np.float32), 2)
    q = rng.standard_normal((queries, n_head, d)).astype(np.float32)
    cell_positions = rng.permutation(cells).astype(np.int32)
    query_positions = np.arange(cells - queries, cells, dtype=np.int32)
    mask = np.where(cell_positions[None] <= query_positions[:, None], 0, -np.inf).astype(np.float32)
    options = {"query_positions": query_positions, "cell_positions": cell_positions, "mask": mask, "scale": d**-0.5}
    return sides, x, z, coded, q, options


def test_attention_chooses_exact_or_coded_for_each_query():
    sides, _, z, coded, q, options = attention_case()
    rope, rng = Rope(24, True), np.random.default_rng(3)
    held = rng.random(40) < 0.8
    cells = {s: CodedCells.of_rows(sides[s], 0, coded[s], z[s], held) for s in "kv"}
    slopes, sinks = alibi_slopes(4, 8.0), rng.standard_normal(4)
    mask = options["mask"] + rng.standard_normal(options["mask"].shape).astype(np.float32)
    options = {**options, "mask": mask}
    extra = {"rope": rope, "sinks": 3, "window": 9, "softcap": 5.0, "sink_logits": sinks, "slopes": slopes}
    out = attention(q, cells["k"], cells["v"], **options, **extra)
    back = {s: decode_rows(sides[s], 0, coded[s]) for s in "kv"}
    for i, position in enumerate(options["query_positions"]):
        for h in range(4):
            logits, values = [], []
            for j, own in enumerate(options["cell_positions"]):
                exact = held[j] and (position - own < 9 or own < 3)
                k, v = ((z if exact else back)[s][j, h // 2].astype(np.float64) for s in "kv")
                k = sides["k"].decode[h // 2].astype(np.float64) @ k + sides["k"].mean[h // 2]
                k = rope.rotate(k[None, None], np.array([own]))[0, 0]
                logits.append(5 * math.tanh(k @ q[i, h] * options["scale"] / 5) + slopes[h] * mask[i, j])
                values.append(sides["v"].decode[h // 2].astype(np.float64) @ v + sides["v"].mean[h // 2])
            weights = np.exp([*logits, sinks[h]])
            want = (weights[:-1, None] * np.array(values)).sum(axis=0) / weights.sum()
            np.testing.assert_allclose(out[i, h], want, atol=1e-10)


def test_attention_with_everything_exact_is_plain_attention():
    sides, x, z, coded, q, options = attention_case(seed=1)
    rope = Rope(32, False)
    plain = {"k": PlainCells(rope.rotate(x["k"], options["cell_positions"])), "v": PlainCells(x["v"])}
    want = attention(q, plain["k"], plain["v"], **options, rope=rope)
    cells = {s: CodedCells.of_rows(sides[s], 0, coded[s], z[s]) for s in "kv"}
    near = attention(q, cells["k"], cells["v"], **options, rope=rope, window=100)
    far = attention(q, cells["k"], cells["v"], **options, rope=rope, window=0, sinks=0)
    mixed = attention(q, cells["k"], plain["v"], **options, rope=rope, window=100)
    # f16 of z is all that is lost
    assert np.abs(near - want).max() < 0.01 and np.abs(mixed - want).max() < 0.01
    assert np.abs(far - want).max() > 0.05
    coded_only = {s: CodedCells(sides[s], cells[s].coded) for s in "kv"}
    np.testing.assert_array_equal(far, attention(q, coded_only["k"], coded_only["v"], **options, rope=rope))


def test_a_query_that_sees_nothing_gives_zeros():
    assert softmax(np.full((2, 3), -np.inf)).tolist() == [[0] * 3] * 2
    assert softmax(np.full((1, 3), -np.inf), sink=0.5).tolist() == [[0] * 3]
    np.testing.assert_allclose(softmax(np.zeros((1, 3)), sink=0.0), 0.25)


def test_alibi_slopes_are_those_of_the_paper():
    np.testing.assert_allclose(alibi_slopes(8, 8.0), [2.0 ** -(i + 1) for i in range(8)])
    np.testing.assert_allclose(alibi_slopes(12, 8.0)[8:], [2.0 ** -(i + 0.5) for i in range(4)])
