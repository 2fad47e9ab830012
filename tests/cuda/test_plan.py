"""How the CUDA kernels divide their work, checked without a GPU: ggml_kvtc/cuda/plan.h is plain C++.

Failures caught: a cell that no split reads or two read, shared memory beyond what a block may have, parts of it that
are misaligned or overlap the end, a prefill that leaves cells out or whose scratch grows with the context.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

MIB = 1 << 20
GPUS = {"turing": (72, 64 << 10), "ampere": (84, 99 << 10), "hopper": (132, 227 << 10)}
DIMS = st.sampled_from([64, 80, 96, 128, 256, 512])


@st.composite
def shapes(draw, tokens: st.SearchStrategy[int], dims: st.SearchStrategy[int] = DIMS) -> list[int]:
    """d, n_kv, n_tokens, group, n_head_kv, n_stream, then row, payload, table and pair bytes of K and V, rotation pairs
    that do not turn slowly."""
    d = draw(dims)
    heads = draw(st.integers(1, 16))
    bits = [draw(st.integers(1, 8)) for _ in range(2)]
    rows = [heads * d * b // 8 for b in bits]
    payload = [d * b // 8 - 1 for b in bits]
    tables = [d // 8 * min(16 << 2 * b, 16 << 6) for b in bits]
    pairs = [16 + d // 8 * (20 << 2 * min(b, 4)) for b in bits]
    shape = [d, draw(st.integers(1, 200_000)), draw(tokens), draw(st.integers(1, 16)), heads, draw(st.integers(1, 4))]
    return [*shape, *rows, *payload, *tables, *pairs, draw(st.integers(0, d // 2))]


def check_splits(shape: list[int], out: list[int], shared: int) -> None:
    n_slab, slab, per_split, n_split, n_row_block, nq, used, *offsets = out
    assert (n_slab - 1) * slab < shape[1] <= n_slab * slab
    assert (n_split - 1) * per_split < n_slab <= n_split * per_split
    assert n_row_block * 8 * nq >= shape[2] * shape[3] > (n_row_block - 1) * 8 * nq
    assert used <= shared
    assert all(at % 16 == 0 and at <= used for at in offsets)
    assert sorted(offsets) == offsets


@settings(deadline=None, max_examples=300)
@given(shape=shapes(st.integers(1, 16)), gpu=st.sampled_from(sorted(GPUS)))
def test_decode_reads_every_cell_once_within_shared_memory(plans, shape, gpu):
    ffi, library = plans
    out = ffi.new("long[18]")
    if library.plan_decode(shape, *GPUS[gpu], out):
        check_splits(shape, list(out)[:16], GPUS[gpu][1])


@settings(deadline=None, max_examples=300)
@given(
    shape=shapes(st.integers(1, 16), st.sampled_from([64, 80, 96, 128, 256])),
    kinds=st.tuples(st.integers(1, 3), st.integers(0, 3)),
    bits=st.tuples(st.integers(2, 4), st.integers(2, 4)),
    gpu=st.sampled_from(sorted(GPUS)),
)
def test_decode_of_stored_keys_has_a_plan_whose_rows_fit_wherever_they_begin(plans, shape, kinds, bits, gpu):
    """Kinds as sides.h counts them: kvtc, turbo, f16, q8_0."""
    ffi, library = plans
    d, tables = shape[0], {2: 256, 3: 1024, 4: 256}
    for side, (kind, b) in enumerate(zip(kinds, bits, strict=True)):
        if kind:
            shape[8 + side] = (0, d * b // 8, 2 * d, d // 32 * 34)[kind]
            shape[10 + side] = tables[b] if kind == 1 else 0
    out = ffi.new("long[22]")
    assert library.plan_decode_sides(shape, kinds, *GPUS[gpu], out)
    plan = list(out)
    check_splits(shape, plan[:16], GPUS[gpu][1])
    for side in range(2):
        stride, lanes = plan[16 + side], plan[18 + side]
        assert stride % 32 == 16 and stride >= 15 + shape[8 + side] and 1 << lanes <= 32
    assert plan[5] == 1 and plan[20:] == [0, 0]  # 8 query rows; neither rotations nor a matrix
    assert not library.plan_sm90_sides(shape, kinds)


@pytest.mark.parametrize("d", [64, 80, 96, 128])
@pytest.mark.parametrize("gpu", ["ampere", "hopper"])
def test_decode_has_a_plan_for_usual_shapes(plans, d, gpu):
    ffi, library = plans
    for k, v in ((2, 4), (3, 4), (1, 3), (4, 4)):
        tables = [d // 8 * (16 << 2 * min(b, 3)) for b in (k, v)]
        shape = [d, 131072, 1, 4, 8, 1, d * k, d * v, d * k // 8 + 1, d * v // 8 + 1, *tables, 0, 0, 0]
        assert library.plan_decode(shape, *GPUS[gpu], ffi.new("long[18]"))


@settings(deadline=None, max_examples=300)
@given(shape=shapes(st.integers(1, 8)))
def test_wgmma_decode_reads_every_cell_once_and_aligns_its_tables(plans, shape):
    ffi, library = plans
    out = ffi.new("long[24]")
    if library.plan_sm90(shape, *GPUS["hopper"], out):
        assert shape[0] in (64, 128) and shape[2] * shape[3] <= 8
        assert out[9] % 4096 == out[10] % 4096 == 3072  # behind the system's KiB, tables are aligned to their own size
        check_splits(shape, list(out), GPUS["hopper"][1])


@pytest.mark.parametrize(
    "heads, group, n_kv", [(8, 4, 256), (8, 4, 131072), (8, 1, 16384), (4, 7, 256), (4, 7, 65536), (8, 8, 131072)]
)
@pytest.mark.parametrize("k, pairs", [(2, 32 << 10), (3, 36 << 10)])
def test_one_token_has_a_kernel_of_its_own(plans, heads, group, n_kv, k, pairs):
    """Keys' tables as bench/random_model.py makes them, and values' larger: those take 48 KiB."""
    ffi, library = plans
    rest = [heads * 16 * k, heads * 64, 20 * k, 65, 0, 0, pairs, 80 << 10, 0]
    for tokens, right in ((1, 2), (8 // group, 2 if group > 4 else 1)):
        shape = [128, n_kv, tokens, group, heads, 1, *rest]
        assert library.plan_sm90(shape, *GPUS["hopper"], ffi.new("long[24]")) == right


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("v", [1, 2, 3, 4])
def test_one_token_of_few_query_heads_has_that_kernel_at_all_usual_widths(plans, heads, k, v):
    """Also where all groups have the same width, whose tables are the largest; heads may differ in their bytes."""
    ffi, library = plans
    pairs = [{1: 4096, 2: 4096, 3: 16384, 4: 65536}[b] for b in (k, v)]
    for n_kv in (256, 16384, 131072):
        shape = [128, n_kv, 1, 4, heads, 1, heads * 16 * k, heads * 16 * v, 16 * k + 2, 16 * v + 2, 0, 0, *pairs, 0]
        assert library.plan_sm90(shape, *GPUS["hopper"], ffi.new("long[24]")) == 2


@pytest.mark.parametrize(
    "heads, group, n_kv, uneven, left",
    [
        (8, 4, 131072, True, 0),
        (8, 4, 262144, True, 1),
        (8, 8, 131072, True, 1),
        (8, 4, 65536, True, 0),
        (8, 4, 16384, True, 0),
        (8, 4, 15360, False, 0),
        (4, 7, 131072, True, 1),
        (4, 7, 32768, True, 0),
        (4, 7, 16384, False, 0),
        (2, 4, 148000, True, 1),
        (32, 4, 24500, True, 0),
    ],
)
def test_heads_get_unequal_parts_of_long_contexts_alone(plans, heads, group, n_kv, uneven, left):
    """And a processor is left to the token's codes where that has the time for them."""
    ffi, library = plans
    out = ffi.new("int[5]")
    library.plan_sm90_parts(
        [128, n_kv, 1, group, heads, 1, heads * 32, heads * 64, 35, 67, 0, 0, 8192, 65536, 0], 132, 227 << 10, out
    )
    n_block, n_sum, n_split, per_split, n_left = out
    assert (n_block > 0) == uneven and n_left == left
    if uneven:
        assert heads <= n_block == 132 - n_left < heads * n_sum and per_split >= 16
    else:
        assert n_sum == n_split


