"""A copy of a quantised GGUF with f32 weights: the same function, computed without 8-bit activations.

On the CPU a product with quantised weights rounds its activations to 8 bits. Any change of the attention, however
small, flips some of these roundings: two exact attentions that only add in another order differ by a KLD of 0.0035 on
SmolLM2 Q4_1 (f16 cache, `-fa on` against `-fa off`). On an f32 copy the same pair differs by 1e-6, so that what a
cache type loses can be told from what rounding does. ``python -m bench.float_copy model.gguf copy.gguf``
"""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import typer


def float_copy(source: Path, target: Path) -> None:
    """Write `source` with every tensor as f32 to `target`, whole or not at all; metadata stays."""
    reader = gguf.GGUFReader(source)
    partial = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(partial, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, target)


if __name__ == "__main__":
    typer.run(float_copy)
