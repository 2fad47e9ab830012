"""Saved states of a kvtc cache. Failures caught: a restored text that goes on as another one, rows or positions that
land in the wrong sequence, a state of another calibration, type or window that is taken, damage that is taken or not
named, a context that a bad state breaks, a size that is not what is written, a file that is half there, another
format of plain caches.
"""

from __future__ import annotations

import struct

import driver
import numpy as np
import pytest
import synthetic
import tools
from driver import HUGE, Context, kld, text
from kvtc_gguf import state
from kvtc_gguf.format import write
from kvtc_gguf.state_file import WHAT, parse, read

LIMIT = 1e-4  # nats a token: the order of sums
N, NEXT = 150, 64
PROMPT, OTHER = text(N), text(90, seed=2)
UNIFIED = pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
MODELS = pytest.mark.parametrize("name", ["one", "two", "sliding"])


@pytest.fixture
def make(request):
    """Contexts of a model of conftest.py with PROMPT in sequence 0 and OTHER in 1, or empty; freed after the test."""
    made: list[Context] = []

    def context(name: str = "one", filled: bool = True, **options) -> Context:
        made.append(Context(request.getfixturevalue(name), **{"n_seq": 3, "n_ctx": 1536, **options}))
        if filled:
            made[-1].decode(PROMPT, 0)
            made[-1].decode(OTHER, 0, seq=1)
        return made[-1]

    yield context
    for each in made:
        each.close()


def check(restored: Context, saved: Context, seq: int = 0, start: int = N, saved_seq: int = 0) -> None:
    """The next greedy tokens and their logits are those of the context that was saved."""
    assert restored.range(seq)[1] == saved.range(saved_seq)[1] == start - 1
    tokens, logits = restored.greedy(9, start, NEXT, seq)
    assert (expected := saved.greedy(9, start, NEXT, saved_seq))[0] == tokens
    assert kld(expected[1], logits) <= LIMIT


@UNIFIED
@MODELS
def test_whole_state_restored_goes_on_as_before(make, name, unified):
    saved = make(name, unified=unified)
    state = saved.save()
    used = make(name, unified=unified)
    used.decode(text(20, seed=3), N)
    for restored in (make(name, unified=unified, filled=False), used):
        assert restored.restore(state)
        assert restored.save() == state
    check(used, saved)
    check(used, saved, seq=1, start=90, saved_seq=1)


@UNIFIED
@MODELS
def test_sequence_restored_under_another_id_goes_on_as_before(make, name, unified):
    saved, restored = make(name, unified=unified), make(name, unified=unified)
    assert restored.restore(saved.save(0), 2)
    assert restored.rm(1, -1, HUGE) and restored.restore(saved.save(0), 1)
    assert restored.restore(saved.save(1), 0)  # over what is there
    check(restored, make(name, unified=unified), seq=2)
    check(restored, make(name, unified=unified), seq=1)
    check(restored, saved, seq=0, start=90, saved_seq=1)


@UNIFIED
def test_files_hold_what_data_hold(make, tmp_path, unified):
    saved, restored = make(unified=unified), make(unified=unified, filled=False)
    saved.save_file(tmp_path / "whole", PROMPT)
    saved.save_file(tmp_path / "one", PROMPT, seq=0)
    assert restored.restore_file(tmp_path / "whole") == PROMPT
    assert restored.restore_file(tmp_path / "one", seq=2) == PROMPT
    first = make(unified=unified)
    check(restored, first, seq=2)
    check(restored, saved)


@UNIFIED
def test_restored_sequence_rolls_back_and_shifts_as_before(make, unified):
    """What a rollback needs beyond the window is in the state, too."""
    saved, restored = make(unified=unified), make(unified=unified, filled=False)
    assert restored.restore(saved.save(0), 1)
    fresh = make(filled=False, unified=unified)
    fresh.decode(PROMPT[:4] + PROMPT[44 : N - 64], 0)
    assert restored.rm(1, N - 64, HUGE)
    restored.shift(4, 40, seq=1)
    check(restored, fresh, seq=1, start=N - 104)