@settings(deadline=None, max_examples=300)
@given(n_slab=st.integers(1, 1 << 14), n_fine=st.sampled_from([64, 128, 256]), n_part=st.integers(1, 3 * 132))
def test_unequal_parts_of_a_head_have_every_slab_once_and_fewer_exact_ones(plans, n_slab, n_fine, n_part):
    _, library = plans
    begin = [library.get_slab(n_slab, n_fine, i, n_part) for i in range(n_part + 1)]
    sizes = [b - a for a, b in zip(begin, begin[1:], strict=False)]
    assert begin[0] == 0 and begin[-1] == n_slab and min(sizes) >= 0
    if n_slab > 16 * n_part > 32:
        assert max(sizes[1:-1]) - min(sizes[1:-1]) <= 1
        assert max(sizes[0], sizes[-1]) < min(sizes[1:-1])


@settings(deadline=None, max_examples=300)
@given(shape=shapes(st.integers(1, 8), st.just(256)))
def test_wgmma_decode_of_head_dim_256_reads_every_cell_once(plans, shape):
    ffi, library = plans
    out = ffi.new("long[21]")
    if library.plan_sm90_d256(shape, *GPUS["hopper"], out):
        assert shape[2] * shape[3] <= 8
        assert out[7] % 1024 == 0  # tables are aligned to their own size
        check_splits(shape, list(out), GPUS["hopper"][1])


