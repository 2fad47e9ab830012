"""A copy of a quantised GGUF with f32 weights: the same function, computed without 8-bit activations.

On the CPU a product with quantised weights rounds its activations to 8 bits. Any change of the attention, however
small, flips some of these roundings: two exact attentions that only add in another order differ by a KLD of 0.0035 on
SmolLM2 Q4_1 (f16 cache, `-fa on` against `-fa off`). On an f32 copy the same pair differs by 1e-6, so that what a
cache type loses can be told from what rounding does. ``python -m bench.float_copy model.gguf copy.gguf``
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import typer
from gguf import quants
from kvtc_gguf.gguf_io import Reader, Writer, replacing


def float_copy(source: Path, target: Path) -> None:
    """Write `source` with every tensor as f32 to `target`, whole or not at all; metadata stays."""
    reader = Reader(source)
    with replacing(target) as temporary:
        writer = Writer(temporary)
        for key, field in reader.fields.items():
            if not key.startswith("GGUF.") and key != "general.file_type":
                writer.add_key_value(key, reader.raw(key), field.types[0])
        writer.finish(
            [(t.name, quants.dequantize(t.data, t.tensor_type).astype(np.float32), None) for t in reader.tensors]
        )


if __name__ == "__main__":
    typer.run(float_copy)
