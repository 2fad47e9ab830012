"""Random but valid inputs: calibrations of any shape, and tiny models that llama.cpp loads."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection

import gguf
import numpy as np
from kvtc_gguf.format import Calibration, SideCalibration
from kvtc_gguf.layout import GROUP, WIDTHS, codebook_keys, payload_bytes, row_bytes

REACH = {1: 0.8, 2: 1.5, 3: 2.15, 4: 2.73, 5: 3.25, 6: 3.7, 8: 4.4}  # outer level over the standard deviation
HYBRID = ("lfm2", "qwen35")  # their even layers are recurrent
CONV, DELTA_HEADS, DELTA_DIM = 4, 2, 32  # taps of short convolutions; heads and state size of gated delta nets
# What architectures need besides the usual. M-RoPE's sections: pairs of time, height, width, and of none of these.
METADATA: dict[str, dict[str, int | float | str | list[int]]] = {
    "qwen2vl": {"rope.dimension_sections": [4, 5, 6, 1]},
    "qwen3vl": {"rope.dimension_sections": [6, 5, 4, 1]},
    "lfm2": {"shortconv.l_cache": CONV},
    "qwen35": {
        "rope.dimension_sections": [3, 2, 2, 1],
        "full_attention_interval": 2,
        "ssm.conv_kernel": CONV,
        "ssm.inner_size": DELTA_HEADS * DELTA_DIM,
        "ssm.state_size": DELTA_DIM,
        "ssm.time_step_rank": DELTA_HEADS,
        "ssm.group_count": DELTA_HEADS,
    },
}


def calibration(
    n_layer: int = 2,
    n_head: int = 2,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    bits: tuple[int, ...] = (1, 2, 3, 4, 5, 6),
    seed: int = 0,
    fingerprint: str = "0123456789abcdef",
    only: Collection[int] | None = None,
) -> Calibration:
    """A valid calibration with random transforms, widths and codebooks; wider budgets never narrow a group.

    `only`: the layers that have a cache, if not all have one.
    """
    rng = np.random.default_rng(seed)
    dims = {"k": head_dim, "v": head_dim_v or head_dim}
    layers = {
        n: {s: side(rng, n_head, d, bits, int(s == "v")) for s, d in dims.items()} for n in only or range(n_layer)
    }
    return Calibration(fingerprint, "llama", n_layer, list(bits), layers, "synthetic", 4096, "tests", "2025-01-01")


def side(rng: np.random.Generator, n_head: int, d: int, bits: tuple[int, ...], rule: int) -> SideCalibration:
    """One layer's K or V. z of `draw` has root mean square 1 on the whole, as the format asks."""
    scale = np.sort(np.exp(rng.uniform(-3, 0, (n_head, d))), axis=1)[:, ::-1]
    scale = (scale / np.sqrt((scale**2).mean(axis=1, keepdims=True))).astype(np.float32)
    rotation = np.linalg.qr(rng.standard_normal((n_head, d, d)))[0]
    decode = (rotation * rng.uniform(0.25, 4, (n_head, 1, d))).astype(np.float16)
    widths = np.stack(list(_widths(rng, n_head, d, bits)), axis=1)
    books = {}
    for head, group, width in codebook_keys(widths):
        levels = np.linspace(-REACH[width], REACH[width], 1 << width) * rng.uniform(0.95, 1.05, (GROUP, 1 << width))
        own = scale[head, group * GROUP : (group + 1) * GROUP, None]
        books[head, group, width] = np.sort(levels * own, axis=1).astype(np.float16)
    return SideCalibration(
        mean=rng.standard_normal((n_head, d)).astype(np.float32),
        scale=scale,
        gain_base=rng.uniform(0.04, 0.08, n_head).astype(np.float32),
        gain_rule=np.full(n_head, rule, np.int32),
        decode=decode,
        widths=widths,
        codebooks=books,
        transforms=["random"] * n_head,
    )


def draw(rng: np.random.Generator, side: SideCalibration, n: int) -> np.ndarray:
    """Transformed vectors z f32 [n, H, d] of the kind that the side's codebooks are made for."""
    norms = rng.gamma(8, 1 / 8, (n, side.n_head, 1))
    return (rng.standard_normal((n, side.n_head, side.head_dim)) * side.scale * norms).astype(np.float32)


