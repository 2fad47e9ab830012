"""The attention operation against the f64 reference. Failures caught: a key rotated to the wrong place, exact where its
codes should count or the other way round, a cell of another stream, head or slot, a row of the result never written.

Both sides start from the same codes and the same f16 rounding of exact vectors, so only f32 arithmetic separates them:
the error's root mean square stays within 1e-5 of the result's, and that of the worst row within 5e-5.
"""

from __future__ import annotations

import math

import ffi
import ggml_graph
import numpy as np
import pytest
from attention_case import Case, Inputs, expected, run, run_layer
from kvtc_gguf.reference_rope import Rope

WHOLE, ROW = 1e-5, 5e-5
NEOX, NORMAL = Rope(64, neox=True), Rope(64, neox=False)


def check(case: Case, threads: tuple[int, ...] = (1, 2)) -> None:
    x = Inputs(case)
    right = expected(x)
    size = math.sqrt((right**2).mean())
    assert size > 0
    for n_threads in threads:
        error = run(x, n_threads) - right
        assert np.isfinite(error).all(), (
            f"{n_threads} threads: {np.isnan(error).mean():.0%} of the result is not finite"
        )
        whole, row = math.sqrt((error**2).mean()), math.sqrt((error**2).mean(axis=-1).max())
        assert whole <= WHOLE * size, f"{n_threads} threads: {whole / size:.1e}"
        assert row <= ROW * size, f"{n_threads} threads: {row / size:.1e} in the worst row"


@pytest.mark.parametrize("v", range(1, 7))
@pytest.mark.parametrize("k", range(1, 7))
def test_every_pair_of_widths(k, v):
    check(Case(k=k, v=v, heads=3, exact="some"), (2,))


@pytest.mark.parametrize(
    ("dk", "dv", "heads", "bits"),
    [
        (8, 8, 1, 1),  # a row of one byte
        (8, 8, 1, 3),
        (8, 8, 2, 4),
        (8, 16, 1, 2),
        (16, 8, 1, 4),
        (24, 40, 3, 6),
        (72, 72, 2, 3),
        (80, 80, 2, 2),
        (96, 96, 1, 5),
        (128, 128, 4, 2),
        (192, 128, 1, 3),
        (128, 192, 1, 3),
        (256, 256, 1, 2),
        (512, 512, 1, 2),
        (512, 8, 1, 3),
    ],
)
def test_every_head_dim(dk, dv, heads, bits):
    check(Case(k=bits, v=bits, dk=dk, dv=dv, heads=heads, rope=Rope(dk, neox=True), exact="some"))


@pytest.mark.parametrize("group", range(1, 9))
def test_every_group_size(group):
    check(Case(group=group, tokens=7))


@pytest.mark.parametrize("tokens", [1, 2, 3, 6, 31, 32, 33, 64, 127, 128, 129, 200, 255, 256, 257, 300])
def test_every_number_of_queries(tokens):
    check(Case(tokens=tokens, n_kv=331, exact="store", window=50), (2,))


@pytest.mark.parametrize("n_kv", [1, 2, 15, 63, 64, 65, 127, 128, 129, 192, 1000])
def test_every_number_of_cells(n_kv):
    check(Case(tokens=1, n_kv=n_kv, empty=0, exact="some"))


@pytest.mark.parametrize("exact", ["none", "store", "some", "batch"])
@pytest.mark.parametrize("streams", [2, 3])
def test_streams(streams, exact):
    check(Case(streams=streams, tokens=6, order="shuffled", exact=exact))


@pytest.mark.parametrize("tokens", [1, 4, 40])
@pytest.mark.parametrize("mask", ["causal", "holes", "dead", "none"])
def test_masks(mask, tokens):
    empty = 0 if mask == "none" else 70
    check(Case(mask=mask, tokens=tokens, n_kv=200, empty=empty, exact="some"))


@pytest.mark.parametrize("tokens", [1, 4, 40])
@pytest.mark.parametrize("span", [1, 50, 2**31 - 1])
@pytest.mark.parametrize("extra", [{}, {"order": "shuffled"}, {"start": 999_900}, {"streams": 2}], ids=str)
def test_positions_in_place_of_a_mask(extra, span, tokens):
    check(Case(mask="span", span=span, tokens=tokens, n_kv=400, empty=70, exact="some", **extra))


