"""Packs for CUDA devices, read without one. Failures caught: turbo heads that do not find their codes, tables or
rotation, a table or matrix for each head where one serves all, an ordinary side whose values the last kernel changes,
rotation pairs that are taken for slow ones, a table that overlaps another, is not aligned for the kernels' lookups or
takes the room of what they need beside it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from kvtc_gguf import reference, reference_turbo
from kvtc_gguf.format import Calibration
from kvtc_gguf.layout import turbo_row_bytes
from kvtc_gguf.reference_rope import Rope

from bench.random_model import BITS, SHAPES, make_side
from tests.cuda.packs import (
    HEAD,
    HEADER,
    K,
    V,
    at,
    coded_sides,
    ffi,
    operand_of,
    parts_of,
    read_head,
    turned_pack,
    write_pack,
)

SINGLE, MOST_PAIRS, STAGED, MOST_BLOCK, LEVEL = 128, 18432, 192, 155648, 128


def decode_rows(pack: np.ndarray, side: int, rows: np.ndarray, n_head: int, d: int) -> np.ndarray:
    """z f32 [n, H, d] of turbo rows as the kernels read them: codes by the head's table, gains behind all codes."""
    z = np.empty((len(rows), n_head, d), np.float32)
    for h in range(n_head):
        head = read_head(pack, side, h)
        codes = at(pack, head["codes"], 2 * d // 8, np.uint32).reshape(-1, 2)
        gain_at = n_head * head["n_bytes"] + 2 * h
        gain = rows[:, gain_at : gain_at + 2].copy().view(np.float16).astype(np.float32)
        for g, (place, table) in enumerate(codes.tolist()):
            byte, width = place & 0xFFFF, place >> 16 & 0xFF
            assert place >> 24 == d // 8 - g and table == 0
            code = reference.unpack(rows[:, head["payload"] + byte :][:, :width], width)
            if width <= 3:  # pairs of components
                pairs = at(pack, head["tables"], 8 * 4**width, np.float16).reshape(4, 4**width, 2)
                values = [pairs[c // 2, code[:, c - c % 2] | code[:, c - c % 2 + 1] << width, c % 2] for c in range(8)]
            else:
                levels = at(pack, head["tables"], 8 * 2**width, np.float16).reshape(8, 2**width)
                values = [levels[c, code[:, c]] for c in range(8)]
            z[:, h, 8 * g : 8 * g + 8] = np.stack(values, 1).astype(np.float32) * gain
    return z


@pytest.mark.parametrize("bits", reference_turbo.BITS)
@pytest.mark.parametrize(("n_head", "d"), [(1, 64), (3, 80), (2, 96), (8, 128), (2, 256), (1, 512)])
def test_turbo_heads_find_codes_gains_and_rotation(n_head, d, bits):
    sides = ((f"turbo{bits}", d), (f"turbo{bits}", d))
    native, own = coded_sides(n_head, sides)
    pack = write_pack(native, bits, bits)
    z = np.random.default_rng(d).standard_normal((50, n_head, d)).astype(np.float32)
    rows = reference.encode_rows(own[0][0], 0, z, bits)
    rotation = reference_turbo.rotation(d)
    for side in (K, V):
        assert pack[16 + 16 * side :][:16].view(np.uint32).tolist() == [
            bits,
            n_head,
            d,
            turbo_row_bytes(n_head, d, bits),
        ]
        np.testing.assert_array_equal(
            decode_rows(pack, side, rows, n_head, d), reference.decode_rows(own[0][0], 0, rows)
        )
        heads = [read_head(pack, side, h) for h in range(n_head)]
        for head in heads:
            matrix = at(pack, head["decode"], d * d, np.float16).reshape(d, d)
            np.testing.assert_array_equal(matrix, rotation if side == K else rotation.T)
            assert not at(pack, head["mean"], d, np.float32).any()
            assert head["rank"] == d and head["keep_norm"] == 1
        assert len({head["decode"] for head in heads}) == 1 and heads[0]["n_pairs"] == 0
    assert pack.size < 2 * n_head * HEAD + 2 * (2 * d * d + 8192)  # nothing large for each head


@pytest.mark.parametrize("d", [64, 128, 256])
def test_a_pack_that_knows_of_no_rotation_rotates_by_no_angle(d):
    """Models without RoPE never set one, and the kernels' tables are read for them as well."""
    native, _ = coded_sides(2, ((2, d), (4, d)))
    pack = write_pack(native, 2, 4)
    start = HEADER + 4 * HEAD + 2 * (d // 8 + 1) * d * 16
    turns = at(pack, start, 256 * 2 * (d // 2 + 16), np.float16).reshape(256, d // 2 + 16, 2)[:, : d // 2]
    assert (turns[:, 0::2] == 1).all() and (turns[:, 1::2] == 0).all()


@pytest.mark.parametrize("neox", [False, True])
def test_the_operand_of_codes_is_that_of_columns(neox):
    d = 256
    pack = turned_pack(d, Rope(d, neox))
    for h in range(2):
        operand, parts = operand_of(pack, d, 2, h), parts_of(pack, d, 2, h)
        np.testing.assert_array_equal(parts.transpose(0, 1, 4, 3, 5, 2).reshape(operand.shape), operand)
        assert operand.any()


def test_a_pair_turns_slowly_if_all_behind_it_do():
    limits, d = ffi.ffi.new("int32_t[7]"), 256
    factors = np.ones(d // 2, np.float32)
    factors[:100] = 1e6
    for rope in (
        Rope(d, True),
        Rope(d, True, freq_base=1e6),
        Rope(d, False, freq_base=1e6, freq_scale=0.125),
        Rope(64, True, freq_base=1e7),
        Rope(d, True, freq_factors=factors),
    ):
        pack = turned_pack(d, rope)  # a pointer does not keep it
        ffi.base.ggml_kvtc_cuda_pack_limits(ffi.pointer(pack), limits)
        fast = np.flatnonzero(rope.frequencies()[0] * 128 > 0.55)
        assert limits[6] == (fast[-1] + 1 if len(fast) else 0)


@pytest.mark.parametrize("coded", ["turbo3", 2])
def test_values_of_an_ordinary_type_have_a_matrix_of_ones(coded):
    native, _ = coded_sides(3, ((coded, 64), ("f16", 64)))
    pack = write_pack(native, 3 if coded == "turbo3" else 2, 0)
    for h in range(3):
        head = read_head(pack, V, h)
        np.testing.assert_array_equal(at(pack, head["decode"], 64 * 64, np.float16).reshape(64, 64), np.eye(64))
        assert not at(pack, head["mean"], 64, np.float32).any() and head["n_tables"] == 0


def column_bytes(d: int) -> int:
    return 4096 if d < 256 else 1024


def look_up(pairs: np.ndarray, pair_code: list[int], width: int, column: int) -> np.ndarray:
    """Levels f16 [8, 2^w] of a group as the kernels' addresses find them in a head's tables of pairs, u8."""
    table, _, shift, mask = pair_code
    n = 1 << width
    if shift & SINGLE:
        assert mask == 0 and table % (2 * n) == 0
        return at(pairs, table, 8 * n, np.float16).reshape(8, n)
    index = np.arange(n * n, dtype=np.uint32)
    address = (index << 2 & mask) ^ table
    return of_pairs(pairs, np.stack([address + p * column for p in range(4)]), n)


def look_up_banks(pairs: np.ndarray, group: int, pair_code: list[int], width: int, column: int) -> np.ndarray:
    """The same in values' banks; asserts that no bank is another group's, or another lane's."""
    table, _, _, mask = pair_code
    n = 1 << width
    assert table % LEVEL == group % 8 * LEVEL // 8
    if group < 8:
        assert mask == (n - 1) * LEVEL and (table & ~(LEVEL - 1) & mask) == 0
        address = (np.arange(n) * LEVEL) | table
        halves = at(pairs, 0, pairs.size // 2, np.float16)
        banks = [[halves[(address + c // 2 * column + 4 * bank) // 2 + c % 2] for c in range(8)] for bank in range(4)]
        assert all(np.array_equal(banks[0], bank) for bank in banks)
        return np.stack(banks[0])
    assert mask == (n * n - 1) * LEVEL
    address = np.arange(n * n) * LEVEL + table
    return of_pairs(pairs, np.stack([address + 4 * p for p in range(4)]), n)


def of_pairs(pairs: np.ndarray, address: np.ndarray, n: int) -> np.ndarray:
    """Levels f16 [8, n] at addresses [4, n^2] of pairs."""
    index = np.arange(n * n, dtype=np.uint32)
    halves = at(pairs, 0, pairs.size // 2, np.float16)
    found = np.stack([halves[address[p] // 2 + i] for p in range(4) for i in (0, 1)])
    low, high = index % n, index // n
    levels = np.stack([found[c][(low if c % 2 == 0 else high).argsort(kind="stable")[::n]] for c in range(8)])
    for c in range(8):  # whatever the pair's other code is
        np.testing.assert_array_equal(found[c], levels[c][low if c % 2 == 0 else high])
    return levels


@pytest.mark.parametrize("bits", [(1, 3), (2, 4), (3, 4), (4, 4), (6, 6)])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_lookups_find_every_level_of_every_group_and_tables_do_not_overlap(d, bits):
    native, _ = coded_sides(2, tuple((b, d) for b in bits))
    pack = write_pack(native, *bits)
    column = column_bytes(d)
    for side in (K, V):
        for h in range(2):
            head = read_head(pack, side, h)
            pairs = at(pack, head["pairs"], head["n_pairs"], np.uint8)
            codes = at(pack, head["pair_codes"], 4 * d // 8, np.uint32).reshape(-1, 4).tolist()
            first = at(pack, head["levels_at"], d // 8, np.uint32).tolist()
            taken = np.zeros(head["n_pairs"], np.uint8)
            bit = 8
            for g, code in enumerate(codes):
                width = code[2] >> 9 & 15
                assert code[1] * 8 + code[2] % 32 == bit
                bit += 8 * width
                assert g < head["n_wide"] or not code[2] & SINGLE
                banks = side == V and d < 256
                single = bool(code[2] & SINGLE)
                if banks:
                    assert single == (width > 5) or (g >= 8 and single and width > 3)
                last = 12 if banks and g >= 8 else 3 * column + 12 if banks else 3 * column
                assert (code[0] | code[3]) + last + 4 <= head["n_pairs"]  # whatever is looked up without a branch
                if width > 0 and not single:  # the last pair, whose index is two bits further up, or the fifth code
                    last = (4 * width if banks else 6 * width - 2) + code[2] % 32
                    assert code[2] >> 16 == (last if d < 256 else 0)
                    assert code[2] % 32 + 8 * width <= 64
                found = (
                    look_up_banks(pairs, g, code, width, column)
                    if banks and not single
                    else look_up(pairs, code, width, column)
                )
                if width == 0:
                    assert not found.any()
                    continue
                levels = at(pack, head["levels"] + 2 * first[g], 8 << width, np.float16).reshape(8, -1)
                np.testing.assert_array_equal(found, levels)
                if single:
                    taken[code[0] :][: 16 << width] += 1
                elif banks:
                    for p in range(4):
                        rows = np.arange(1 << width if g < 8 else 4**width) * LEVEL + code[0]
                        start, size = (p * column, 16) if g < 8 else (4 * p, 4)
                        for byte in range(size):
                            taken[rows + start + byte] += 1
                else:
                    start, size = code[0] & ~(4 * (1 << 2 * width) - 1), 4 << 2 * width
                    for p in range(4):
                        taken[start + p * column :][:size] += 1
            assert taken.max() == 1 and bit == 8 * head["n_bytes"]
            in_pairs = [c[2] >> 9 & 15 for c in codes if not c[2] & SINGLE]
            assert side == V or d < 256 or head["n_pairs"] <= MOST_PAIRS or max(in_pairs) < 4


def test_limits_are_those_of_coded_sides():
    native, _ = coded_sides(2, (("turbo3", 128), ("turbo4", 128)))
    limits = ffi.ffi.new("int32_t[7]")
    for bits_v, right in ((4, [48, 64, 1024, 256, 0, 0, 0]), (0, [48, 0, 1024, 0, 0, 0, 0])):
        pack = write_pack(native, 3, bits_v)
        ffi.base.ggml_kvtc_cuda_pack_limits(ffi.pointer(pack), limits)
        assert list(limits) == right


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("k", range(1, 7))
def test_tables_of_any_widths_leave_room_for_what_a_block_needs_beside_them(plans, d, k):
    """Else attention would fall back to the kernels of other devices, several times as slow. With 6 bits on both sides
    it may: of these widths up to eight and nine groups have 8 bits, 4 KiB of levels each."""
    ffi_plan, library = plans
    limits = ffi.ffi.new("int32_t[7]")
    for v in range(1, 7):
        native, _ = coded_sides(4, ((k, d), (v, d)))
        pack = write_pack(native, k, v)
        ffi.base.ggml_kvtc_cuda_pack_limits(ffi.pointer(pack), limits)
        rows = [4 * d * b // 8 for b in (k, v)]
        for tokens, group, n_kv in ((1, 4, 100_000), (1, 8, 100_000), (1, 4, 200), (1, 8, 200), (2, 4, 100_000)):
            if (k, v) == (6, 6) and d == 128:
                continue
            shape = [d, n_kv, tokens, group, 4, 1, *rows, *limits]
            kernel = library.plan_sm90(shape, 132, 227 << 10, ffi_plan.new("long[24]"))
            assert kernel == (2 if tokens == 1 else 1), (v, shape)


@pytest.mark.parametrize("bits", [(2, 4), (3, 4), (4, 4), (2, 2), (3, 2), (4, 2)])
def test_keys_of_five_bits_have_pairs_as_far_as_a_block_has_room(bits):
    """Of widths as real models have them."""
    shape = SHAPES["llama-8b"]
    sides = {side: make_side(np.random.default_rng(0), shape, side) for side in "kv"}
    calibration = Calibration("0" * 16, "llama", 1, list(BITS), {0: sides}, "random", 0, "test", "2026-01-01")
    with tempfile.TemporaryDirectory() as folder:
        pack = write_pack(ffi.native(calibration, Path(folder)), *bits)
    keys, values = ([read_head(pack, side, h) for h in range(shape.n_head_kv)] for side in (K, V))
    staged = sum(STAGED * 16 * (-(-(max(h["n_bytes"] for h in heads) + 12) // 16) | 1) for heads in (keys, values))
    room = MOST_BLOCK - staged - -(-max(head["n_pairs"] for head in values) // 4096) * 4096
    some = False
    for head in keys:
        codes = at(pack, head["pair_codes"], 4 * 16, np.uint32).reshape(-1, 4)
        widths, single = codes[:, 2] >> 9 & 15, (codes[:, 2] & SINGLE) != 0
        steps, wide = single.reshape(4, 4), widths.reshape(4, 4)[:, 0] > 5  # steps are looked up together
        assert (steps.all(axis=1) | ~steps.any(axis=1)).all() and steps[wide].all()
        assert head["n_pairs"] <= room or not (widths[~single] == 5).any()
        for n in range(int(wide.sum()), int(steps.sum()) // 4):  # its groups of 5 bits have no room
            assert head["n_pairs"] + 4 * 4096 * int((widths[4 * n :] == 5).sum() + 1) > room - 4096
        some |= bool((widths[~single] == 5).any())
    assert some == (bits[0] != 3)  # where those of 5 bits have one of 6 in their step
    assert all(head["n_wide"] == 0 for head in values)