def _widths(rng: np.random.Generator, n_head: int, d: int, bits: tuple[int, ...]):
    """Widths i8 [H, G] of each budget: a random walk upwards until nothing more fits the row."""
    widths = np.zeros((n_head, d // GROUP), np.int8)
    for b in bits:
        row = row_bytes(n_head, d, b)
        if payload_bytes(widths) > row:
            raise ValueError(f"{n_head} heads of {d} have no room in {row} bytes")
        failures = 0
        while failures < 50 + 10 * widths.size:
            # the square favours the first groups, which have the largest scales
            head, group = rng.integers(n_head), int(rng.random() ** 2 * (d // GROUP))
            trial = widths.copy()
            trial[head, group] = WIDTHS[min(WIDTHS.index(int(widths[head, group])) + 1, len(WIDTHS) - 1)]
            trial[head] = np.sort(trial[head])[::-1]
            fits = payload_bytes(trial) <= row and (trial != widths).any()
            widths, failures = (trial, 0) if fits else (widths, failures + 1)
        yield widths.copy()


def tiny_model(
    path: str | os.PathLike[str],
    architecture: str = "llama",
    n_layer: int = 2,
    n_embd: int = 128,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int = 32,
    n_ff: int = 128,
    n_rot: int | None = None,
    dtype: type[np.generic] = np.float32,
    seed: int = 0,
    extra: dict[str, int | float | str | list[int]] | None = None,
) -> None:
    """A model GGUF with random weights and a vocabulary of single bytes that llama.cpp loads and runs.

    architecture: "llama" (RoPE pairs neighbours), "qwen2" (NeoX pairs, biases, n_embd = n_head * head_dim), "qwen2vl"
    (the same with M-RoPE), "qwen3vl" (interleaved M-RoPE, QK-norm), "lfm2" (layers 0, 2, … are short convolutions) or
    "qwen35" (layers 0, 2, … are gated delta nets; interleaved M-RoPE of half a head's channels; queries with a gate).
    `extra` adds metadata, its keys after the architecture's name, such as {"rope.scaling.type": "yarn"}.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(n_layer)
    writer.add_context_length(4096)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    recurrent = set(range(0, n_layer, 2)) if architecture in HYBRID else set()
    kv_heads = [n_head_kv * (n not in recurrent) for n in range(n_layer)]
    writer.add_head_count_kv(kv_heads if architecture == "lfm2" else n_head_kv)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(n_rot or (head_dim // 2 if architecture == "qwen35" else head_dim))
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in (METADATA.get(architecture, {}) | (extra or {})).items():
        add = adders[type(value)]
        add(f"{architecture}.{key}", value)
    n_vocab = _byte_vocabulary(writer)

    def weight(name: str, *shape: int, gain: float = 1.0) -> None:
        array = rng.standard_normal(shape) * gain / np.sqrt(shape[-1])
        writer.add_tensor(name, array.astype(dtype if len(shape) > 1 else np.float32))

    def norm(name: str, size: int = n_embd) -> None:
        writer.add_tensor(name, rng.uniform(0.8, 1.2, size).astype(np.float32))

    weight("token_embd.weight", n_vocab, n_embd, gain=8)
    for n in range(n_layer):
        norm(f"blk.{n}.attn_norm.weight")
        if n in recurrent:
            _recurrent_layer(weight, norm, architecture, n, n_embd)
        else:
            for name, heads in (("q", n_head), ("k", n_head_kv), ("v", n_head_kv)):
                rows = heads * head_dim * (2 if architecture == "qwen35" and name == "q" else 1)
                weight(f"blk.{n}.attn_{name}.weight", rows, n_embd, gain=1.0 if name == "v" else 1.5)
                if architecture in ("qwen2", "qwen2vl"):
                    weight(f"blk.{n}.attn_{name}.bias", heads * head_dim, gain=3)
                elif architecture != "llama" and name != "v":
                    norm(f"blk.{n}.attn_{name}_norm.weight", head_dim)
            weight(f"blk.{n}.attn_output.weight", n_embd, n_head * head_dim)
        norm(f"blk.{n}.{'post_attention' if architecture == 'qwen35' else 'ffn'}_norm.weight")
        weight(f"blk.{n}.ffn_gate.weight", n_ff, n_embd)
        weight(f"blk.{n}.ffn_up.weight", n_ff, n_embd)
        weight(f"blk.{n}.ffn_down.weight", n_embd, n_ff)
    norm("token_embd_norm.weight" if architecture == "lfm2" else "output_norm.weight")
    weight("output.weight", n_vocab, n_embd, gain=2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _recurrent_layer(weight: Callable, norm: Callable, architecture: str, n: int, n_embd: int) -> None:
    """What stands in for attention in layer `n` of a hybrid model."""
    if architecture == "lfm2":
        weight(f"blk.{n}.shortconv.conv.weight", n_embd, CONV)
        weight(f"blk.{n}.shortconv.in_proj.weight", 3 * n_embd, n_embd)
        weight(f"blk.{n}.shortconv.out_proj.weight", n_embd, n_embd)
        return
    inner = DELTA_HEADS * DELTA_DIM
    weight(f"blk.{n}.attn_qkv.weight", 3 * inner, n_embd)
    weight(f"blk.{n}.attn_gate.weight", inner, n_embd)
    weight(f"blk.{n}.ssm_conv1d.weight", 3 * inner, CONV)
    weight(f"blk.{n}.ssm_alpha.weight", DELTA_HEADS, n_embd)
    weight(f"blk.{n}.ssm_beta.weight", DELTA_HEADS, n_embd)
    weight(f"blk.{n}.ssm_dt.bias", DELTA_HEADS)
    weight(f"blk.{n}.ssm_a", DELTA_HEADS, gain=-0.1)
    norm(f"blk.{n}.ssm_norm.weight", DELTA_DIM)
    weight(f"blk.{n}.ssm_out.weight", n_embd, inner)


def lora_adapter(path: str | os.PathLike[str], model: str | os.PathLike[str], rank: int = 4, seed: int = 0) -> None:
    """A random LoRA adapter GGUF for the projections of all attention layers of a tiny model."""
    rng = np.random.default_rng(seed)
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for tensor in reader.tensors:
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight")):
            rows, columns = tensor.data.shape
            for side, shape in (("a", (rank, columns)), ("b", (rows, rank))):
                array = rng.standard_normal(shape) / np.sqrt(shape[1])
                writer.add_tensor(f"{tensor.name}.lora_{side}", array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _byte_vocabulary(writer: gguf.GGUFWriter) -> int:
    """A SentencePiece vocabulary in which every text is its bytes; returns its size."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256, gguf.TokenType.NORMAL]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return len(tokens)