def test_positions_hide_another_sequence():
    check(Case(mask="span", tokens=1, n_kv=400, order="interleaved", exact="some"))


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("sink_logits", [False, True])
def test_queries_that_see_nothing_give_zeros(sink_logits, n_threads):
    x = Inputs(Case(mask="dead", tokens=4, n_kv=600, sink_logits=sink_logits))
    result = run(x, n_threads)
    assert not result[:, 1::2].any()
    assert np.isfinite(result).all()


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize(
    "extra",
    [
        {"softcap": 3.0},
        {"sink_logits": True},
        {"max_bias": 8.0},
        {"max_bias": 8.0, "heads": 3, "group": 2},  # heads that are no power of two
        {"softcap": 20.0, "sink_logits": True, "max_bias": 4.0, "heads": 5, "group": 1},
    ],
    ids=str,
)
def test_changes_of_the_logits(extra, tokens):
    check(Case(tokens=tokens, n_kv=600, exact="some", **extra))


FACTORS = np.linspace(1, 9, 32).astype(np.float32)
YARN = {"freq_scale": 0.25, "ext_factor": 1.0, "n_ctx_orig": 512}
ROPES = {
    "none": None,
    "normal": NORMAL,
    "neox": NEOX,
    "normal, 40 of 64": Rope(40, neox=False),
    "neox, 40 of 64": Rope(40, neox=True),
    "neox, 2 of 64": Rope(2, neox=True),
    "factors": Rope(64, neox=True, freq_factors=FACTORS),
    "normal, factors, linear scaling": Rope(64, neox=False, freq_scale=0.5, freq_factors=FACTORS),
    "yarn": Rope(64, neox=True, **YARN),
    "normal, yarn, attn factor": Rope(64, neox=False, attn_factor=0.75, **YARN),
    "attn factor": Rope(64, neox=True, attn_factor=1.5),
    "base 1e6": Rope(64, neox=True, freq_base=1e6),
}


@pytest.mark.parametrize("start", [0, 61, 5000, 999_900])
@pytest.mark.parametrize("order", ["contiguous", "shuffled", "sparse", "interleaved"])
@pytest.mark.parametrize("rope", ROPES)
def test_rotations_and_positions(rope, order, start):
    check(Case(rope=ROPES[rope], order=order, start=start, n_kv=140, exact="some"), (1,))


@pytest.mark.parametrize("rope", [r for r in ROPES if r != "none"])
def test_reference_rope_is_that_of_ggml(rope):
    """Both the reference and the pack follow one reading of RoPE; this is ggml's own."""
    rope = ROPES[rope]
    x = np.random.default_rng(0).standard_normal((50, 2, 64)).astype(np.float32)
    positions = np.arange(50, dtype=np.int32) * 7
    with ggml_graph.graph() as g:
        numbers = rope.freq_base, rope.freq_scale, rope.ext_factor, rope.attn_factor, rope.beta_fast, rope.beta_slow
        mode = 2 if rope.neox else 0
        tensors = g.tensor(x), g.tensor(positions), g.tensor(rope.freq_factors)
        node = ffi.base.ggml_rope_ext(g.ctx, *tensors, rope.n_dims, mode, rope.n_ctx_orig, *numbers)
        rotated = g.compute(node, 1).view(np.float32).reshape(x.shape)
    np.testing.assert_allclose(rotated, rope.rotate(x, positions), atol=2e-4)


@pytest.mark.parametrize("order", ["contiguous", "shuffled", "interleaved"])
@pytest.mark.parametrize("exact", ["none", "store", "some", "batch"])
@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (4, 0), (0, 32), (4, 32), (1, 1), (70, 100), (0, 10_000)])
def test_sinks_and_window(sinks, window, exact, order):
    check(Case(sinks=sinks, window=window, exact=exact, order=order, tokens=12, n_kv=180), (2,))


@pytest.mark.parametrize("window", [1, 40, 64, 100, 128, 250])
def test_edge_of_the_window_inside_a_block_of_queries(window):
    """300 queries in blocks of 128: most tiles hold keys that are exact for some rows of a block only."""
    check(Case(tokens=300, n_kv=400, window=window, k=1, v=1, exact="store"), (2,))
    check(Case(tokens=150, n_kv=400, window=window, order="shuffled", exact="some"), (2,))


