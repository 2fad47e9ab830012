"""Saved states in Python. Failures caught: a container that does not come back as written, damage that is taken or
reported as another block's, a tool that leaves half a file or its reason unsaid."""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import states
from hypothesis import given, settings
from hypothesis import strategies as st
from kvtc_gguf import eight_bits, state, state_file
from kvtc_gguf.layout import FormatError
from kvtc_gguf.state_file import PLAIN, Record, Section, container_bytes, parse, read_container
from typer.testing import CliRunner

WHOLE = states.sequence_file()
HEAD = 12 + 4 * 5  # before the container
SECTIONS = [item for item in states.items() if isinstance(item, Section)]


def run(*arguments: object):
    return CliRunner().invoke(state.app, [str(a) for a in arguments])


def test_containers_come_back_as_written():
    parsed = parse(states.sequence_file(containers=2) + b"recurrent")
    assert (parsed.kind, parsed.tokens, parsed.after) == ("sequence", 5, b"recurrent")
    assert parsed.containers == [states.items()] * 2
    assert parsed.to_bytes() == states.sequence_file(containers=2) + b"recurrent"
    context = b"nsgg" + struct.pack("<III", 9, 1, 7) + struct.pack("<I", 5) + b"llama" + WHOLE[HEAD:]
    assert parse(context).kind == "context" and parse(context).containers == [states.items()]
    data = struct.pack("<Ii", 0xAF143CD8, 0) + WHOLE[HEAD:]
    assert parse(data).kind == "sequence data" and parse(data).to_bytes() == data


@settings(max_examples=150, deadline=None)
@given(st.integers(HEAD, len(WHOLE) - 1), st.integers(1, 255))
def test_flipped_byte_is_refused(at, change):
    damaged = bytearray(WHOLE)
    damaged[at] ^= change
    with pytest.raises(FormatError, match="the state "):
        parse(bytes(damaged))


@pytest.mark.parametrize("cut", [HEAD - 1, HEAD, HEAD + 9, len(WHOLE) // 2, len(WHOLE) - 1])
def test_torn_file_is_refused(cut):
    with pytest.raises(FormatError, match="the state is damaged|not saved from a kvtc cache"):
        parse(WHOLE[:cut])


def test_refusal_names_the_block():
    items = states.items()
    at = len(container_bytes(items[:2])) - state_file.FIELDS.size  # of what follows the exact rows
    model, first = items[2].model, items[2].blocks[0]
    data = bytearray(container_bytes(items))
    data[at + state_file.FIELDS.size + len(model.data) + state_file.FIELDS.size] ^= 1
    assert first.name == "layer 0 keys, rows 0 to 15"
    with pytest.raises(FormatError, match="damaged: layer 0 keys, rows 0 to 15$"):
        read_container(bytes(data))


def test_blocks_that_are_missing_or_moved_are_refused():
    keys, values = states.section(40, seed=2), states.section(40, what=1, seed=3)
    for broken in (
        Section(keys.model, keys.blocks[1:]),
        Section(keys.model, keys.blocks[::-1]),
        Section(keys.model, [values.blocks[0]]),
    ):
        with pytest.raises(FormatError, match="belong elsewhere"):
            read_container(container_bytes([broken]))
    data = container_bytes([Record(PLAIN, data=b"a"), Record(PLAIN, data=b"b")])
    size = state_file.FIELDS.size + 1
    for changed in (data[: 8 + size] + data[8 + 2 * size :], data[:8] + data[8 + size :]):
        with pytest.raises(FormatError, match="blocks are missing"):
            read_container(changed)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_forged_checksums_do_not_help(data):
    """A record's fields changed and its checksums made to fit: there is an answer or a FormatError."""
    items = states.items()
    at = data.draw(st.sampled_from([i for i, item in enumerate(items) if isinstance(item, Section)]))
    records = [items[at].model, *items[at].blocks]
    i = data.draw(st.integers(0, len(records) - 1))
    raw = bytearray(records[i].data)
    if raw:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    n_rows = data.draw(st.sampled_from((records[i].n_rows, 0, 1, 65535, 65536, 2**32 - 1)))
    records[i] = replace(records[i], data=bytes(raw), n_rows=n_rows, coder=data.draw(st.integers(0, 3)))
    items[at] = Section(records[0], records[1:])
    with contextlib.suppress(FormatError):
        for section in parse(states.sequence_file()[:HEAD] + container_bytes(items)).sections:
            assert section.row_bytes() >= 0


def test_checksums_are_zlibs():
    record = SECTIONS[0].blocks[0]
    raw = container_bytes([SECTIONS[0]])
    at = raw.index(record.data)
    assert struct.unpack("<I", raw[at - 8 : at - 4])[0] == zlib.crc32(record.data)
    assert struct.unpack("<I", raw[at - 4 : at])[0] == zlib.crc32(raw[at - 28 : at - 4])


def test_info_tells_what_is_there(tmp_path):
    path = tmp_path / "slot.bin"
    path.write_bytes(WHOLE)
    report = json.loads(run("info", "--json", path).stdout)
    assert (report["tokens"], report["size"], report["caches"]) == (5, len(WHOLE), 1)
    assert [s["n_rows"] for s in report["sections"]] == [9, 40, 40, 40, 7]
    assert report["rows_size"] == 9 * 8 + 40 * 7 + 40 * 7 + 40 * 6 + 7 * 8
    assert "values" in run("info", path).stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (WHOLE[:-1], "it ends after"),
        (b"", "damaged"),
        (b"GGUF" + bytes(50), "damaged"),
        (WHOLE[: HEAD + 4] + b"\1" + WHOLE[HEAD + 5 :], "of version 1, this program reads version 2"),
    ],
    ids=["torn", "empty", "foreign", "old"],
)
def test_tools_refuse_in_one_line(tmp_path, content, words):
    path, out = tmp_path / "slot.bin", tmp_path / "out.bin"
    path.write_bytes(content)
    for arguments in (("info", path), ("verify", path), ("convert", path, out)):
        result = run(*arguments)
        assert result.exit_code == 1 and words in result.stderr and result.stderr.count("\n") == 1
        assert str(path) in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["slot.bin"]
    assert "No such file" in run("info", tmp_path / "none").stderr


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 70), st.floats(-20, 12), st.integers(0, 2**32 - 1))
def test_eight_bits_are_within_half_a_step(n, d, scale, seed):
    rows = (np.random.default_rng(seed).standard_normal((n, d)) * 2.0**scale).astype("<f2")
    narrow = eight_bits.narrow(rows.view(np.uint8))
    again = eight_bits.widen(narrow).view("<f2").astype(np.float64)
    step = narrow[:, :2].copy().view("<f2").astype(np.float64)
    exact = rows.astype(np.float64)
    assert narrow.shape == (n, 2 + d)
    # half a step, what rounding the step took from 127 of them, and the result's own rounding
    assert (np.abs(again - exact) <= step / 2 + 127 * step / 2048 + np.abs(exact) / 2048 + 2.0**-24 * 128).all()


def test_eight_bits_of_no_number_are_refused():
    rows = np.array([[1.0, np.inf]], "<f2").view(np.uint8)
    with pytest.raises(ValueError, match="not finite"):
        eight_bits.narrow(rows)
    assert not eight_bits.widen(eight_bits.narrow(np.zeros((2, 6), np.uint8))).any()
