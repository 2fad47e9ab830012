"""Calibrations of one model for several budgets: ``python -m bench.budgets build/models/model.gguf``.

Beside the model, ``model-2.5/`` gets a link to the model and its calibration with layers' own bits at 2.5 bits a value,
so that ``matrices/calibration.yaml`` can name them as models. Whatever kvtc type is asked for, these are the bits.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from kvtc_gguf import budget, corpus, format
from kvtc_gguf.capture.llama_cpp import LlamaCapture
from kvtc_gguf.sensitivity import Prober, measure
from kvtc_gguf.sidecar import beside

CHUNKS, CTX, SEED = 1, 1024, 2  # of each kind of text, half for measuring layers and half for what was planned


def texts(model: Path, threads: int) -> np.ndarray:
    """Chunks i32 [2 * CHUNKS, CTX]: the end of the default corpus's prose and newly sampled text, in turn."""
    with LlamaCapture(model, CTX, threads) as capture:
        prose = corpus.split(capture.tokenize(corpus.prose())[-CHUNKS * CTX :], CTX, CHUNKS, capture)
        own = corpus.sampled(capture, corpus.Mix(seed=SEED), "own", CHUNKS, CTX)
    return np.stack([prose, own], axis=1).reshape(-1, CTX)


def main(
    model: Path,
    bpv: Annotated[list[float], typer.Option(help="Budgets in bits per value.")] = [1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],  # noqa: B006
    threads: Annotated[int, typer.Option("-t", "--threads")] = os.cpu_count() or 1,
) -> None:
    """Write a calibration for each budget and print predicted and measured KLDs; layers are measured once."""
    sidecar = beside(model)
    chunks = texts(model, threads)
    calibration = format.read(sidecar)
    if "kld.k" not in calibration.stats:
        with Prober(model, calibration, chunks[CHUNKS:], threads) as prober:
            calibration.stats |= measure(prober)
        format.write(calibration, sidecar)
    with Prober(model, calibration, chunks[:CHUNKS], threads) as prober:
        for each in bpv:
            choice, measured = budget.best(prober, calibration, each)
            folder = model.with_name(f"{model.stem}-{each:g}")
            folder.mkdir(exist_ok=True)
            link = folder / model.name
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(model, folder))
            written = format.read(sidecar)
            written.layer_bits = {side: [bits] * len(written.bits) for side, bits in choice.bits.items()}
            format.write(written, folder / sidecar.name)
            print(f"{link}: {choice.name}, of", *(f"{c.name} {rows.mean():.5f}" for c, rows in measured), flush=True)


if __name__ == "__main__":
    typer.run(main)
