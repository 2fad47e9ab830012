"""Check a calibration against its model: `python -m kvtc_gguf.verify model.gguf [calibration.kvtc.gguf]`.

Fingerprint, shapes, and on a little text what coding does to attention, through the library's own codec and kernels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from kvtc_gguf import corpus, score
from kvtc_gguf.capture import LayerSample
from kvtc_gguf.capture.llama_cpp import LlamaCapture
from kvtc_gguf.coder import ALL, Coder, open_coder
from kvtc_gguf.console import one_line_errors, warn
from kvtc_gguf.fingerprint import fingerprint
from kvtc_gguf.format import SIDES, Calibration, read
from kvtc_gguf.layout import FormatError
from kvtc_gguf.model_info import ModelInfo
from kvtc_gguf.reference_attention import PlainCells, attention, span_mask
from kvtc_gguf.rotation import rotate, rotation, turns
from kvtc_gguf.sidecar import locate

SHOWN_BITS = (2, 4)
SHOWN_TYPES = ((2, 2), (2, 4), (4, 4))
NOTHING = 1.0  # relative error of a code that says nothing

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Errors:
    """Relative errors (amplitudes) of one layer, by bits asked for.

    keys: of the logits, values: of attention's output, each as far as codes count and the other side exact. both: of
    attention's output as the cache type gives it, with sinks and window.
    """

    layer: int
    keys: dict[int, float]
    values: dict[int, float]
    both: dict[tuple[int, int], float]

    @property
    def worst(self) -> float:
        return max([0.0, *self.keys.values(), *self.values.values(), *self.both.values()])


def find(model: Path, calibration: Path | None) -> Path:
    """The file that llama.cpp would take the calibration from. Raises FormatError if there is none."""
    calibration = calibration or locate(model)
    if not calibration.is_file():
        raise FormatError(f"{calibration}: no such calibration; make one with `python -m kvtc_gguf.calibrate {model}`")
    return calibration


def verify(model: Path, source: Path, text: Path | None, tokens: int, threads: int) -> list[Errors]:
    """Errors of every layer on a text, `tokens` long. Raises FormatError if the calibration is not of this model."""
    calibration, mark, info = read(source), fingerprint(model), ModelInfo(model)
    if mark != calibration.fingerprint:
        raise FormatError(f"{source}: is a calibration of model {calibration.fingerprint}, {model} is {mark}")
    if calibration.block_count != info.block_count:
        raise FormatError(f"{source}: is for {calibration.block_count} layers, {model} has {info.block_count}")
    coder = open_coder(source, calibration, warn)
    found: list[Errors] = []
    with LlamaCapture(model, tokens, threads) as capture:
        if text:
            chunk = corpus.file_chunks(capture, text, 1, tokens, least=1)[0]
        else:  # from the end of what calibrations begin with
            chunk = corpus.split(capture.tokenize(corpus.prose())[-tokens:], tokens, 1, capture)[0]

        def look(sample: LayerSample) -> None:
            check_layer(sample, calibration, source)
            pairs = info.pairs(sample.k.shape[2], capture.interleaved)
            gram = info.gram(sample.layer, sample.q.shape[1], sample.v.shape[2])
            found.append(layer_errors(sample, calibration, coder, pairs, gram, info.softcap))

        capture.run(chunk, look)
    idle = sorted(set(calibration.layers) - {errors.layer for errors in found})
    if idle:
        raise FormatError(f"{source}: holds layer {idle[0]}, which has no K/V cache in {model}")
    return sorted(found, key=lambda errors: errors.layer)


def check_layer(sample: LayerSample, calibration: Calibration, source: Path) -> None:
    """Raises FormatError unless the calibration has this layer, in the model's shape."""
    sides = calibration.layers.get(sample.layer)
    if sides is None:
        raise FormatError(f"{source}: lacks layer {sample.layer}, which has a K/V cache")
    for name, x in (("k", sample.k), ("v", sample.v)):
        own = (sides[name].n_head, sides[name].head_dim)
        if own != x.shape[1:]:
            raise FormatError(
                f"{source}: layer {sample.layer} {name} has {own[0]} heads of {own[1]}, the model {x.shape[1:]}"
            )


def layer_errors(
    sample: LayerSample, calibration: Calibration, coder: Coder, pairs: np.ndarray, gram: np.ndarray, softcap: float
) -> Errors:
    """What coding the keys alone, or the values alone, does to attention outside sinks and window; and both inside."""
    far = score.far_attention(sample, softcap)
    # keys grow by YaRN's magnitude where RoPE turns them, and so do their errors
    size = [np.linalg.norm(x[..., pairs]) for x in (sample.k_rope, sample.k)]
    scale = float(size[0] / max(size[1], 1e-30))
    turn = rotation(sample, pairs)
    keys, values, both = {}, {}, {}
    for bits in [b for b in SHOWN_BITS if b in calibration.bits] or calibration.bits:
        k, v = (
            coder.coded(sample.layer, side, x, calibration.kept_bits(sample.layer, side, bits))
            for side, x in zip(SIDES, (sample.k, sample.v), strict=True)
        )
        keys[bits] = logit_error(sample, far, rotate(k - sample.k, scale * turn[:, None], pairs))
        values[bits] = output_error(sample, far, v - sample.v, gram)
    rows = score.query_rows(len(sample.q))
    exact = exact_output(sample, rows, softcap)
    for asked in [t for t in SHOWN_TYPES if set(t) <= set(calibration.bits)] or [(b, b) for b in calibration.bits]:
        kept = tuple(calibration.kept_bits(sample.layer, side, bits) for side, bits in zip(SIDES, asked, strict=True))
        coded = coder.attend(sample, rows, kept, turns(turn, pairs, scale), softcap)
        both[asked] = relative_energy(coded - exact, exact, gram)
    return Errors(sample.layer, keys, values, both)