@pytest.mark.parametrize("heads, group", [(4, 2), (1, 4), (16, 2)])
@pytest.mark.parametrize("n_kv", [256, 1536, 131072])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_wgmma_decode_serves_head_dim_256_of_gemma(plans, heads, group, n_kv, bits):
    ffi, library = plans
    pairs = {2: 18 * 1024, 3: 18 * 1024, 4: 11 * 4096}[bits]  # of keys of bench/random_model.py's shape
    shape = [256, n_kv, 1, group, heads, 1, heads * 32 * bits, heads * 128, 32 * bits + 1, 129, 0, 0, pairs, 0, 0]
    assert library.plan_sm90_d256(shape, *GPUS["hopper"], ffi.new("long[21]"))


@settings(deadline=None, max_examples=300)
@given(shape=shapes(st.integers(1, 2), st.just(256)))
def test_wgmma_decode_of_slow_pairs_reads_every_cell_once(plans, shape):
    ffi, library = plans
    out = ffi.new("long[24]")
    if library.plan_sm90_slow(shape, *GPUS["hopper"], out):
        assert shape[2] == 1 and shape[3] <= 2 <= 2 * shape[14] <= out[22]
        assert out[7] % 1024 == 0 and out[13] % 4096 == 3072  # tables are aligned to their own size
        assert out[23] <= 256  # the copy engine's boxes
        check_splits(shape, list(out)[:22], GPUS["hopper"][1])


