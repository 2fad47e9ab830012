"""Numbers of format version 1 and the arithmetic of one cache row (`ggml_kvtc/README.md`, "One row")."""

from __future__ import annotations

import numpy as np

VERSION = 1
WIDTHS = (0, 1, 2, 3, 4, 5, 6, 8)  # bits a component may get
BUDGETS = (1, 2, 3, 4, 5, 6)  # bits per value of the cache types kvtc1 ... kvtc6
GROUP = 8  # components that share one width
GAIN_STEPS = 32  # gain = base * 2**(code / GAIN_STEPS); code 0 is the zero vector
GAIN_BYTES = 1
HEAD_ALIGN = 4  # a head's payload starts at a multiple of this
MAX_HEAD_DIM = 512
TURBO_BLOCKS = {2: (8, 2), 3: (8, 3), 4: (4, 2)}  # turbo<bits> -> (values, bytes) of ggml's block
NORM_BYTES = 2  # f16, behind the codes of a row of a turbo type, one for each head


class FormatError(ValueError):
    """A calibration or model file that cannot be used; the message is one line that says what is wrong."""


def row_bytes(n_head: int, head_dim: int, bits: int) -> int:
    """Bytes of one cache row: all `n_head` kv heads of one token at `bits` bits per value."""
    return n_head * head_dim * bits // 8


def turbo_row_bytes(n_head: int, head_dim: int, bits: int) -> int:
    """Bytes of one row of the cache type turbo<bits>: codes, a norm for each head, zeros to fill a block."""
    block = TURBO_BLOCKS[bits][1]
    return -(-n_head * (head_dim * bits // 8 + NORM_BYTES) // block) * block


def head_bytes(widths: np.ndarray) -> np.ndarray:
    """Payload bytes, unpadded, i64 [...], of heads with group widths [..., G]: 8 codes of w bits are w bytes."""
    return GAIN_BYTES + np.asarray(widths).astype(np.int64).sum(axis=-1)


def head_offsets(widths: np.ndarray) -> np.ndarray:
    """Byte offset of each head in the row, i64 [H], for widths [H, G] of one budget."""
    padded = -(-head_bytes(widths) // HEAD_ALIGN) * HEAD_ALIGN
    return np.cumsum(padded) - padded


def payload_bytes(widths: np.ndarray) -> int:
    """Bytes of a row that the heads take, for widths [H, G]: padded between heads, not after the last."""
    return int(head_offsets(widths)[-1] + head_bytes(widths)[-1])


def codebook_keys(widths: np.ndarray) -> list[tuple[int, int, int]]:
    """(head, group, width) of every codebook in file order, for widths [H, B, G]: heads, then groups, then widths."""
    n_head, _, n_group = widths.shape
    keys = []
    for head in range(n_head):
        for group in range(n_group):
            keys += [(head, group, int(width)) for width in np.unique(widths[head, :, group]) if width > 0]
    return keys


def split_codebooks(widths: np.ndarray, levels: np.ndarray) -> dict[tuple[int, int, int], np.ndarray]:
    """The codebooks, f16 [8, 2**width] by (head, group, width), in the flat `levels` of a file.

    Raises FormatError when their number is not the one that widths [H, B, G] ask for.
    """
    keys = codebook_keys(widths)
    wanted = sum(GROUP << width for _, _, width in keys)
    if levels.shape != (wanted,):
        raise FormatError(f"codebook: {levels.size} levels where the widths ask for {wanted}")
    books, start = {}, 0
    for key in keys:
        size = GROUP << key[2]
        books[key] = levels[start : start + size].reshape(GROUP, -1)
        start += size
    return books


def join_codebooks(widths: np.ndarray, books: dict[tuple[int, int, int], np.ndarray]) -> np.ndarray:
    """The flat f16 array that `split_codebooks` takes apart."""
    parts = [books[key].reshape(-1) for key in codebook_keys(widths)]
    return np.concatenate(parts) if parts else np.zeros(0, np.float16)
