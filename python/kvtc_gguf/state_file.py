"""Saved states as files: what llama.cpp puts around the containers of kvtc caches, and their records.

The layout is stated in `ggml_kvtc/README.md`, "Stored states"; the other reader is
`ggml_kvtc/llama/llama-kvtc-container.cpp`. Everything is checked before it is used, and nothing is allocated that
the file's own size does not cover.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvtc_gguf import eight_bits
from kvtc_gguf.layout import FormatError
from kvtc_gguf.reference_rows import RowModel

MAGIC, VERSION = b"kvts", 2
PLAIN, MODEL, BLOCK, END = 1, 2, 3, 4  # kinds of records
STORED, RANS, EIGHT = 0, 1, 2  # coders; EIGHT: the model of exact rows that are kept in 8 bits
WHAT = ("keys", "values", "exact keys", "exact values")
MAX_BYTES = 1 << 24  # of a record, and of the rows of a block
MAX_ROWS = 1 << 16  # of a block

SEQUENCE, SESSION = b"qsgg", b"nsgg"  # llama.cpp's files: a sequence, a whole context
SEQUENCE_DATA = struct.pack("<I", 0xAF143CD8)  # llama_state_seq_get_data
FIELDS = struct.Struct("<BBBBHHIIIII")  # a record's, all but its own checksum


@dataclass(frozen=True)
class Record:
    """One record; `data` are the bytes that follow it."""

    kind: int
    coder: int = STORED
    what: int = 0
    layer: int = 0
    head: int = 0
    first: int = 0
    n_rows: int = 0
    data: bytes = b""
    end_crc: int = 0  # of the end record alone

    @property
    def fields(self) -> bytes:
        crc = self.end_crc if self.kind == END else zlib.crc32(self.data)
        place = (self.what, 0, self.layer, self.head, self.first, self.n_rows)
        return FIELDS.pack(self.kind, self.coder, *place, len(self.data), crc, 0)[:-4]

    @property
    def crc(self) -> bytes:
        return struct.pack("<I", zlib.crc32(self.fields))

    @property
    def place(self) -> tuple[int, int, int]:
        return self.what, self.layer, self.head

    @property
    def name(self) -> str:
        """As the C++ reader names it in its refusals."""
        if self.kind in (PLAIN, END):
            return "what goes with the cells" if self.kind == PLAIN else "the end"
        name = f"layer {self.layer} {WHAT[self.what]}" + (f" of head {self.head}" if self.what > 1 else "")
        if self.kind == MODEL:
            return f"{name}, the model"
        return f"{name}, rows {self.first} to {self.first + self.n_rows - 1}"


@dataclass
class Section:
    """The rows of one side of a layer, or the exact rows of one of its heads."""

    model: Record
    blocks: list[Record] = field(default_factory=list)

    @property
    def n_rows(self) -> int:
        return sum(block.n_rows for block in self.blocks)

    @property
    def size(self) -> int:
        """Bytes in the file, records included."""
        return sum(FIELDS.size + len(record.data) for record in (self.model, *self.blocks))

    def row_model(self) -> RowModel | None:
        """None where rows are stored as they are. Raises FormatError if the record holds no model."""
        try:
            return RowModel.from_bytes(self.model.data) if self.model.coder != STORED else None
        except FormatError as error:
            raise FormatError(f"the state is damaged: {self.model.name}: {error}") from None

    def block_row_bytes(self) -> int:
        """Bytes of a row in the blocks. Raises FormatError as `row_model`."""
        model = self.row_model()
        size = int.from_bytes(self.model.data, "little") if model is None else model.row_bytes
        if (model is None and len(self.model.data) != 4) or (self.model.coder == EIGHT and size <= eight_bits.STEP):
            raise FormatError(f"the state is damaged: {self.model.name}")
        return size

    def row_bytes(self) -> int:
        """Bytes of a row in the cache. Raises FormatError as `row_model`."""
        size = self.block_row_bytes()
        return 2 * (size - eight_bits.STEP) if self.model.coder == EIGHT else size


Item = Section | Record  # a record: plain bytes


@dataclass
class StateFile:
    """A state: the containers of its caches (sliding layers have their own), and what llama.cpp writes around them."""

    kind: str  # "sequence", "context", "sequence data", "context data"
    tokens: int  # saved with it; 0 where only data are
    before: bytes
    containers: list[list[Item]]
    after: bytes  # recurrent layers, say

    @property
    def sections(self) -> list[Section]:
        return [item for container in self.containers for item in container if isinstance(item, Section)]

    def to_bytes(self) -> bytes:
        return self.before + b"".join(map(container_bytes, self.containers)) + self.after


def container_bytes(items: list[Item]) -> bytes:
    """A container of these items."""
    parts, crc, n = [MAGIC + struct.pack("<I", VERSION)], 0, 0
    for item in items:
        for record in (item.model, *item.blocks) if isinstance(item, Section) else (item,):
            parts += [record.fields, record.crc, record.data]
            crc, n = zlib.crc32(record.crc, crc), n + 1
    end = Record(END, n_rows=n, end_crc=crc)
    return b"".join([*parts, end.fields, end.crc])


def read_container(data: bytes, at: int = 0) -> tuple[list[Item], int]:
    """(items of the container at `at`, where it ends). Raises FormatError with the block that is damaged."""
    if data[at : at + 4] != MAGIC:
        raise FormatError("the state was not saved from a kvtc cache, or it is damaged")
    version = int.from_bytes(data[at + 4 : at + 8], "little")
    if version != VERSION:
        raise FormatError(f"the state is of version {version}, this program reads version {VERSION}")
    items: list[Item] = []
    at, after, crc, n = at + 8, "the head", 0, 0
    while True:
        if len(data) - at < FIELDS.size:
            raise FormatError(f"the state is damaged: it ends after {after}")
        kind, coder, what, zero, layer, head, first, n_rows, size, data_crc, own = FIELDS.unpack_from(data, at)
        record = Record(kind, coder, what, layer, head, first, n_rows)
        if own != zlib.crc32(data[at : at + FIELDS.size - 4]) or zero or not _in_range(record, size):
            raise FormatError(f"the state is damaged: the block after {after}")
        at += FIELDS.size
        if kind == END:
            if n_rows != n or data_crc != crc:
                raise FormatError("the state is damaged: blocks are missing or in another order")
            return items, at
        after = record.name
        record = replace(record, data=data[at : at + size])
        if len(record.data) < size:
            raise FormatError(f"the state is damaged: it ends in {after}")
        if zlib.crc32(record.data) != data_crc:
            raise FormatError(f"the state is damaged: {after}")
        at, n, crc = at + size, n + 1, zlib.crc32(struct.pack("<I", own), crc)
        if kind != BLOCK:
            items.append(record if kind == PLAIN else Section(record))
            continue
        section = items[-1] if items else None
        if not isinstance(section, Section) or section.model.place != record.place or first != section.n_rows:
            raise FormatError(f"the state is damaged: {after} belong elsewhere")
        section.blocks.append(record)


def _in_range(record: Record, size: int) -> bool:
    if size > MAX_BYTES or record.coder > EIGHT or record.what >= len(WHAT):
        return False
    if record.coder == EIGHT and (record.kind != MODEL or record.what < 2):
        return False
    if record.kind in (PLAIN, MODEL):
        return record.n_rows == record.first == 0
    if record.kind == BLOCK:
        return 0 < record.n_rows <= MAX_ROWS and record.first + record.n_rows < 1 << 32
    return record.kind == END and size == 0


def parse(data: bytes) -> StateFile:
    """The state that `data` hold. Raises FormatError if it is damaged, or of a cache without kvtc types."""
    kind, tokens, at = "context data", 0, 0
    if data[:4] in (SEQUENCE, SESSION):
        kind = "sequence" if data[:4] == SEQUENCE else "context"
        tokens = int.from_bytes(data[8:12], "little")
        at = 12 + 4 * tokens
    elif data[:4] == SEQUENCE_DATA:
        kind, at = "sequence data", 8
    if kind.startswith("context"):
        at += 4 + int.from_bytes(data[at : at + 4], "little")  # the architecture's name
    if at > len(data):
        raise FormatError("the state is damaged: it ends in its head")
    before, containers = data[:at], []
    while not containers or data[at : at + 4] == MAGIC:
        items, at = read_container(data, at)
        containers.append(items)
    return StateFile(kind, tokens, before, containers, data[at:])


def read(path: Path) -> StateFile:
    """The state in a file. Raises FormatError, which names the file, or OSError."""
    try:
        return parse(path.read_bytes())
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
