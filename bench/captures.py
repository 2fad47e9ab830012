"""Do two engines see the same model? ``python -m bench.captures a.gguf b.gguf`` compares the statistics of two runs.

The files are what ``calibrate --statistics`` keeps, of the same text: one run through llama.cpp, one with ``--hf``.
Printed is, for queries, keys before and after RoPE and values, the largest relative difference of a layer and kv head.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import typer
from kvtc_gguf import statistics_file
from kvtc_gguf.statistics_file import Statistics


def differences(a: Statistics, b: Statistics) -> dict[str, tuple[float, int]]:
    """Stream -> (largest relative difference, its layer): covariances in Frobenius' norm, queries' mean squares.

    Raises ValueError for statistics of other texts or layers.
    """
    if [t.chunks.tolist() for t in a.texts] != [t.chunks.tolist() for t in b.texts]:
        raise ValueError("the statistics are of other tokens")
    if {n: set(s) for n, s in a.moments.items()} != {n: set(s) for n, s in b.moments.items()}:
        raise ValueError("the statistics are of other layers")
    found: dict[str, list[tuple[float, int]]] = {}
    for layer, streams in a.moments.items():
        for name, mine in streams.items():
            other = b.moments[layer][name]
            for h in range(len(mine.total)):
                pair = (mine.head(h).covariance, other.head(h).covariance)
                found.setdefault(name, []).append((relative(*pair), layer))
            if mine.chunks[0]:
                found.setdefault("queries", []).append((relative(mine.mean_query(), other.mean_query()), layer))
    return {name: max(each) for name, each in found.items()}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |a|, all entries together."""
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(a)), 1e-30))


def main(first: Path, second: Path) -> None:
    """Print the largest relative difference by stream."""
    print("| | largest relative difference | in layer |\n|---|---|---|")
    for name, (value, layer) in differences(statistics_file.read(first), statistics_file.read(second)).items():
        print(f"| {name} | {value:.2e} | {layer} |")


if __name__ == "__main__":
    typer.run(main)
