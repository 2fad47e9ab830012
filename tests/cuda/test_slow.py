"""Rotation pairs that turn slowly: which kernel has them, and their logits as ggml_kvtc/cuda/slow-sm90.cuh
interpolates them, in numpy on a pack. Failures caught: pairs that are taken for slow ones, nodes or a reach that do not
suffice for those that the pack calls slow, an operand whose columns or components are not those of the keys, a mean
that counts more or less than once.
"""

from __future__ import annotations

import numpy as np
import pytest
from kvtc_gguf.reference_rope import Rope

from tests.cuda.packs import at, ffi, operand_of, parts_of, read_head, turned_pack

D, N_KEYS = 256, 256
ROPES = {
    "Gemma3-4B": Rope(D, neox=True, freq_base=1e6, freq_scale=0.125),
    "Gemma3-1B": Rope(D, neox=True, freq_base=1e6),
    "normal": Rope(D, neox=False, freq_base=1e6, freq_scale=0.125),
    "a quarter": Rope(D // 4, neox=True, freq_base=1e7),
}


@pytest.mark.parametrize("n_fast, columns", [(0, 0), (1, 64), (32, 64), (33, 128), (64, 128), (65, 0), (128, 0)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_pairs_that_turn_slowly_are_not_rebuilt_where_a_block_has_slabs_enough(plans, n_fast, columns, bits):
    """Of a shape like Gemma 3's, with keys' tables as bench/random_model.py has them. 128 columns leave no room at 4
    bits."""
    ffi, library = plans
    columns = 0 if columns == 128 and bits == 4 else columns
    for heads, n_kv, tokens, group, right in (
        (4, 131072, 1, 2, columns),
        (4, 16384, 1, 2, columns),
        (8, 131072, 1, 1, columns),
        (4, 4096, 1, 2, 0),
        (4, 131072, 2, 1, 0),
        (4, 131072, 1, 3, 0),
    ):
        rest = [heads * 32 * bits, heads * 128, 32 * bits + 1, 129, 0, 0, 18 * 1024, 0, n_fast]
        out = ffi.new("long[24]")
        served = library.plan_sm90_slow([256, n_kv, tokens, group, heads, 1, *rest], 132, 227 << 10, out)
        assert (out[22] if served else 0) == right


def test_slow_pairs_are_interpolated_to_within_f16s_error(plans):
    ffi, library = plans
    numbers, angle = ffi.new("int[5]"), ffi.new("double *")
    library.get_slow_nodes(numbers, angle)
    reach, *nodes = numbers
    x = np.linspace(-reach, reach, 2 * reach + 1)
    weights = [np.prod([(x - b) / (a - b) for b in nodes if b != a], axis=0) for a in nodes]
    turns = [np.exp(1j * angle[0] / reach * y) for y in (x, np.array(nodes))]
    assert np.abs(turns[1] @ weights - turns[0]).max() < 2**-11


def turn(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """x [..., D] in the order of an operand's columns, its pairs rotated by angles [..., D / 2]."""
    first, second = np.moveaxis(x.reshape(*x.shape[:-1], D // 16, 2, 8), -2, 0)
    cos, sin = np.cos(angles).reshape(first.shape), np.sin(angles).reshape(first.shape)
    return np.stack([first * cos - second * sin, first * sin + second * cos], -2).reshape(x.shape)


@pytest.mark.parametrize("name", ROPES)
def test_interpolated_logits_are_those_of_rebuilt_keys(plans, name):
    ffi_plan, library = plans
    rope, rng, anchor, now = ROPES[name], np.random.default_rng(0), 100_000, 131_000
    pack = turned_pack(D, rope)
    limits, numbers = ffi.ffi.new("int32_t[7]"), ffi_plan.new("int[5]")
    ffi.base.ggml_kvtc_cuda_pack_limits(ffi.pointer(pack), limits)
    library.get_slow_nodes(numbers, ffi_plan.new("double *"))
    reach, *nodes = numbers
    head = read_head(pack, 0, 1)
    components = rng.standard_normal((N_KEYS, D)) / np.sqrt(1 + np.arange(D))
    query = rng.standard_normal(D)
    pos = anchor + np.arange(-reach, reach)

    # keys rebuilt and rotated, and a query of a later position
    decode = at(pack, head["decode"], D * D, np.float16).reshape(D, D).astype(np.float64)
    keys = components @ decode.T + at(pack, head["mean"], D, np.float32)
    turned = rope.rotate(keys[:, None], pos)[:, 0]
    right = turned @ rope.rotate(query[None, None], np.array([now]))[0, 0]

    # the kernel turns the query back, to the anchor for fast pairs, to nodes around it for slow ones
    pairs = np.arange(D).reshape(-1, 2)
    n = rope.n_dims
    if rope.neox:
        pairs[: n // 2] = np.arange(n).reshape(2, -1).T
    columns = pairs.reshape(D // 16, 8, 2).transpose(0, 2, 1).reshape(-1)  # the channel in each
    freq = np.zeros(D // 2)
    freq[: n // 2] = rope.frequencies()[0]
    i = np.arange(D)
    coded = np.zeros((N_KEYS, D + 8))
    coded[:, 8 * (i // 32 * 4 + i % 8 // 2) + i // 8 % 4 * 2 + i % 2] = components
    coded[:, D : D + 2] = 1  # the mean's upper and lower half
    fast = 64 if limits[6] <= 32 else 128
    assert 2 * limits[6] <= fast
    operand = operand_of(pack, D, 2, 1).astype(np.float64)
    rebuilt = np.einsum("nge,gce->nc", coded.reshape(N_KEYS, -1, 8), operand)
    np.testing.assert_allclose(rebuilt, keys[:, columns], atol=1e-5)
    back = [turn(query[columns], (now - anchor - away) * freq) for away in (0, *nodes)]
    found = turn(rebuilt, (pos - anchor)[:, None] * freq)[:, :fast] @ back[0][:fast]
    parts = parts_of(pack, D, 2, 1).astype(np.float64)
    for m, node in enumerate(nodes):
        slow = np.where(np.arange(D) < fast, 0, back[1 + m])
        of_codes = np.einsum("gurqjx,ujqx->gr", parts, slow.reshape(D // 32, 4, 4, 2)).reshape(-1)
        weight = np.prod([(pos - anchor - other) / (node - other) for other in nodes if other != node], axis=0)
        found += weight * (coded @ of_codes)
    scale = rope.frequencies()[1]
    assert scale == 1 and np.abs(found - right).max() < 5e-4 * np.abs(right).std()
    assert np.abs(found - right).max() > 0  # it is interpolated
