"""What a device can do, measured: bytes a second of its memory, operations a second of its f16 products.

`bench.kernels` takes its floors from these. Both are what ggml's own kernels reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

DECLARATIONS = """struct ggml_tensor * ggml_dup(struct ggml_context *, struct ggml_tensor *);"""


@dataclass(frozen=True)
class Ceilings:
    """GB/s of the device's memory, TFLOP/s of its f16 products."""

    bandwidth: float
    rate: float

    def floor(self, size: float, operations: float) -> float:
        """Seconds that must pass for `size` bytes and `operations` that run side by side."""
        return max(size / self.bandwidth / 1e9, operations / self.rate / 1e12)


def measure(ffi: Any, time_nodes: Any, elements: int = 1 << 28, side: int = 8192) -> Ceilings:
    """The ceilings of the device of `ffi`.

    Args:
        ffi: the tests' binding, with `DECLARATIONS`.
        time_nodes: seconds of one node of a graph, see `bench.kernels`.
        elements: of the f32 vector that is read and written, more than any cache holds.
        side: of the square matrices that are multiplied.
    """
    import ggml_graph

    with ggml_graph.graph(4) as g:
        vector = g.tensor(np.zeros(elements, np.float32))
        # not ggml_scale: 1683 GB/s on an H100, where attention reads more
        seconds = time_nodes(ffi, g, [ffi.base.ggml_dup(g.ctx, vector)])
        bandwidth = 2 * 4 * elements / seconds / 1e9
    with ggml_graph.graph(4) as g:
        rng = np.random.default_rng(0)
        a = g.tensor(rng.standard_normal((side, side), np.float32).astype(np.float16))
        b = g.tensor(rng.standard_normal((side, side), np.float32))
        rate = 2.0 * side**3 / time_nodes(ffi, g, [ffi.base.ggml_mul_mat(g.ctx, a, b)]) / 1e12
    return Ceilings(bandwidth, rate)
