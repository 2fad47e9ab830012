"""What exact values in 8 bits cost a saved state: ``python -m bench.eight_bits MODEL WORK --lengths 512,1024``.

The KLD of the tokens after a restored state against those after the f16 cache's, with exact values as they are and in
8 bits (``python -m kvtc_gguf.state convert --exact 8``), and of one against the other. The model should have f32
weights (`bench.float_copy`) and a calibration beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from kvtc_gguf import state

from bench import heldout, machine
from bench.caches import Cache
from bench.cross_layer import JUDGED, divergence, log_probabilities
from bench.states import BATCH, Engine


def main(
    model: Path,
    work: Annotated[Path, typer.Argument(help="folder for the states")],
    lengths: Annotated[str, typer.Option(help="tokens, multiples of 512")] = "512,1024",
    caches: Annotated[str, typer.Option(help="comma-separated")] = "kvtc-k2v4,kvtc-k2v2",
    threads: Annotated[int, typer.Option("-t")] = machine.find().cores,
) -> None:
    """Print one line for each cache and length."""
    work.mkdir(parents=True, exist_ok=True)
    engine, sizes = Engine(model, threads), [int(n) for n in lengths.split(",")]
    tokens = engine.tokenize(heldout.find(work).path.read_bytes()[: 12 * max(sizes)], max(sizes) + JUDGED)
    found: dict[tuple[str, int], np.ndarray] = {}
    for cache in ("f16", *caches.split(",")):
        sides = Cache(cache).types
        with engine.context((sides[0], sides[1]), max(sizes) + JUDGED) as context:
            for n in sizes:
                context.cut(0)
                for at in range(0, n, BATCH):
                    context.decode(tokens[at : at + BATCH], at)
                path, eight = work / f"{cache}-{n}.bin", work / f"{cache}-{n}-8.bin"
                context.save(path, tokens[:n])
                context.restore(path, n)
                whole = found[cache, n] = log_probabilities(context, tokens[n : n + JUDGED], n)
                if cache == "f16":
                    continue
                state.convert(path, eight, exact=state.Exact.eight)
                context.restore(eight, n)
                narrow = log_probabilities(context, tokens[n : n + JUDGED], n)
                before, after = (divergence(found["f16", n], x) for x in (whole, narrow))
                error = (after - before).std() / JUDGED**0.5
                print(
                    f"{cache} {n} tokens: KLD {before.mean():.6f} -> {after.mean():.6f}, "
                    f"difference {(after - before).mean():.6f} +- {error:.6f}, "
                    f"of one another {divergence(whole, narrow).mean():.6f}, "
                    f"{path.stat().st_size} -> {eight.stat().st_size} bytes",
                    flush=True,
                )


if __name__ == "__main__":
    typer.run(main)