def test_batches_do_not_change_the_result():
    """The last token's result is the same when it comes alone, its predecessors in the store, as in one batch."""
    whole = Inputs(Case(tokens=40, n_kv=300, exact="store"))
    last = Inputs(Case(tokens=1, n_kv=300, exact="store"))
    last.z, last.rows, last.q = whole.z, whole.rows, whole.q[:, :, -1:].copy()
    last._exact()
    a, b = run(whole)[:, -1], run(last)[:, -1]
    assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


@pytest.mark.parametrize("exact", ["none", "some", "batch"])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("plain", ["f16", "q8_0", "f32"])
@pytest.mark.parametrize("side", ["k", "v"])
def test_one_side_of_an_ordinary_type(side, plain, tokens, exact):
    extra = {"heads": 3, "n_kv": 150, "window": 20, "tokens": tokens, "exact": exact, side: plain}
    check(Case(**extra), (2,))
    if plain == "f16":
        check(Case(dk=72, dv=40, rope=Rope(72, neox=True), order="shuffled", streams=2, **extra), (2,))


@pytest.mark.parametrize("n_kv", [512, 700, 2048, 4099])
@pytest.mark.parametrize(("tokens", "group"), [(1, 1), (1, 8), (7, 3), (16, 4), (64, 1)])
def test_splitting_the_cells_over_threads_changes_rounding_only(tokens, group, n_kv):
    x = Inputs(Case(tokens=tokens, group=group, n_kv=n_kv, heads=1, exact="some", sink_logits=True, mask="holes"))
    one = run(x, 1)
    for n_threads in (2, 4):
        error = run(x, n_threads) - one
        assert math.sqrt((error**2).mean()) <= 2e-6 * math.sqrt((one**2).mean())
    if n_kv < 4000:
        check(x.case, (2,))


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("tokens", [1, 33])
def test_strided_queries(tokens, streams):
    check(Case(permuted=True, tokens=tokens, streams=streams, exact="some"))
    check(Case(permuted=True, tokens=tokens, streams=streams, exact="batch", dk=80, dv=96, rope=Rope(80, neox=False)))


def random_case(seed: int) -> Case:
    """Anything with anything."""
    rng = np.random.default_rng(seed)

    def pick(*options):
        return options[rng.integers(len(options))]

    dk, dv = (pick(8, 40, 64, 80, 128) for _ in range(2))
    heads = pick(1, 2, 3)
    low = 1 if heads == 1 else 4 if min(dk, dv) == 8 else 1
    n_kv = int(rng.integers(60, 900))
    tokens = int(pick(1, 2, 9, 50))
    mask = pick("causal", "causal", "holes", "dead", "none")
    rope = pick(None, *(Rope(dk // part, neox=neox, freq_scale=0.5) for part in (1, 2) for neox in (True, False)))
    return Case(
        k=pick(*range(low, 7), "f16"),
        v=pick(*range(low, 7)),
        dk=dk,
        dv=dv,
        heads=heads,
        group=pick(1, 2, 3, 4),
        tokens=tokens,
        n_kv=n_kv,
        empty=0 if mask == "none" else int(rng.integers(0, n_kv - tokens)),
        streams=pick(1, 1, 2),
        rope=rope,
        start=pick(0, 0, 3, 130_000),
        order=pick("contiguous", "shuffled", "sparse", "interleaved"),
        sinks=pick(0, 4, 9),
        window=pick(0, 1, 30, 128, 500),
        exact=pick("none", "store", "some", "batch"),
        mask=mask,
        softcap=pick(0.0, 0.0, 15.0),
        sink_logits=pick(False, True),
        max_bias=0.0 if mask == "none" else pick(0.0, 0.0, 8.0),
        permuted=pick(False, True),
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(100))
def test_anything_with_anything(seed):
    check(random_case(seed), (1 + seed % 3,))


@pytest.mark.parametrize("streams", [1, 3])
def test_behind_the_writes_of_its_batch(streams):
    x = Inputs(Case(tokens=1, streams=streams, mask="span", v=4, n_kv=300))
    right = expected(x)
    assert math.sqrt(((run_layer(x) - right) ** 2).mean()) <= 1e-4 * math.sqrt((right**2).mean())  # z is made in f32