def exact_output(sample: LayerSample, rows: np.ndarray, softcap: float) -> np.ndarray:
    """Attention's output f64 [R, n_head, d_v] of the queries `rows` i64 [R], nothing coded."""
    tokens = np.arange(len(sample.k))
    mask = span_mask(rows, tokens, sample.window or ALL)
    cells = PlainCells(sample.k_rope), PlainCells(sample.v)
    where = {"query_positions": rows, "cell_positions": tokens, "mask": mask}
    return attention(sample.q_rope[rows], *cells, scale=1.0, softcap=softcap, **where)


def relative_energy(error: np.ndarray, of: np.ndarray, gram: np.ndarray) -> float:
    """Root mean square of outputs [R, n_head, d] over that of others, both through W_o (gram [n_head, d, d])."""
    power = [np.einsum("rhd,hde,rhe->", x, gram, x, optimize=True) for x in (error, of)]
    return float(np.sqrt(power[0] / max(power[1], 1e-30)))


def logit_error(sample: LayerSample, attention: np.ndarray, error: np.ndarray) -> float:
    """Deviation of the error in q . k over that of q . k itself, over each query's keys, weighted by attention.

    attention [n_head, R, T] of the query rows of `score.query_rows`, error [T, H, d] of keys after RoPE. What is the
    same for all keys of a query is left out: softmax does not see it.
    """
    rows, n_head, heads = score.query_rows(len(sample.q)), len(attention), sample.k.shape[1]
    power = np.zeros(2)
    for i in range(n_head):
        weight = attention[i] / np.maximum(attention[i].sum(axis=1, keepdims=True), 1e-30)
        for j, keys in enumerate((error, sample.k_rope)):
            logits = sample.q_rope[rows, i] @ keys[:, i * heads // n_head].T
            centred = logits - (weight * logits).sum(axis=1, keepdims=True)
            power[j] += (weight * centred**2).sum(dtype=np.float64)
    return float(np.sqrt(power[0] / max(power[1], 1e-30)))


def output_error(sample: LayerSample, attention: np.ndarray, error: np.ndarray, gram: np.ndarray) -> float:
    """Root mean square of the error of attention's output over that of the output, both through W_o."""
    heads, total = sample.v.shape[1], np.zeros(2)
    group = len(attention) // heads
    for h in range(heads):
        mine = slice(h * group, (h + 1) * group)
        total += score.output_energy(attention[mine], np.stack([error[:, h], sample.v[:, h]], axis=1), gram[mine])
    return float(np.sqrt(total[0] / max(total[1], 1e-30)))


def table(found: list[Errors]) -> Table:
    """One row a layer."""
    out = Table(
        caption="relative errors: K of the logits, V of attention's output, each alone; then of attention's output "
        "with the cache type, sinks and window exact"
    )
    out.add_column("layer", justify="right")
    for side in ("K", "V"):
        for bits in found[0].keys:
            out.add_column(f"{side} @{bits}", justify="right")
    for bits_k, bits_v in found[0].both:
        out.add_column(f"k{bits_k}v{bits_v}", justify="right")
    for errors in found:
        cells = [*errors.keys.values(), *errors.values.values(), *errors.both.values()]
        out.add_row(str(errors.layer), *(f"{cell:.1%}" for cell in cells))
    return out


@app.command()
def main(
    model: Annotated[Path, typer.Argument(help="The model's GGUF.")],
    calibration: Annotated[
        Path | None, typer.Argument(help="Its calibration; else the one it embeds, else the one beside it.")
    ] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Text to try, instead of our own.")] = None,
    tokens: Annotated[int, typer.Option(min=256, help="Tokens to try.")] = 1024,
    threads: Annotated[int, typer.Option("-t", "--threads", min=1, help="Threads.")] = os.cpu_count() or 1,
) -> None:
    """Check a calibration against its model: fingerprint, shapes, and the error on a little text."""
    with one_line_errors():
        source = find(model, calibration)
        found = verify(model, source, file, tokens, threads)
        for errors in found:
            worst = errors.worst
            if not worst < NOTHING:
                raise FormatError(
                    f"{source}: layer {errors.layer}: an error of {worst:.0%} says nothing of keys or values; "
                    "calibrate the model again"
                )
    Console().print(table(found))
    print(f"{source}: fits {model}")


if __name__ == "__main__":
    app()
