"""Failures caught: memory that grows with every `Llama` that is made, used and freed.

`python tests/bindings/test_lifetime.py MODEL [CYCLES]` prints the resident size of as many as asked for.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

TEXT = "How vexingly quick daft zebras jump over the moon! " * 3
MIB = 2**20


def sizes(model: Path, cycles: int) -> Iterator[int]:
    """Resident bytes after each of so many lives of an object with a kvtc cache."""
    import llama_cpp

    process = psutil.Process()
    for _ in range(cycles):
        options = {"cache_type": "kvtc-k2v4", "kvtc_window": 16, "n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}
        llama = llama_cpp.Llama(str(model), verbose=False, **options)
        llama.create_completion(TEXT, max_tokens=4, temperature=0)
        llama.close()
        del llama
        gc.collect()
        yield process.memory_info().rss


def test_lives_of_an_object_leave_nothing(model) -> None:
    rss = list(sizes(model, 60))
    # The first fill pools; a context of this model takes 1.5 MiB, so that a leak of one in ten shows.
    assert max(rss[40:]) - max(rss[:20]) < 3 * MIB, [size // MIB for size in rss]


if __name__ == "__main__":
    lives = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    for n, size in enumerate(sizes(Path(sys.argv[1]), lives)):
        if n % (lives // 10) == lives // 10 - 1:
            print(f"{n + 1}: {size / MIB:.1f} MiB", flush=True)
