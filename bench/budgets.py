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

CHUNKS, CTX = 2, 1024  # of what the layers are measured on


def measured(model: Path, sidecar: Path, threads: int) -> None:
    """Adds the sensitivities to a calibration that has none, on the last chunks of the default corpus's prose."""
    calibration = format.read(sidecar)
    if "kld.k" in calibration.stats:
        return
    with LlamaCapture(model, CTX, threads) as capture:
        tokens = capture.tokenize(corpus.prose())
        chunks = corpus.split(tokens[-CHUNKS * CTX :], CTX, CHUNKS, capture)
    with Prober(model, calibration, chunks, threads) as prober:
        tables, background = measure(prober)
    calibration.stats |= {f"kld.{side}": table for side, table in tables.items()}
    calibration.stats["kld.background"] = np.array([background], np.float32)
    format.write(calibration, sidecar)


def main(
    model: Path,
    bpv: Annotated[list[float], typer.Option(help="Budgets in bits per value.")] = [1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],  # noqa: B006
    threads: Annotated[int, typer.Option("-t", "--threads")] = os.cpu_count() or 1,
) -> None:
    """Write a calibration for each budget and print its predicted KLD."""
    sidecar = beside(model)
    measured(model, sidecar, threads)
    for each in bpv:
        calibration = format.read(sidecar)
        choice = budget.plan(calibration, each)
        calibration.layer_bits = {side: [bits] * len(calibration.bits) for side, bits in choice.bits.items()}
        folder = model.with_name(f"{model.stem}-{each:g}")
        folder.mkdir(exist_ok=True)
        link = folder / model.name
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(model, folder))
        format.write(calibration, folder / sidecar.name)
        print(f"{link}: {choice.bpv:.3f} bits per value, predicted KLD {choice.kld:.5f}")


if __name__ == "__main__":
    typer.run(main)
