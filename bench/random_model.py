"""Models of known shapes with random weights, for speed: ``python -m bench.random_model llama-8b out.gguf``.

Q4_0 weights and, beside the model, a calibration with random bases whose widths fall along the components as those of
real models do. Right for timing and memory, meaningless for quality.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gguf
import numpy as np
import typer
from kvtc_gguf.fingerprint import fingerprint
from kvtc_gguf.format import Calibration, SideCalibration, write
from kvtc_gguf.layout import GROUP, WIDTHS, codebook_keys, payload_bytes, row_bytes

BITS = (1, 2, 3, 4, 5, 6)
# How far the log2 of the components' deviations goes up and down, and by which power of the distance from the middle.
# "real": the widths of SmolLM2 and gemma-3-270m (of keys' groups at two bits 27 and 28% have none and 13 and 9% more
# than four; of values' at four bits 19 and 5% have more). "even": fewer of both, as all figures up to 92f5959 have them
PROFILES = {"real": {"k": (3.6, 1.5), "v": (1.2, 2.0)}, "even": {"k": (2.2, 3.0), "v": (0.6, 3.0)}}
BLOCK, BLOCK_BYTES = 32, 18  # values and bytes of a block of Q4_0


@dataclass(frozen=True)
class Shape:
    """What of a model decides speed and memory."""

    architecture: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    rope_base: float
    bias: bool = False  # of q, k and v
    qk_norm: bool = False
    window: int = 0  # of local layers
    rope_factor: float = 1.0  # positions are divided by it, not those of local layers


SHAPES = {
    "llama-8b": Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 500_000.0),
    "qwen2.5-7b": Shape("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 1_000_000.0, bias=True),
    "gemma3-4b": Shape(
        "gemma3", 34, 2560, 10240, 8, 4, 256, 262144, 1_000_000.0, qk_norm=True, window=1024, rope_factor=8.0
    ),
}


def write_model(path: Path, shape: Shape, seed: int = 0) -> None:
    """A GGUF of this shape; equal tensors of all layers share their bytes."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.head_dim)
    if shape.rope_factor != 1.0:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(shape.rope_factor)
    if shape.window:
        writer.add_sliding_window(shape.window)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_tokenizer_model("no_vocab")

    made: dict[tuple[int, int], np.ndarray] = {}

    def weight(name: str, n_out: int, n_in: int) -> None:
        if (n_out, n_in) not in made:
            blocks = rng.integers(0, 256, (n_out, n_in // BLOCK, BLOCK_BYTES), np.uint8)
            scale = np.full((n_out, n_in // BLOCK, 1), 0.2 / np.sqrt(n_in), np.float16)
            blocks[:, :, :2] = scale.view(np.uint8)
            made[n_out, n_in] = blocks.reshape(n_out, -1)
        writer.add_tensor(name, made[n_out, n_in], raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def vector(name: str, n: int, value: float = 1.0) -> None:
        writer.add_tensor(name, np.full(n, value, np.float32))

    weight("token_embd.weight", shape.n_vocab, shape.n_embd)
    q, kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    for n in range(shape.n_layer):
        for name, n_out in (("q", q), ("k", kv), ("v", kv)):
            weight(f"blk.{n}.attn_{name}.weight", n_out, shape.n_embd)
            if shape.bias:
                vector(f"blk.{n}.attn_{name}.bias", n_out, 0.1)
            if shape.qk_norm and name != "v":
                vector(f"blk.{n}.attn_{name}_norm.weight", shape.head_dim)
        weight(f"blk.{n}.attn_output.weight", shape.n_embd, q)
        weight(f"blk.{n}.ffn_gate.weight", shape.n_ff, shape.n_embd)
        weight(f"blk.{n}.ffn_up.weight", shape.n_ff, shape.n_embd)
        weight(f"blk.{n}.ffn_down.weight", shape.n_embd, shape.n_ff)
        for name in ("attn_norm", "ffn_norm"):
            vector(f"blk.{n}.{name}.weight", shape.n_embd)
        if shape.architecture == "gemma3":
            for name in ("post_attention_norm", "post_ffw_norm"):
                vector(f"blk.{n}.{name}.weight", shape.n_embd)
    vector("output_norm.weight", shape.n_embd)
    if shape.architecture != "gemma3":  # which ties it to the embeddings
        weight("output.weight", shape.n_vocab, shape.n_embd)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def get_widths(scale: np.ndarray, row: int) -> np.ndarray:
    """Widths i8 [H, d/8] for deviations [H, d]: those that reverse water-filling rounds to, as many as a row holds."""
    level = np.log2(scale.reshape(len(scale), -1, GROUP).mean(axis=2))
    steps = np.array([(a + b) / 2 for a, b in zip(WIDTHS, WIDTHS[1:], strict=False)])
    low, high = -20.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        widths = np.array(WIDTHS, np.int8)[np.searchsorted(steps, level + middle)]
        low, high = (middle, high) if payload_bytes(widths) <= row else (low, middle)
    return np.array(WIDTHS, np.int8)[np.searchsorted(steps, level + low)]


def make_side(rng: np.random.Generator, shape: Shape, side: str, profile: str = "real") -> SideCalibration:
    """Random bases, deviations that fall along the components, Gaussian-like codebooks."""
    heads, d = shape.n_head_kv, shape.head_dim
    spread, power = PROFILES[profile][side]
    place = np.linspace(1, -1, d)
    fall = spread * rng.uniform(0.7, 1.3, (heads, 1)) * np.sign(place) * np.abs(place) ** power
    scale = 2.0 ** (fall + 0.3 * rng.standard_normal((heads, 1)))
    scale = (scale / np.sqrt((scale**2).mean(axis=1, keepdims=True))).astype(np.float32)
    widths = np.stack([get_widths(scale, row_bytes(heads, d, b)) for b in BITS], axis=1)
    books = {}
    for head, group, width in codebook_keys(widths):
        reach = 0.8 + 0.5 * width
        levels = np.linspace(-reach, reach, 1 << width) * scale[head, group * GROUP : (group + 1) * GROUP, None]
        books[head, group, width] = levels.astype(np.float16)
    return SideCalibration(
        mean=(0.1 * rng.standard_normal((heads, d))).astype(np.float32),
        scale=scale,
        gain_base=np.full(heads, 0.05, np.float32),
        gain_rule=np.full(heads, int(side == "v"), np.int32),
        decode=np.linalg.qr(rng.standard_normal((heads, d, d)))[0].astype(np.float16),
        widths=widths,
        codebooks=books,
        transforms=["random"] * heads,
    )


def main(
    shape: Annotated[str, typer.Argument(help=f"One of {', '.join(SHAPES)}.")],
    path: Annotated[Path, typer.Argument(help="The GGUF to write; the calibration goes beside it.")],
    layers: Annotated[int, typer.Option(help="Layers, instead of the shape's own number.")] = 0,
    profile: Annotated[str, typer.Option(help=f"How widths fall: {' or '.join(PROFILES)}.")] = "real",
) -> None:
    """Write a random model and its calibration."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"unknown shape {shape}: use one of {', '.join(SHAPES)}")
    if profile not in PROFILES:
        raise typer.BadParameter(f"unknown profile {profile}: use one of {', '.join(PROFILES)}")
    found = SHAPES[shape]
    if layers:
        found = Shape(**{**found.__dict__, "n_layer": layers})
    write_model(path, found)
    rng = np.random.default_rng(1)
    sides = {side: make_side(rng, found, side, profile) for side in "kv"}  # the same in all layers
    calibration = Calibration(
        fingerprint(path),
        found.architecture,
        found.n_layer,
        list(BITS),
        dict.fromkeys(range(found.n_layer), sides),
        "random",
        0,
        "bench.random_model",
        "2026-01-01",
    )
    write(calibration, path.with_suffix(".kvtc.gguf"))


if __name__ == "__main__":
    typer.run(main)
