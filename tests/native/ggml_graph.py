"""Graphs of ggml from numpy arrays, on the CPU or on the device that $KVTC_TEST_DEVICE names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from ffi import DEVICE, F16, F32, I8, I32, I64, base, cpu, device, ffi, pointer

NUMPY_TYPES = {F32: np.float32, F16: np.float16, I8: np.int8, I32: np.int32, I64: np.int64}


class Graph:
    """A ggml context: tensors from numpy arrays, one graph, results back as numpy arrays."""

    def __init__(self, ctx: Any) -> None:
        self.ctx = ctx
        self.waiting: list[tuple[Any, np.ndarray]] = []  # tensors of a device, which get memory when the graph is known

    def fill(self, tensor: Any, data: np.ndarray) -> None:
        """Give a tensor its bytes, u8."""
        if DEVICE:
            self.waiting.append((tensor, np.ascontiguousarray(data)))
        else:
            memory(tensor)[:] = data

    def tensor(self, array: np.ndarray | None) -> Any:
        """A tensor of the array's bytes; ggml order, so numpy's last index is ne[0]. None gives NULL."""
        if array is None:
            return ffi.NULL
        kind = next(k for k, v in NUMPY_TYPES.items() if array.dtype == v)
        shape = (*reversed(array.shape), 1, 1, 1)[:4]
        tensor = base.ggml_new_tensor_4d(self.ctx, kind, *shape)
        self.fill(tensor, np.frombuffer(array.tobytes(), np.uint8))
        return tensor

    def rows(self, kind: int, width: int, rows: np.ndarray) -> Any:
        """A tensor [width, n] of any type, from the bytes u8 [n, row bytes] of its rows."""
        tensor = base.ggml_new_tensor_2d(self.ctx, kind, width, len(rows))
        self.fill(tensor, rows.reshape(-1))
        return tensor

    def pack(self, pack: np.ndarray) -> Any:
        """An I8 tensor with the pack at a multiple of 64."""
        if DEVICE:
            tensor = base.ggml_new_tensor_1d(self.ctx, I8, pack.size)
            self.fill(tensor, pack)
            return tensor
        whole = base.ggml_new_tensor_1d(self.ctx, I8, pack.size + 64)
        offset = -int(ffi.cast("uintptr_t", base.ggml_get_data(whole))) % 64
        tensor = base.ggml_view_1d(self.ctx, whole, pack.size, offset)
        memory(tensor)[:] = pack
        return tensor

    def compute(self, result: Any, n_threads: int, *, poison: bool = True) -> np.ndarray:
        """Run the graph that ends in `result`; its bytes u8, which are all ones (NaN in every float) before."""
        return self.compute_all([result], n_threads, poison=poison)[0]

    def compute_all(
        self, results: list[Any], n_threads: int, *, poison: bool = True, times: int = 1
    ) -> list[np.ndarray]:
        """Run one graph, in which `results` come in this order; the bytes u8 of each, poisoned before as in compute.

        It runs several times, which must give the same bytes: CUDA captures a graph in the second run, and replays it
        from then on.
        """
        graph = base.ggml_new_graph(self.ctx)
        for result in results:
            base.ggml_build_forward_expand(graph, result)
        if DEVICE:
            return self._compute_on_device(graph, results, poison, times)
        for result in results if poison else ():
            memory(result)[:] = 0xFF
        status = cpu.ggml_graph_compute_with_ctx(self.ctx, graph, n_threads)
        assert status == 0, f"ggml status {status}"
        return [memory(result).copy() for result in results]

    def _compute_on_device(self, graph: Any, results: list[Any], poison: bool, times: int) -> list[np.ndarray]:
        dev, backend = device()
        for result in results:
            assert base.ggml_backend_dev_supports_op(dev, result), f"{DEVICE} has no kernel for this"
        buffer = base.ggml_backend_alloc_ctx_tensors(self.ctx, backend)
        out = [np.full(base.ggml_nbytes(result), 0xFF, np.uint8) for result in results]
        try:
            for result, data in zip(results, out, strict=True) if poison else ():
                base.ggml_backend_tensor_set(result, pointer(data), 0, data.size)
            for tensor, data in self.waiting:
                base.ggml_backend_tensor_set(tensor, pointer(data), 0, data.size)
            for n in range(times):
                before = [data.copy() for data in out]
                status = base.ggml_backend_graph_compute(backend, graph)
                assert status == 0, f"ggml status {status}"
                for result, data in zip(results, out, strict=True):
                    base.ggml_backend_tensor_get(result, pointer(data), 0, data.size)
                same = n == 0 or all((a == b).all() for a, b in zip(before, out, strict=True))
                assert same, f"run {n + 1} of the graph gave another result"
            return out
        finally:
            base.ggml_backend_buffer_free(buffer)


def memory(tensor: Any) -> np.ndarray:
    """The bytes of a contiguous tensor, writable."""
    return np.frombuffer(ffi.buffer(base.ggml_get_data(tensor), base.ggml_nbytes(tensor)), np.uint8)


@contextmanager
def graph(megabytes: int = 64) -> Iterator[Graph]:
    """A context of this size, freed at the end."""
    params = ffi.new("struct ggml_init_params *", {"mem_size": megabytes << 20, "no_alloc": bool(DEVICE)})
    ctx = base.ggml_init(params[0])
    try:
        yield Graph(ctx)
    finally:
        base.ggml_free(ctx)
