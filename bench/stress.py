"""A model whose keys have large channels, without another function: ``python -m bench.stress model.gguf stress.gguf``.

Rows of the key projection are scaled by powers of two up to 64, by RoPE pair and kv head at random, and the rows of the
query projections that read them by the inverse. Logits of an f16 cache stay what they were, to the last bit where the
weights are f32 (`bench.float_copy`). Models with large key channels exist (Qwen2.5); what spends its levels on a row's
largest channel loses the others. With ``--measure``, both are calibrated and their caches compared with the f16 cache
of the first.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from gguf import GGUFValueType
from kvtc_gguf.capture import rope_pairs
from kvtc_gguf.gguf_io import Reader, Writer, replacing

from bench import heldout
from bench.caches import SINK, WINDOW, Cache
from bench.domains import calibrated
from bench.perplexity import Perplexity

CACHES = (
    Cache("f16"),
    Cache("kvtc-k2v2", SINK, WINDOW),
    Cache("kvtc-k2v4", SINK, WINDOW),
    Cache("turbo3", SINK, WINDOW),
    Cache("q4_0"),
)
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


def main(
    source: Path,
    target: Path,
    measure: Annotated[bool, typer.Option("--measure", help="Also calibrate both and print their KLDs.")] = False,
    tokens: Annotated[int, typer.Option(help="Tokens of each calibration.")] = 4096,
    chunks: Annotated[int, typer.Option(help="Chunks of 1024 tokens to judge on.")] = 4,
    seed: Annotated[list[int], typer.Option(help="Of the sampled text; several to see its noise.")] = [1],  # noqa: B006
    apart: Annotated[
        bool, typer.Option("--apart", help="Each model samples its own text, which parts after rounding differences.")
    ] = False,
    more: Annotated[str, typer.Option(help="Further arguments of llama-perplexity, such as '-ngl 99'.")] = "",
    binaries: Annotated[Path, typer.Option("--bin")] = Path("build/bin"),
    work: Annotated[Path, typer.Option(help="Folder for calibrations and logits.")] = Path("build/domains"),
    threads: Annotated[int, typer.Option("-t", "--threads")] = os.cpu_count() or 1,
) -> None:
    """Write the stressed copy of an f32 model, unless it is there; with --measure, both models' KLD by cache type."""
    if not target.exists():
        stress_copy(source, target)
    if not measure:
        return
    work.mkdir(parents=True, exist_ok=True)
    text, base = heldout.find(work).path, work / "base.kld"
    runs = {
        model: Perplexity(binaries / "llama-perplexity", model, text, base, 1024, chunks, threads, tuple(more.split()))
        for model in (source, target)
    }
    runs[source].save_base()
    print("| | seed | as it is | keys up to 64 times larger | change |\n|---|---|---|---|---|")
    for number in seed:
        files = _calibrations(source, target, work, tokens, number, apart, threads)
        for cache in CACHES:
            if number != seed[0] and not cache.calibrated:
                continue
            pair = [
                replace(run, more=(*run.more, "--kvtc-file", str(files[model]))) if cache.calibrated else run
                for model, run in runs.items()
            ]
            plain, stressed = (run.measure(cache).kld for run in pair)
            change = f"{stressed / plain - 1:+.1%}" if plain > 1e-6 else ""
            told = number if cache.calibrated else ""
            print(f"| {cache.label} | {told} | {plain:.6f} | {stressed:.6f} | {change} |", flush=True)
    base.unlink()


def _calibrations(
    source: Path, target: Path, work: Path, tokens: int, seed: int, apart: bool, threads: int
) -> dict[Path, Path]:
    """The calibration of each model, on the same tokens or each on its own."""
    name, statistics = f"{tokens}-{seed}", work / f"{source.stem}-{tokens}-{seed}.statistics.gguf"
    own = ["--tokens", tokens, "--corpus", f"seed={seed}"]
    if apart:
        return {model: calibrated(model, work, f"{name}-apart", own, threads) for model in (source, target)}
    first = calibrated(source, work, name, [*own, "--statistics", statistics], threads)
    return {source: first, target: calibrated(target, work, name, ["--tokens-of", statistics], threads)}


if __name__ == "__main__":
    typer.run(main)
