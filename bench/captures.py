"""Do two engines see the same model? ``python -m bench.captures a.gguf b.gguf`` compares the statistics of two runs.

The files are what ``calibrate --statistics`` keeps, of the same tokens: one run through llama.cpp, and one with
``--hf`` and ``--tokens-of`` the first, as tokenizers of two libraries split some texts otherwise. Printed is, for
queries, keys before and after RoPE and values, the relative difference of a layer and kv head: largest and median.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from kvtc_gguf import statistics_file
from kvtc_gguf.statistics_file import Statistics

from bench.csv_file import write_csv


def differences(a: Statistics, b: Statistics) -> dict[str, dict[int, np.ndarray]]:
    """Stream -> layer -> relative difference by kv head [H]: covariances in Frobenius' norm, queries' mean squares.

    Raises ValueError for statistics of other texts or layers.
    """
    if [t.chunks.tolist() for t in a.texts] != [t.chunks.tolist() for t in b.texts]:
        raise ValueError("the statistics are of other tokens: make the second with --tokens-of the first")
    if {n: set(s) for n, s in a.moments.items()} != {n: set(s) for n, s in b.moments.items()}:
        raise ValueError("the statistics are of other layers")
    found: dict[str, dict[int, np.ndarray]] = {}
    for layer, streams in sorted(a.moments.items()):
        for name, mine in streams.items():
            other = b.moments[layer][name]
            pairs = [(mine.head(h).covariance, other.head(h).covariance) for h in range(len(mine.total))]
            found.setdefault(name, {})[layer] = np.array([relative(*pair) for pair in pairs])
            if mine.chunks[0]:
                queries = zip(mine.mean_query(), other.mean_query(), strict=True)
                found.setdefault("queries", {})[layer] = np.array([relative(*pair) for pair in queries])
    return found


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |a|, all entries together."""
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(a)), 1e-30))


def main(
    first: Path,
    second: Path,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="CSV of all, by layer and kv head.")] = None,
) -> None:
    """Print the largest and the median relative difference by stream."""
    found = differences(statistics_file.read(first), statistics_file.read(second))
    print("| | largest relative difference | in layer | median |\n|---|---|---|---|")
    for name, layers in found.items():
        worst = max(layers, key=lambda layer: layers[layer].max())
        print(f"| {name} | {layers[worst].max():.2e} | {worst} | {np.median(np.stack(list(layers.values()))):.2e} |")
    if output:
        rows = (
            (n, layer, h, f"{x:.3e}") for n, by in found.items() for layer, d in by.items() for h, x in enumerate(d)
        )
        write_csv(output, ("stream", "layer", "head", "difference"), rows)


if __name__ == "__main__":
    typer.run(main)
