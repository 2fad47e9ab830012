"""A model whose keys have large channels, without another function: ``python -m bench.stress model.gguf stress.gguf``.

Rows of the key projection are scaled by powers of two up to 64, by RoPE pair and kv head at random, and the rows of the
query projections that read them by the inverse. Logits of an f16 cache stay what they were, to the last bit where the
weights are f32 (`bench.float_copy`). Models with large key channels exist (Qwen2.5); what spends its levels on a row's
largest channel loses the others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import typer
from gguf import GGUFValueType
from kvtc_gguf.capture import rope_pairs
from kvtc_gguf.gguf_io import Reader, Writer, replacing

OCTAVES = 6  # the largest scale is 2**OCTAVES
INTERLEAVED = ("llama",)  # architectures whose pairs are neighbours (2i, 2i + 1); others: (i, i + d / 2)


def stress_copy(source: Path, target: Path, seed: int = 0) -> None:
    """Write the stressed copy of an f32 model, whole or not at all.

    Raises ValueError for a model whose projections are not f32, or whose queries and keys are normed after them.
    """
    reader = Reader(source)
    architecture = reader.value("general.architecture", GGUFValueType.STRING)

    def number(key: str) -> int:
        return int(reader.value(f"{architecture}.{key}", GGUFValueType.UINT32) or 0)

    heads, rotated = number("attention.head_count"), number("rope.dimension_count")
    kv = number("attention.head_count_kv") or heads
    tensors = {t.name: t for t in reader.tensors}
    if any(".attn_k_norm" in name or ".attn_q_norm" in name for name in tensors):
        raise ValueError(f"{source}: norms queries and keys, which undoes any scale")
    rng = np.random.default_rng(seed)
    scaled: dict[str, np.ndarray] = {}
    for name in [n for n in tensors if n.endswith(".attn_k.weight")]:
        query = name.replace("attn_k", "attn_q")
        if {tensors[n].tensor_type.name for n in (name, query)} != {"F32"}:
            raise ValueError(f"{source}: {name} is not f32: make a copy by bench.float_copy first")
        head_dim = len(tensors[name].data) // kv
        pairs = rope_pairs(head_dim, rotated or head_dim, architecture in INTERLEAVED)
        scale = np.ones((kv, head_dim), np.float32)
        scale[:, pairs] = 2.0 ** rng.integers(0, OCTAVES + 1, (kv, len(pairs), 1))
        scaled |= _scale(tensors, name, scale.reshape(-1))
        scaled |= _scale(tensors, query, 1 / scale.repeat(heads // kv, axis=0).reshape(-1))
    with replacing(target) as temporary:
        writer = Writer(temporary)
        for key, field in reader.fields.items():
            if not key.startswith("GGUF."):
                writer.add_key_value(key, reader.raw(key), field.types[0])
        rest = [t for t in reader.tensors if t.name not in scaled]
        kept = [(t.name, t.data, None if t.tensor_type.name in ("F32", "F16") else t.tensor_type) for t in rest]
        writer.finish(kept + [(name, data, None) for name, data in scaled.items()])


def _scale(tensors: dict, weight: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The projection of this name, and its bias where there is one, with rows scaled."""
    bias = weight.replace(".weight", ".bias")
    out = {weight: tensors[weight].data * rows[:, None]}
    return out | ({bias: tensors[bias].data * rows} if bias in tensors else {})


if __name__ == "__main__":
    typer.run(stress_copy)