def refusal(context: Context, state: bytes, seq: int | None) -> str:
    """The one line of log with which a state is refused; the context goes on."""
    driver.log.clear()
    assert not context.restore(state, seq)
    lines = [line.strip() for line in driver.log if line.startswith("kvtc:")]
    assert len(lines) == 1, driver.log
    assert context.range(seq or 0) == (-1, -1)
    context.decode(PROMPT, 0, seq or 0)
    return lines[0]


@pytest.mark.parametrize("seq", [None, 0], ids=["whole", "sequence"])
@pytest.mark.parametrize(
    "options, words",
    [
        ({"cache": ("kvtc2", "kvtc3")}, "kvtc4"),
        ({"cache": ("kvtc3", "kvtc4")}, "kvtc2"),
        ({"window": 17}, "--kvtc-window 16"),
        ({"sink": 3}, "--kvtc-sink 4"),
    ],
    ids=["values", "keys", "window", "sinks"],
)
def test_state_of_other_settings_is_refused(make, seq, options, words):
    saved, other = make(), make(filled=False, **options)
    assert words in refusal(other, saved.save(seq), seq)
    fresh = make(filled=False, **options)
    fresh.decode(PROMPT, 0)
    check(other, fresh)


@pytest.mark.parametrize("seq", [None, 0], ids=["whole", "sequence"])
def test_state_of_another_calibration_is_refused(make, tmp_path, seq):
    path = tmp_path / "other.gguf"
    synthetic.tiny_model(path, n_layer=1, head_dim=64)
    write(tools.calibration_of(path, 1, head_dim=64, seed=5), path.with_suffix(".kvtc.gguf"))
    other = Context(driver.Model(path), n_seq=3, n_ctx=1536)
    assert "another calibration" in refusal(other, make().save(seq), seq)
    other.close()


