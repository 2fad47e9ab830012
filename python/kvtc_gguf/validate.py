"""Checks of a calibration. They trust nothing: what passes can be encoded, decoded and indexed without further care."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from kvtc_gguf.layout import (
    BUDGETS,
    GROUP,
    MAX_HEAD_DIM,
    WIDTHS,
    FormatError,
    codebook_keys,
    payload_bytes,
    row_bytes,
)

if TYPE_CHECKING:
    from kvtc_gguf.format import Calibration, SideCalibration

# worst entry of encode @ decode - 1 that still counts as an inverse; f16 decode matrices of real models stay below 1e-9
INVERSE_TOLERANCE = 1e-3
MAX_HEADS = 4096
MAX_BLOCKS = 65536
MIN_GAIN_BASE, MAX_GAIN_BASE = 1e-30, 1e30  # no gain within 8 octaves of the base leaves f32
MAX_TENSOR_NAME = 63  # ggml's GGML_MAX_NAME less the terminator


def check_array(name: str, array: np.ndarray, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    """Raise FormatError unless `array` has this dtype and shape and every value is finite."""
    wanted = f"{np.dtype(dtype).name} {list(shape)}"
    if not isinstance(array, np.ndarray):
        raise FormatError(f"{name} is a {type(array).__name__}, not an array {wanted}")
    if array.dtype != dtype or array.shape != shape:
        raise FormatError(f"{name} is {array.dtype.name} {list(array.shape)}, not {wanted}")
    check_finite(name, array)


def check_finite(name: str, array: np.ndarray) -> None:
    """Raise FormatError if a floating point array holds NaN or infinity."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise FormatError(f"{name} holds values that are not finite")


def check_shape(n_head: int, head_dim: int) -> None:
    """Raise FormatError unless these are sizes a cache can have."""
    if not 1 <= n_head <= MAX_HEADS:
        raise FormatError(f"{n_head} kv heads: must be 1 to {MAX_HEADS}")
    if not GROUP <= head_dim <= MAX_HEAD_DIM or head_dim % GROUP:
        raise FormatError(f"head_dim {head_dim}: must be a multiple of {GROUP} up to {MAX_HEAD_DIM}")


def check_bits(bits: list[int]) -> None:
    """Raise FormatError unless the budgets are some of 1 ... 6, rising."""
    if not bits or any(b not in BUDGETS for b in bits) or sorted(set(bits)) != list(bits):
        raise FormatError(f"bits {list(bits)[:16]}: must be rising and out of {list(BUDGETS)}")


