"""What attention reads back from a cache, and attention itself: by the library, or by its numpy twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from kvtc_gguf import native, reference
from kvtc_gguf.capture import LayerSample
from kvtc_gguf.format import SIDES, Calibration
from kvtc_gguf.reference_attention import CodedCells, attention, span_mask
from kvtc_gguf.reference_rope import Turns
from kvtc_gguf.score import SINKS, WINDOW

Say = Callable[[str], object]  # takes one line for the user
ALL = 2**31 - 1  # tokens that a query looks back


class Coder(Protocol):
    """Codes vectors of the layers of one calibration."""

    def coded(self, layer: int, side: str, x: np.ndarray, bits: int) -> np.ndarray:
        """x f32 [T, H, d] after coding. side: "k" (before RoPE) or "v"; bits: those that the layer keeps."""
        ...

    def attend(
        self, sample: LayerSample, rows: np.ndarray, bits: tuple[int, int], turns: Turns, softcap: float
    ) -> np.ndarray:
        """Output [R, n_head, d_v] of the queries `rows` i64 [R] over a cache of the sample, sinks and window exact.

        bits: those that the layer keeps of K and V. turns: the model's RoPE. softcap 0: none.
        """
        ...


def open_coder(source: Path, calibration: Calibration, say: Say) -> Coder:
    """The coder of a calibration that was read from `source`: the library's, or numpy's where there is none.

    say: is given one line in the latter case. Raises NativeError if the library refuses the file.
    """
    try:
        library = native.load()
    except native.NativeError as error:
        say(f"kvtc: note: codes are numpy's, slower ones: {error}")
        return NumpyCoder(calibration)
    return NativeCoder(calibration, native.Calibration(source, library))


@dataclass(frozen=True)
class NativeCoder:
    """The C encoder and decoder, which a cache runs. `opened` is the file that `calibration` was read from."""

    calibration: Calibration
    opened: native.Calibration

    def coded(self, layer: int, side: str, x: np.ndarray, bits: int) -> np.ndarray:
        which = SIDES.index(side)
        pack = self.opened.pack(layer, *((bits, 0) if which == native.K else (0, bits)))
        z = pack.decode(which, pack.encode(which, self.opened.transform(layer, which, x)))
        return reference.reconstruct(self.calibration.layers[layer][side], z)

    def attend(
        self, sample: LayerSample, rows: np.ndarray, bits: tuple[int, int], turns: Turns, softcap: float
    ) -> np.ndarray:
        pack = self.opened.pack(sample.layer, *bits)
        pack.set_rope(turns)
        z = [self.opened.transform(sample.layer, n, x) for n, x in enumerate((sample.k, sample.v))]
        return native.attend(
            pack,
            sample.q_rope[rows],
            *(pack.encode(n, z[n]) for n in (native.K, native.V)),
            query_positions=rows,
            cell_positions=np.arange(len(sample.k)),
            scale=1.0,  # the sample's queries have it
            exact=(z[0], z[1]),
            sinks=SINKS,
            window=WINDOW,
            span=sample.window or ALL,
            softcap=softcap,
        )


@dataclass(frozen=True)
class NumpyCoder:
    """The twin."""

    calibration: Calibration

    def coded(self, layer: int, side: str, x: np.ndarray, bits: int) -> np.ndarray:
        own, budget = self.calibration.layers[layer][side], self.calibration.bits.index(bits)
        rows = reference.encode_rows(own, budget, reference.transform(own, x), bits)
        return reference.reconstruct(own, reference.decode_rows(own, budget, rows))

    def attend(
        self, sample: LayerSample, rows: np.ndarray, bits: tuple[int, int], turns: Turns, softcap: float
    ) -> np.ndarray:
        tokens, sides = np.arange(len(sample.k)), []
        for side, x, kept in zip(SIDES, (sample.k, sample.v), bits, strict=True):
            own, budget = self.calibration.layers[sample.layer][side], self.calibration.bits.index(kept)
            z = reference.transform(own, x)
            coded = reference.encode_rows(own, budget, z, kept)
            sides.append(CodedCells.of_rows(own, budget, coded, z.astype(np.float16), np.ones(len(tokens), bool)))
        mask = span_mask(rows, tokens, sample.window or ALL)
        return attention(
            sample.q_rope[rows],
            sides[0],
            sides[1],
            scale=1.0,
            rope=turns,
            sinks=SINKS,
            window=WINDOW,
            softcap=softcap,
            query_positions=rows,
            cell_positions=tokens,
            mask=mask,
        )


def library_check(calibration: Calibration, say: Say) -> Callable[[Path], None]:
    """A check of files that this calibration was written to: the C loader takes them, every layer at every budget.

    It raises NativeError with the loader's line. Where there is no library it checks nothing, and `say` gets one line.
    """
    try:
        library = native.load()
    except native.NativeError as error:
        say(f"kvtc: note: llama.cpp's own check of the calibration is left out: {error}")
        return lambda path: None

    def check(path: Path) -> None:
        opened = native.Calibration(path, library)
        for layer in calibration.layers:
            for bits in calibration.bits:
                opened.pack(layer, bits, bits)

    return check