@pytest.mark.parametrize("seq", [None, 0], ids=["whole", "sequence"])
def test_damaged_state_is_refused_and_the_context_goes_on(make, seq):
    """A flipped byte anywhere in kvtc's head, and states that end early."""
    saved, context, fresh = make(), make(filled=False), make(filled=False)
    state = saved.save(seq)
    fresh.decode(PROMPT, 0)
    expected = fresh.decode(PROMPT[:20], N)
    head = state.index(b"kvtc")
    for at in [head + i for i in (0, 4, 8, 15, 16, 20, 24, 28, 32, 40, 60)]:
        damaged = state[:at] + bytes([state[at] ^ 1]) + state[at + 1 :]
        assert not context.restore(damaged, seq), at - head
        context.clear()
    for size in (3, head - 1, head + 2, head + 50, len(state) // 2, len(state) - 1):
        assert not context.restore(state[:size], seq), size
        context.clear()
    context.decode(PROMPT, 0)
    assert kld(expected, context.decode(PROMPT[:20], N)) <= LIMIT


def test_flipped_byte_is_refused_with_the_block_that_has_it(make):
    """Anywhere in the state; what the checksums cover is told by the reader in Python, which names blocks alike."""
    saved, context, fresh = make(), make(filled=False), make(filled=False)
    whole = saved.save(0)
    fresh.decode(PROMPT, 0)
    expected = fresh.decode(PROMPT[:20], N)
    for at in range(8, len(whole), len(whole) // 60):
        damaged = whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]
        with pytest.raises(ValueError) as error:
            parse(damaged)
        driver.log.clear()
        assert not context.restore(damaged, 0), at
        assert [line.strip() for line in driver.log if line.startswith("kvtc:")] == [f"kvtc: {error.value}"]
        assert context.range(0) == (-1, -1)
    context.decode(PROMPT, 0)
    assert kld(expected, context.decode(PROMPT[:20], N)) <= LIMIT


@MODELS
def test_size_asked_for_is_what_is_written(make, name):
    """Also when tokens came, went or changed in between: what was packed for the size is of other rows then."""
    context = make(name)
    for change in (
        lambda: None,
        lambda: context.decode(PROMPT[:9], N),
        lambda: context.rm(0, N, HUGE),
        lambda: context.decode(OTHER[:9], N),
        lambda: context.shift(4, 3),
    ):
        driver.api.llama_state_seq_get_size(context.pointer, 0)
        change()
        whole = context.save(0)
        assert len(whole) == driver.api.llama_state_seq_get_size(context.pointer, 0)
        restored = make(name, filled=False)
        assert restored.restore(whole, 0) and restored.save(0) == whole


def test_files_are_there_whole_or_not_at_all(make, tmp_path):
    context, path = make(), tmp_path / "slot.bin"
    path.write_bytes(b"an older state")
    context.save_file(path, PROMPT, seq=0)
    assert [p.name for p in tmp_path.iterdir()] == ["slot.bin"] and read(path).tokens == N
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()  # cannot be replaced
    for target in (tmp_path / "none" / "slot.bin", tmp_path / "folder"):
        with pytest.raises(AssertionError):
            context.save_file(target, PROMPT, seq=0)
        with pytest.raises(AssertionError):
            context.save_file(target, PROMPT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "slot.bin"]


@pytest.mark.parametrize("cache", ["f16", "q8_0"])
def test_plain_caches_keep_llama_cpps_format(make, cache):
    """Byte for byte: magic, sequence, cells, then each layer's type, row size and rows."""
    context = make("two", cache=(cache, cache))
    whole, row = context.save(0), {"f16": 2 * 64, "q8_0": 34 * 2}[cache]
    cells = b"".join(struct.pack("<iIi", i, 1, 0) for i in range(N))
    head = struct.pack("<IiII", 0xAF143CD8, 0, 1, N) + cells + struct.pack("<II", 0, 2)
    assert whole.startswith(head)
    side = struct.pack("<iQ", driver.TYPES[cache], row)
    assert len(whole) == len(head) + 4 * (len(side) + N * row)
    assert all(whole[len(head) + i * (len(side) + N * row) :].startswith(side) for i in range(4))


@MODELS
def test_tools_read_what_was_saved(make, tmp_path, name):
    """Rows stored as they are, and coded anew, restore to the same."""
    saved, path = make(name), tmp_path / "slot.bin"
    saved.save_file(path, PROMPT, seq=0)
    state.verify(path)
    for coder in state.Coder:
        state.convert(path, out := tmp_path / coder.value, coder)
        state.verify(out)
        restored = make(name, filled=False)
        assert restored.restore_file(out, seq=0) == PROMPT
        assert restored.save(0) == saved.save(0)
    assert (tmp_path / "rans").stat().st_size < (tmp_path / "stored").stat().st_size


@MODELS
def test_exact_values_in_8_bits_restore_to_what_the_tools_read(make, tmp_path, name):
    """C++ and Python make the same f16 of them; the text goes on nearly as before."""
    saved, restored = make(name), make(name, filled=False)
    saved.save_file(path := tmp_path / "slot.bin", PROMPT, seq=0)
    state.convert(path, out := tmp_path / "eight.bin", exact=state.Exact.eight)
    state.verify(out)
    assert restored.restore_file(out, seq=0) == PROMPT
    restored.save_file(again := tmp_path / "again.bin", PROMPT, seq=0)
    n = 0
    for ours, theirs, before in zip(*(read(p).sections for p in (out, again, path)), strict=True):
        rows = [np.concatenate(list(state.rows_of(section))) for section in (ours, theirs, before)]
        np.testing.assert_array_equal(rows[0], rows[1])
        exact = WHAT[ours.model.what] == "exact values"
        n += exact and not np.array_equal(rows[0], rows[2])
        assert exact or np.array_equal(rows[0], rows[2])
    assert n > 0
    assert kld(saved.decode(PROMPT[:20], N), restored.decode(PROMPT[:20], N)) <= 1e-3