def check_widths(widths: np.ndarray, n_head: int, head_dim: int, bits: list[int]) -> None:
    """Raise FormatError unless widths [H, B, G] are allowed, never rise along groups, and fit each budget's row."""
    check_array("widths", widths, np.int8, (n_head, len(bits), head_dim // GROUP))
    strange = np.setdiff1d(widths, WIDTHS)
    if strange.size:
        raise FormatError(f"widths: {int(strange[0])} is none of {list(WIDTHS)}")
    if (np.diff(widths, axis=2) > 0).any():
        raise FormatError("widths rise along the groups of a head")
    for i, b in enumerate(bits):
        used, row = payload_bytes(widths[:, i]), row_bytes(n_head, head_dim, b)
        if used > row:
            raise FormatError(f"widths: the heads take {used} bytes where a kvtc{b} row has {row}")


def inverse(decode: np.ndarray) -> np.ndarray:
    """Encode matrices f32 [H, d, d]: the inverses of decode matrices [H, d, d], taken in f64.

    Raises FormatError if one has no inverse that f32 can hold.
    """
    matrices = decode.astype(np.float64)
    with np.errstate(all="ignore"):
        try:
            encode = np.linalg.inv(matrices).astype(np.float32)
        except np.linalg.LinAlgError as error:
            raise FormatError("decode has no inverse") from error
        off = np.abs(encode.astype(np.float64) @ matrices - np.eye(decode.shape[-1])).max(initial=0.0)
    if not off <= INVERSE_TOLERANCE:
        raise FormatError("decode has no usable inverse")
    return encode


def check_side(side: SideCalibration, bits: list[int]) -> None:
    """Raise FormatError unless everything about one layer's K or V holds together."""
    if not isinstance(side.mean, np.ndarray) or side.mean.ndim != 2:
        raise FormatError("mean is not an array [H, d]")
    n_head, head_dim = side.mean.shape
    check_shape(n_head, head_dim)
    check_array("mean", side.mean, np.float32, (n_head, head_dim))
    check_array("scale", side.scale, np.float32, (n_head, head_dim))
    check_array("gain base", side.gain_base, np.float32, (n_head,))
    check_array("gain rule", side.gain_rule, np.int32, (n_head,))
    check_array("decode", side.decode, np.float16, (n_head, head_dim, head_dim))
    if not (side.scale > 0).all():
        raise FormatError("scale is not above 0 everywhere")
    if not ((side.gain_base > MIN_GAIN_BASE) & (side.gain_base < MAX_GAIN_BASE)).all():
        raise FormatError(f"gain base is not above 0, between {MIN_GAIN_BASE:g} and {MAX_GAIN_BASE:g}")
    if not np.isin(side.gain_rule, (0, 1)).all():
        raise FormatError("gain rule is neither 0 nor 1")
    check_widths(side.widths, n_head, head_dim, bits)
    inverse(side.decode)
    keys = codebook_keys(side.widths)
    if set(side.codebooks) != set(keys):
        wrong = sorted(set(side.codebooks) ^ set(keys))[0]
        state = "missing" if wrong in keys else "not asked for by any budget"
        raise FormatError(f"codebook of head {wrong[0]}, group {wrong[1]}, width {wrong[2]} is {state}")
    for key in keys:
        name = f"codebook of head {key[0]}, group {key[1]}, width {key[2]}"
        check_array(name, side.codebooks[key], np.float16, (GROUP, 1 << key[2]))
        # equal neighbours are the codebook of a component that does not vary, or two levels that f16 cannot tell apart
        if (np.diff(side.codebooks[key].astype(np.float32), axis=1) < 0).any():
            raise FormatError(f"{name}: levels fall")
    if len(side.transforms) != n_head:
        raise FormatError(f"transforms: {len(side.transforms)} names for {n_head} heads")


def check_layer_bits(name: str, table: list[list[int]], calibration: Calibration) -> None:
    """Raise FormatError unless `table` gives each layer with a cache one of the budgets, and other layers 0."""
    if name not in ("k", "v"):
        raise FormatError(f"layer_bits: {name!r} is no side")
    if [len(row) for row in table] != [calibration.block_count] * len(calibration.bits):
        raise FormatError(f"layer_bits.{name}: must have a row for each budget, with an entry for each layer")
    for asked, row in zip(calibration.bits, table, strict=True):
        for layer, bits in enumerate(row):
            if bits not in (calibration.bits if layer in calibration.layers else [0]):
                wanted = f"one of {calibration.bits}" if layer in calibration.layers else "0, it has no cache"
                raise FormatError(f"layer_bits.{name}: {bits} for layer {layer} at {asked} bits: must be {wanted}")


def check_calibration(calibration: Calibration) -> None:
    """Raise FormatError unless the calibration can be written and used."""
    if not re.fullmatch("[0-9a-f]{16}", calibration.fingerprint):
        raise FormatError(f"fingerprint {calibration.fingerprint[:40]!r}: must be 16 hex digits")
    if not 0 <= calibration.tokens < 2**32:
        raise FormatError(f"tokens {calibration.tokens}: must fit 32 bits")
    if not 1 <= calibration.block_count <= MAX_BLOCKS:
        raise FormatError(f"block count {calibration.block_count}: must be 1 to {MAX_BLOCKS}")
    check_bits(calibration.bits)
    if not calibration.layers:
        raise FormatError("no layers")
    for layer, sides in calibration.layers.items():
        if not 0 <= layer < calibration.block_count:
            raise FormatError(f"layer {layer}: the model has {calibration.block_count}")
        if set(sides) != {"k", "v"}:
            raise FormatError(f"layer {layer}: has sides {sorted(sides)}, not k and v")
        for name, side in sides.items():
            try:
                check_side(side, calibration.bits)
            except FormatError as error:
                raise FormatError(f"layer {layer} {name}: {error}") from error
    for name, table in calibration.layer_bits.items():
        check_layer_bits(name, table, calibration)
    for name, array in calibration.stats.items():
        if len(f"kvtc.stats.{name}") > MAX_TENSOR_NAME or not 1 <= array.ndim <= 4:
            raise FormatError(f"kvtc.stats.{name}: name too long for ggml, or not 1 to 4 dimensions")
        check_finite(f"kvtc.stats.{name}", array)
