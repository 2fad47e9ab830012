"""Logits of rotation pairs that turn slowly, as ggml_kvtc/cuda/slow-sm90.cuh interpolates them, in numpy on a pack.
Failures caught: nodes or a reach that do not suffice for the pairs that the pack calls slow, an operand whose columns
or components are not those of the keys, a mean that counts more or less than once.
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
