"""Containers of made-up rows, as a kvtc cache would save them: for the tests of both their readers."""

from __future__ import annotations

import random
import struct

import numpy as np
import row_models
from kvtc_gguf import eight_bits
from kvtc_gguf.reference_rows import CODE, HALF, MAX_TABLES, Run
from kvtc_gguf.state_file import BLOCK, EIGHT, MODEL, PLAIN, RANS, STORED, Item, Record, Section, container_bytes

RUNS = [Run(8, CODE, 1), Run(4, CODE, 8), Run(2, CODE, 8)]


def section(
    n_rows: int,
    layer: int = 0,
    what: int = 0,
    head: int = 0,
    seed: int = 0,
    block: int = 16,
    eight: bool = False,
    most_tables: int = MAX_TABLES,
) -> Section:
    """Rows of a small cache in blocks of `block`; exact rows are f16, or in 8 bits."""
    runs = eight_bits.runs(4) if eight else RUNS if what < 2 else [Run(16, HALF, 4)]
    model = row_models.model(runs, seed, most_tables)
    rows = row_models.rows(model, n_rows, seed)
    place = {"what": what, "layer": layer, "head": head}
    blocks = [
        Record(BLOCK, RANS, first=i, n_rows=len(part), data=model.encode(part) or b"", **place)
        for i in range(0, n_rows, block)
        for part in [rows[i : i + block]]
    ]
    return Section(Record(MODEL, EIGHT if eight else RANS, data=model.to_bytes(), **place), blocks)


def stored(n_rows: int, row_bytes: int, **place: int) -> Section:
    """Rows that nothing codes, as those of a q8_0 side."""
    rows = np.random.default_rng(n_rows).integers(0, 256, (n_rows, row_bytes)).astype(np.uint8)
    model = Record(MODEL, STORED, data=struct.pack("<I", row_bytes), **place)
    return Section(model, [Record(BLOCK, STORED, n_rows=n_rows, data=rows.tobytes(), **place)])


def items() -> list[Item]:
    return [
        Record(PLAIN, data=b"positions of the cells"),
        section(9, what=2, seed=1),
        section(40, seed=2),
        Record(PLAIN, data=b"type and row size"),
        section(40, layer=1, what=1, seed=3),
        stored(40, 6, layer=2, what=1),
        section(7, layer=2, what=3, head=1, seed=4, eight=True),
    ]


def sequence_file(tokens: int = 5, containers: int = 1) -> bytes:
    """A file as `llama_state_seq_save_file` writes it."""
    head = b"qsgg" + struct.pack("<II", 2, tokens) + bytes(4 * tokens)
    return head + container_bytes(items()) * containers


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, a piece cut out, or one put elsewhere."""
    out = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(out)), rng.randint(1, 40)
        piece = out[at : at + size]
        match rng.randrange(4):
            case 0:
                out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 1:
                del out[at : at + size]
            case 2:
                out[at:at] = piece
            case 3:
                out[at : at + len(piece)] = bytes(rng.randrange(256) for _ in piece)
        if not out:
            break
    return bytes(out)
