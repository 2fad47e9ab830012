"""Saved states of kvtc caches: `python -m kvtc_gguf.state info|verify|convert FILE`.

Files that llama-server's slots, `llama_state_seq_save_file` or `llama_state_save_file` wrote, or what
`llama_state_seq_get_data` gave.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from kvtc_gguf import eight_bits
from kvtc_gguf.console import one_line_errors
from kvtc_gguf.layout import FormatError
from kvtc_gguf.native.rows import RowCodec
from kvtc_gguf.state_file import EIGHT, MODEL, RANS, STORED, WHAT, Record, Section, StateFile, read

app = typer.Typer(add_completion=False, help=__doc__)
StatePath = Annotated[Path, typer.Argument(metavar="FILE", help="a saved state")]


class Coder(str, Enum):
    """How rows are kept."""

    rans = "rans"
    stored = "stored"


class Exact(str, Enum):
    """How exact values are kept."""

    kept = "kept"
    eight = "8"


def describe(state: StateFile) -> dict[str, Any]:
    """Everything `info` knows, as JSON types. Sizes in bytes; `rows_size`: of the rows when nothing codes them."""
    sections = [
        {
            "layer": section.model.layer,
            "rows": WHAT[section.model.what],
            "head": section.model.head,
            "n_rows": section.n_rows,
            "row_size": section.row_bytes(),
            "blocks": len(section.blocks),
            "eight_bits": section.model.coder == EIGHT,
            "coded_blocks": sum(block.coder == RANS for block in section.blocks),
            "size": section.size,
        }
        for section in state.sections
    ]
    return {
        "kind": state.kind,
        "tokens": state.tokens,
        "size": len(state.to_bytes()),
        "size_outside": len(state.before) + len(state.after),
        "caches": len(state.containers),
        "rows_size": sum(s["n_rows"] * s["row_size"] for s in sections),
        "sections": sections,
    }


def rows_of(section: Section) -> Iterator[np.ndarray]:
    """The rows u8 [n, row_bytes] of each block of a section. Raises FormatError naming a block that does not."""
    wide = section.model.coder == EIGHT
    yield from (eight_bits.widen(rows) if wide else rows for rows in _block_rows(section))


def _block_rows(section: Section) -> Iterator[np.ndarray]:
    size, blocks = section.block_row_bytes(), section.blocks
    if section.model.coder == STORED:
        if any(block.coder == RANS for block in blocks):
            raise FormatError(f"the state is damaged: {section.model.name}")
        yield from (_stored(block, size) for block in blocks)
        return
    codec = RowCodec.read(section.model.data)
    for block in blocks:
        try:
            yield codec.decode(block.data, block.n_rows) if block.coder == RANS else _stored(block, size)
        except FormatError:
            raise FormatError(f"the state is damaged: {block.name}") from None


def _stored(block: Record, size: int) -> np.ndarray:
    if len(block.data) != block.n_rows * size:
        raise FormatError(f"the state is damaged: {block.name}")
    return np.frombuffer(block.data, np.uint8).reshape(block.n_rows, size)


def recode(section: Section, coder: Coder, eight: bool = False) -> Section:
    """The same rows, coded anew. Rows whose fields the section does not tell stay as they are.

    eight: exact values are kept in 8 bits from here on; keys are not, it would cost quality (`ggml_kvtc/README.md`).
    Raises FormatError where they hold NaN or infinity.
    """
    model, blocks = section.row_model(), list(_block_rows(section))
    if model is None:
        return section
    runs, kind = model.runs, section.model.coder
    if eight and kind != EIGHT and WHAT[section.model.what] == "exact values":
        try:
            blocks, runs, kind = [eight_bits.narrow(b) for b in blocks], eight_bits.runs(model.row_bytes // 2), EIGHT
        except ValueError as error:
            raise FormatError(f"{section.model.name}: {error}") from None
    codec = RowCodec.fit(runs, np.concatenate(blocks))  # also of rows then stored: it says what fields they have
    head = replace(section.model, kind=MODEL, coder=kind, data=codec.to_bytes())
    out = []
    for block, rows in zip(section.blocks, blocks, strict=True):
        data = codec.encode(rows) if coder is Coder.rans else None
        coded = data is not None and len(data) < rows.nbytes
        out.append(replace(block, coder=RANS if coded else STORED, data=data if coded else rows.tobytes()))
    return Section(head, out)


@app.command()
@one_line_errors()
def info(path: StatePath, as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Print what a state holds and what it takes."""
    state = read(path)
    report = describe(state)
    if as_json:
        print(json.dumps(report))
        return
    console = Console()
    console.print(f"{path}: {report['kind']}, {report['tokens']} tokens, {report['size']} bytes", highlight=False)
    table = Table("rows", "sections", "rows each", "bytes, uncoded", "bytes", "of uncoded", box=box.SIMPLE)
    for what in WHAT:
        own = [s for s in report["sections"] if s["rows"] == what]
        if own:
            uncoded, size = (sum(s["n_rows"] * s["row_size"] for s in own), sum(s["size"] for s in own))
            counts = sorted({s["n_rows"] for s in own})
            each = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
            table.add_row(what, str(len(own)), each, str(uncoded), str(size), f"{size / max(uncoded, 1):.3f}")
    console.print(table)


@app.command()
@one_line_errors()
def verify(path: StatePath) -> None:
    """Check every checksum and decode every block; name the block that fails."""
    state = read(path)
    n = 0
    for section in state.sections:
        try:
            n += sum(1 for _ in rows_of(section))
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
    print(f"{path}: {len(state.containers)} caches, {len(state.sections)} sections, {n} blocks, all as they were saved")


@app.command()
@one_line_errors()
def convert(
    path: StatePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the file to write")],
    coder: Annotated[Coder, typer.Option(help="how rows are kept in it")] = Coder.rans,
    exact: Annotated[
        Exact, typer.Option(help="how exact rows are kept: as they are, or in 8 bits, with loss")
    ] = Exact.kept,
) -> None:
    """Write the same state with its rows coded anew, or stored as they are."""
    state = read(path)
    try:
        containers = [
            [recode(item, coder, exact is Exact.eight) if isinstance(item, Section) else item for item in items]
            for items in state.containers
        ]
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    data = replace(state, containers=containers).to_bytes()
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    print(f"{out}: {len(data)} bytes, {len(state.to_bytes())} before")


if __name__ == "__main__":
    app()
