"""Attention over coded rows on the CPU: one `ggml_kvtc_attn` node."""

from __future__ import annotations

import numpy as np

from kvtc_gguf.native.calibration import Pack
from kvtc_gguf.native.library import F16, F32, I8, I32, K, NativeError, V

SPARE = 16 << 20  # bytes of a graph beside its tensors: nodes and the kernels' work


def attend(
    pack: Pack,
    q: np.ndarray,
    k_rows: np.ndarray,
    v_rows: np.ndarray,
    *,
    query_positions: np.ndarray,
    cell_positions: np.ndarray,
    scale: float,
    exact: tuple[np.ndarray, np.ndarray] | None = None,
    sinks: int = 0,
    window: int = 0,
    span: int = 2**31 - 1,
    softcap: float = 0.0,
    threads: int = 1,
) -> np.ndarray:
    """Causal attention of T queries over N cells of one sequence; returns f32 [T, n_head, d_v].

    q f32 [T, n_head, d], after RoPE (keys are rotated as `Pack.set_rope` says). k_rows, v_rows: u8 [N, row_bytes] of
    `Pack.encode`. query_positions i32 [T], cell_positions i32 [N], -1 for an empty cell. exact: z of both sides,
    [N, H, d]; key j counts so for query i where its position is below `sinks` or less than `window` before the query's.
    span: how far back a query sees. Raises ValueError for shapes that do not fit.
    """
    lib, n_cells, n_tokens = pack.library, len(k_rows), len(q)
    check_shapes(pack, q, (k_rows, v_rows), np.shape(query_positions), np.shape(cell_positions), exact)
    slots = np.arange(n_cells) if exact is not None else np.full(n_cells, -1)
    info = np.stack([cell_positions, np.where(np.asarray(cell_positions) < 0, -1, slots)], axis=1).astype(np.int32)
    info = np.concatenate([info.reshape(-1), np.asarray(query_positions, np.int32)])
    store = None
    if exact is not None:
        store = np.concatenate([z.astype(np.float16).transpose(1, 0, 2).reshape(-1) for z in exact])
    sizes = [a.nbytes for a in (q, k_rows, v_rows, info, pack.memory)] + [store.nbytes if store is not None else 0]
    n_out = n_tokens * q.shape[1] * pack.shapes[V][1] * 4
    # Zeroed by ffi.new: a struct passed as a dict keeps garbage in the fields that are not named.
    memory = lib.ffi.new(
        "struct ggml_init_params *", {"mem_size": SPARE + 2 * sum(sizes) + 4 * n_out * max(threads, 1)}
    )
    ctx = lib.base.ggml_init(memory[0])
    if not ctx:
        raise NativeError("ggml could not allocate a graph")

    def tensor(array: np.ndarray, kind: int, *shape: int):
        result = lib.base.ggml_new_tensor_4d(ctx, kind, *(*shape, 1, 1, 1)[:4])
        size = lib.base.ggml_nbytes(result)
        lib.ffi.memmove(lib.base.ggml_get_data(result), np.ascontiguousarray(array), size)
        return result

    try:
        cells = []
        for side, rows in ((K, k_rows), (V, v_rows)):
            (n_head, d), kind = pack.shapes[side], pack.type(side)
            cache = tensor(rows, kind, n_head * d, n_cells)
            strides = (rows.shape[1], lib.base.ggml_row_size(kind, d), rows.size)
            cells.append(lib.base.ggml_view_4d(ctx, cache, d, n_cells, n_head, 1, *strides, 0))
        queries = tensor(q.astype(np.float32).transpose(1, 0, 2), F32, q.shape[2], n_tokens, q.shape[1])
        whole = lib.base.ggml_new_tensor_1d(ctx, I8, pack.memory.size + 64)  # kernels want a multiple of 64
        offset = -int(lib.ffi.cast("uintptr_t", lib.base.ggml_get_data(whole))) % 64
        tables = lib.base.ggml_view_1d(ctx, whole, pack.memory.size, offset)
        lib.ffi.memmove(lib.base.ggml_get_data(tables), pack.memory, pack.memory.size)
        params = lib.ffi.new(
            "struct ggml_kvtc_attn_params *",
            {
                "scale": scale,
                "logit_softcap": softcap,
                "n_sink": sinks,
                "n_window": window,
                "n_slots": n_cells,
                "n_span": span,
            },
        )
        null = lib.ffi.NULL
        rows = null if store is None else tensor(store, F16, store.size)
        numbers = tensor(info, I32, info.size)
        result = lib.base.ggml_kvtc_attn(ctx, queries, *cells, null, null, tables, numbers, rows, null, null, params[0])
        graph = lib.base.ggml_new_graph(ctx)
        lib.base.ggml_build_forward_expand(graph, result)
        status = lib.cpu.ggml_graph_compute_with_ctx(ctx, graph, threads)
        if status != 0:
            raise NativeError(f"ggml ended the attention with status {status}")
        out = np.frombuffer(lib.ffi.buffer(lib.base.ggml_get_data(result), n_out), np.float32).copy()
        return out.reshape(n_tokens, q.shape[1], -1)
    finally:
        lib.base.ggml_free(ctx)


def check_shapes(
    pack: Pack,
    q: np.ndarray,
    rows: tuple[np.ndarray, np.ndarray],
    n_queries: tuple[int, ...],
    n_cells: tuple[int, ...],
    exact: tuple[np.ndarray, np.ndarray] | None,
) -> None:
    """Raises ValueError unless all fits together: ggml would end the process."""
    if not all(pack.bits):
        raise ValueError("both sides of the pack must be coded")
    (heads, d), cells = pack.shapes[K], len(rows[K])
    if pack.shapes[V][0] != heads:
        raise ValueError(f"K has {heads} heads, V has {pack.shapes[V][0]}")
    if q.ndim != 3 or not len(q) or q.shape[1] % heads or not q.shape[1] or q.shape[2] != d:
        raise ValueError(f"queries must be [T, a multiple of {heads}, {d}], not {q.shape}")
    if n_queries != (len(q),) or n_cells != (cells,) or not cells:
        raise ValueError(f"{len(q)} queries at {n_queries} positions, {cells} cells at {n_cells}")
    for side in (K, V):
        if rows[side].shape != (cells, pack.row_bytes(side)):
            right = f"[{cells}, {pack.row_bytes(side)}]"
            raise ValueError(f"rows of {'KV'[side]} must be {right}, not {rows[side].shape}")
        if exact is not None and exact[side].shape != (cells, *pack.shapes[side]):
            raise ValueError(f"exact {'KV'[side]} must be {(cells, *pack.shapes[side])}, not {exact[side].shape}")