@settings(deadline=None, max_examples=300)
@given(
    shape=shapes(st.integers(17, 512)),
    n_exact=st.integers(0, 2000),
    mib=st.integers(1, 144),
    cols=st.sampled_from([32, 64]),
)
def test_prefill_covers_all_cells_in_chunks(plans, shape, n_exact, mib, cols):
    ffi, library = plans
    out = ffi.new("long[11]")
    library.plan_prefill(shape, 132, mib * MIB, n_exact, cols, out)
    chunk, n_list, n_split, split, n_merge, token_blocks, head_blocks, cols2, n_column, n_chunk, _ = out
    assert chunk % 256 == split % 256 == n_list % 256 == 0
    assert (n_split - 1) * split < chunk <= n_split * split
    assert n_list >= min(shape[1], n_exact)
    assert n_column - n_list >= shape[1] and (n_column - n_list) % 256 == 0
    assert (n_chunk - 1) * chunk < n_column <= n_chunk * chunk
    assert token_blocks * (cols // cols2) >= shape[2] and head_blocks * cols2 >= shape[3]
    assert 1 <= n_merge <= 8


@settings(deadline=None, max_examples=300)
@given(shape=shapes(st.integers(17, 512)), n_exact=st.integers(0, 2000), mib=st.integers(1, 144))
def test_wgmma_prefill_covers_all_cells_and_rows_in_whole_tiles(plans, shape, n_exact, mib):
    ffi, library = plans
    out = ffi.new("long[10]")
    served = library.plan_tiles(shape, 132, mib * MIB, n_exact, out)
    assert served == (shape[0] in (64, 128, 256))
    if served:
        chunk, n_list, n_column, n_chunk, n_merge, row_blocks, n_split, per_split, keys, _ = out
        assert chunk % 256 == n_list % 256 == n_column % 256 == 256 % keys == 0
        assert n_list >= min(shape[1], n_exact) and n_column - n_list >= shape[1]
        assert (n_chunk - 1) * chunk < n_column <= n_chunk * chunk
        assert (n_split - 1) * per_split < chunk // keys <= n_split * per_split
        assert (row_blocks - 1) * 128 < shape[2] * shape[3] <= row_blocks * 128
        assert 1 <= n_merge <= 8


SHAPES = pytest.mark.parametrize("group, heads, d", [(4, 8, 128), (7, 4, 128), (2, 4, 256), (4, 4, 256), (3, 3, 64)])


def prompt(group: int, heads: int, d: int, n_kv: int, tokens: int) -> list[int]:
    return [d, n_kv, tokens, group, heads, 1, heads * d // 4, heads * d // 2, d // 4 + 1, d // 2 + 1, 0, 0, 0, 0, 0]


@SHAPES
@pytest.mark.parametrize("n_kv", [512, 4096, 131072, 1 << 20])
def test_prefill_scratch_stays_below_256_mib_at_any_context(plans, group, heads, d, n_kv):
    ffi, library = plans
    out = ffi.new("long[11]")
    shape = prompt(group, heads, d, n_kv, 512)
    library.plan_prefill(shape, 132, 144 * MIB, 196 + 512, 64, out)
    assert out[10] <= 256 * MIB
    assert library.plan_tiles(shape, 132, 144 * MIB, 196 + 512, out)
    assert out[9] <= 256 * MIB


class Pool:
    """ggml's pool without virtual memory management: what fits best is used again, and nothing is given back."""

    def __init__(self) -> None:
        self.buffers: list[int] = []

    def take(self, size: int) -> None:
        if not any(buffer >= size for buffer in self.buffers):
            self.buffers.append(int(1.05 * size))


@SHAPES
@pytest.mark.parametrize("tiles", [0, 1])
@pytest.mark.parametrize("n_cells", [4096, 131072])
def test_a_pool_that_keeps_every_size_stays_below_256_mib(plans, group, heads, d, tiles, n_cells):
    ffi, library = plans
    pool = Pool()
    for i, n_kv in enumerate(range(256, n_cells + 1, 256)):  # short prompts, whole batches, and answers between them
        tokens = (17, 512, 100, 333)[i % 4]
        shape = prompt(group, heads, d, n_kv, tokens)
        pool.take(library.scratch_size(shape, 132, 144 * MIB, 196 + tokens, n_cells, tiles))
        pool.take(library.decode_scratch_size(144 * MIB, min(33, n_kv // 192 + 1) * heads * group * (d + 2) * 4))
    assert sum(pool.buffers) <= 256 * MIB


@settings(deadline=None, max_examples=300)
@given(
    shape=shapes(st.integers(17, 2048)),
    n_exact=st.integers(0, 2000),
    mib=st.integers(1, 144),
    tiles=st.integers(0, 1),
    n_cells=st.integers(1, 200_000),
)
def test_what_is_asked_of_the_pool_is_enough(plans, shape, n_exact, mib, tiles, n_cells):
    ffi, library = plans
    out = ffi.new("long[11]")
    if tiles and not library.plan_tiles(shape, 132, mib * MIB, n_exact, out):
        return
    if not tiles:
        library.plan_prefill(shape, 132, mib * MIB, n_exact, 64, out)
    assert out[9 if tiles else 10] <= library.scratch_size(shape, 132, mib * MIB, n_exact, n_cells, tiles)
