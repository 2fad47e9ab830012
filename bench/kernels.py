"""Times of the attention operation on a device: ``python -m bench.kernels llama-8b --depths 1024,131072 -o out.csv``.

KVTC_ATTN and llama.cpp's FLASH_ATTN_EXT on caches of random content, several copies in turn so that no cache stays in
the device's L2. Every row has the bytes that the operation must read, the operations that it must do (`count_products`
and, for codes, `count_rebuild`), and its time over the floor that these set with the device's measured ceilings. The
libraries are those of $KVTC_LIB_DIR, the device is $KVTC_TEST_DEVICE (CUDA0).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from kvtc_gguf.format import Calibration
from kvtc_gguf.reference_rope import Rope
from rich.console import Console

from bench import ceilings
from bench.csv_file import write_csv
from bench.random_model import BITS, SHAPES, Shape, make_side

TESTS = Path(__file__).resolve().parents[1] / "tests"
STOCK = {"f16": (1, 1, 2), "q8_0": (8, 32, 34), "q4_0": (2, 32, 18)}  # ggml type, values and bytes of a block
TYPES = "f16,q8_0,q4_0,k2v4,k3v4,k1v3,k4v4"
SINKS, WINDOW, SLOTS = 4, 128, 196
BLOCK = 2048  # rows of random content, repeated
INT32_MAX = 2**31 - 1
COLUMNS = ("shape", "type", "tokens", "depth", "us", "gb_per_s", "tflop_per_s", "over_floor")
COLUMNS += ("ceiling_gb_per_s", "ceiling_tflop_per_s")
FLASH = """struct ggml_tensor * ggml_flash_attn_ext(struct ggml_context *, struct ggml_tensor * q,
    struct ggml_tensor * k, struct ggml_tensor * v, struct ggml_tensor * mask, float scale, float max_bias,
    float logit_softcap);"""


def load_libraries() -> Any:
    """The tests' binding of ggml; it reads the device's name when it is imported."""
    os.environ.setdefault("KVTC_TEST_DEVICE", "CUDA0")
    sys.path[:0] = [str(TESTS / "native"), str(TESTS / "python")]
    import ffi

    ffi.ffi.cdef(FLASH + ceilings.DECLARATIONS)
    return ffi


def count_products(shape: Shape, tokens: int, depth: int) -> int:
    """Operations of attention's two products: a query head multiplies and adds head_dim numbers for the logit of each
    cell that its token sees, and as many for the sum of values. The last `tokens` cells are the tokens' own."""
    return 4 * shape.n_head * shape.head_dim * (tokens * depth - tokens * (tokens - 1) // 2)


def count_rebuild(shape: Shape, depth: int) -> int:
    """Operations that turn each cell's key components back into channels, once for each kv head."""
    return 2 * shape.n_head_kv * shape.head_dim**2 * depth


def causal(tokens: int, depth: int) -> np.ndarray:
    """Mask f16 [tokens, depth] of the last `tokens` cells."""
    mask = np.zeros((tokens, depth), np.float16)
    for t in range(tokens):
        mask[t, depth - tokens + t + 1 :] = -np.inf
    return mask


def time_nodes(ffi: Any, graph: Any, nodes: list[Any], repeats: int = 20) -> float:
    """Seconds of one node: the median over repeated runs of all of them."""
    backend = ffi.device()[1]
    compute = ffi.base.ggml_new_graph(graph.ctx)
    for node in nodes:
        ffi.base.ggml_build_forward_expand(compute, node)
    buffer = ffi.base.ggml_backend_alloc_ctx_tensors(graph.ctx, backend)
    try:
        for tensor, data in graph.waiting:
            ffi.base.ggml_backend_tensor_set(tensor, ffi.pointer(data), 0, data.size)
        seconds = []
        for _ in range(repeats + 4):  # the first ones warm up
            started = time.perf_counter()
            ffi.base.ggml_backend_graph_compute(backend, compute)
            ffi.base.ggml_backend_synchronize(backend)
            seconds.append(time.perf_counter() - started)
        return float(np.median(seconds[4:])) / len(nodes)
    finally:
        ffi.base.ggml_backend_buffer_free(buffer)


def parse_kinds(name: str) -> tuple[int | str, int | str]:
    """K and V of "k<a>v<b>" or "turbo<b>"."""
    return (name, name) if name.startswith("turbo") else (int(name[1]), int(name[3]))


def time_kvtc(
    ffi: Any, shape: Shape, kinds: tuple[int | str, int | str], depth: int, tokens: int, copies: int, masked: bool
) -> float:
    """Seconds of KVTC_ATTN with sinks, window and the batch's own tokens exact, as kvtc types have them; masked: with a
    mask, which models give where positions do not tell what a token sees."""
    import ggml_graph
    import synthetic
    from kvtc_gguf import reference_turbo
    from sides import bits_of, is_turbo, size_of, type_of

    rng = np.random.default_rng(0)
    d, heads = shape.head_dim, shape.n_head_kv
    sides = {side: make_side(rng, shape, side) for side in "kv"}
    calibration = Calibration(
        "0" * 16, shape.architecture, 1, list(BITS), {0: sides}, "random", 0, "bench", "2026-01-01"
    )
    with tempfile.TemporaryDirectory() as folder:
        native = ffi.native(calibration, Path(folder))
    for side, kind in enumerate(kinds):
        if is_turbo(kind):
            native = native.with_turbo(side, bits_of(kind), heads, d)
            sides["kv"[side]] = reference_turbo.side(heads, d, bits_of(kind))
    pack = native.pack(0, *map(bits_of, kinds))
    if not is_turbo(kinds[0]):
        rope = Rope(d, shape.architecture != "llama", freq_base=shape.rope_base, freq_scale=1 / shape.rope_factor)
        ffi.set_rope(pack, rope, d)
    cells = np.stack([np.arange(depth), np.full(depth, -1)], axis=1).astype(np.int32)
    old = max(SINKS, depth - tokens - WINDOW)
    cells[:SINKS, 1] = np.arange(SINKS)
    cells[old : depth - tokens, 1] = SINKS + np.arange(depth - tokens - old)
    cells[depth - tokens :, 1] = -2 - np.arange(tokens)
    rows = []
    for side, kind in enumerate(kinds):
        z = synthetic.draw(rng, sides["kv"[side]], BLOCK)
        block = ffi.encode_rows(pack, side, z, size_of(kind, heads, d))
        rows.append(np.tile(block, (-(-depth // BLOCK), 1))[:depth])
    with ggml_graph.graph(4) as g:
        mask, packed = g.tensor(causal(tokens, depth)) if masked else ffi.ffi.NULL, g.pack(pack)
        info = g.tensor(np.concatenate([cells.reshape(-1), np.arange(depth - tokens, depth, dtype=np.int32)]))
        exact = g.tensor(rng.standard_normal(2 * SLOTS * heads * d).astype(np.float16))
        batch = [g.tensor(rng.standard_normal((heads, tokens, d)).astype(np.float32)) for _ in kinds]
        numbers = {"scale": d**-0.5, "n_sink": SINKS, "n_window": WINDOW, "n_slots": SLOTS, "limits": ffi.limits(pack)}
        numbers["n_span"] = 0 if masked else INT32_MAX
        params = ffi.ffi.new("struct ggml_kvtc_attn_params *", numbers)
        nodes = []
        for _ in range(copies):
            views = []
            for content, kind in zip(rows, map(type_of, kinds), strict=True):
                cache = g.rows(kind, ffi.base.ggml_kvtc_row_values(kind, heads, d), content)
                strides = content.shape[1], ffi.base.ggml_row_size(kind, d), content.size
                views.append(ffi.base.ggml_view_4d(g.ctx, cache, d, depth, heads, 1, *strides, 0))
            q = g.tensor(rng.standard_normal((1, shape.n_head, tokens, d)).astype(np.float32))
            tensors = q, *views, mask, ffi.ffi.NULL, packed, info, exact, *batch
            nodes.append(ffi.base.ggml_kvtc_attn(g.ctx, *tensors, params[0]))
        return time_nodes(ffi, g, nodes)


def time_stock(ffi: Any, shape: Shape, name: str, depth: int, tokens: int, copies: int) -> float:
    """Seconds of FLASH_ATTN_EXT with K and V of an ordinary type."""
    import ggml_graph

    rng = np.random.default_rng(0)
    d, heads = shape.head_dim, shape.n_head_kv
    kind, values, size = STOCK[name]
    block = rng.integers(0, 256, (BLOCK, heads * d // values, size), np.uint8)
    block[:, :, :2] = rng.normal(0, 0.01, block.shape[:2]).astype(np.float16)[:, :, None].view(np.uint8)
    content = np.tile(block.reshape(BLOCK, -1), (-(-depth // BLOCK), 1))[:depth]
    row = ffi.base.ggml_row_size(kind, d)
    with ggml_graph.graph(4) as g:
        mask, nodes = g.tensor(causal(tokens, depth)), []
        for _ in range(copies):
            views = []
            for _ in range(2):
                cache = g.rows(kind, heads * d, content)
                strides = row * heads, row, row * heads * depth
                views.append(ffi.base.ggml_view_4d(g.ctx, cache, d, depth, heads, 1, *strides, 0))
            q = g.tensor(rng.standard_normal((1, shape.n_head, tokens, d)).astype(np.float32))
            nodes.append(ffi.base.ggml_flash_attn_ext(g.ctx, q, *views, mask, d**-0.5, 0.0, 0.0))
        return time_nodes(ffi, g, nodes)


def print_row(kind: str, tokens: int, depth: int, us: float, over_floor: float) -> None:
    Console().print(f"{kind} {tokens} tokens, {depth} cells: {us:.1f} µs, {over_floor:.1f} x floor")


def combine(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Rows of `COLUMNS` of several runs as one table, as the first has them: medians, and what follows."""
    keys = ["shape", "type", "tokens", "depth"]
    rows = tables[0].set_index(keys)
    faster = rows["us"] / pd.concat(tables).groupby(keys)["us"].median()
    rows[["gb_per_s", "tflop_per_s"]] = rows[["gb_per_s", "tflop_per_s"]].mul(faster, axis=0)
    rows[["us", "over_floor"]] = rows[["us", "over_floor"]].div(faster, axis=0)
    return rows.reset_index()[list(COLUMNS)]


def run_processes(count: int, arguments: list[object], bandwidth: float, rate: float) -> pd.DataFrame:
    """Rows of several processes with these arguments; the first one's ceilings are all of theirs."""
    tables: list[pd.DataFrame] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        for _ in range(count):
            command = [sys.executable, "-m", "bench.kernels", *arguments, "--bandwidth", bandwidth, "--rate", rate]
            if code := subprocess.run([*map(str, command), "-o", str(path)]).returncode:
                raise typer.Exit(code)
            tables.append(pd.read_csv(path))
            bandwidth, rate = tables[0][["ceiling_gb_per_s", "ceiling_tflop_per_s"]].iloc[0]
    return combine(tables)


def main(
    shape: Annotated[str, typer.Argument(help=f"One of {', '.join(SHAPES)}.")],
    depths: Annotated[str, typer.Option(help="Cells, separated by commas.")] = "1024,4096,16384,65536,131072,524288",
    tokens: Annotated[str, typer.Option(help="Tokens of a batch, separated by commas.")] = "1,512",
    masked: Annotated[bool, typer.Option(help="KVTC_ATTN with a mask: several sequences in one stream.")] = False,
    types: Annotated[str, typer.Option(help="f16, q8_0, q4_0, turbo<b> or k<a>v<b>.")] = TYPES,
    bandwidth: Annotated[float, typer.Option(help="GB/s of the device's memory for the floor; 0: measured.")] = 0.0,
    rate: Annotated[float, typer.Option(help="TFLOP/s of its f16 products for the floor; 0: measured.")] = 0.0,
    processes: Annotated[int, typer.Option(min=1, help="Medians of so many: some are slower than others.")] = 1,
    output: Annotated[Path | None, typer.Option("-o", help="CSV to write.")] = None,
) -> None:
    """Time the attention operation by depth."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"unknown shape {shape}: use one of {', '.join(SHAPES)}")
    if processes > 1:
        more = ["--masked"] if masked else []
        options = [shape, "--depths", depths, "--tokens", tokens, "--types", types, *more]
        table = run_processes(processes, options, bandwidth, rate)
        Console().print(f"medians of {processes}:")
        for row in table.itertuples():
            print_row(row.type, row.tokens, row.depth, row.us, row.over_floor)
        if output:
            write_csv(output, COLUMNS, table.to_dict("records"))
        return
    ffi, s, rows = load_libraries(), SHAPES[shape], []
    from sides import is_turbo, size_of

    limits = ceilings.Ceilings(bandwidth, rate)
    if not (bandwidth and rate):
        found = ceilings.measure(ffi, time_nodes)
        limits = ceilings.Ceilings(bandwidth or found.bandwidth, rate or found.rate)
    Console().print(f"ceilings: {limits.bandwidth:.0f} GB/s, {limits.rate:.0f} TFLOP/s")
    for n_tokens in map(int, tokens.split(",")):
        for depth in map(int, depths.split(",")):
            copies = 2 if n_tokens > 16 else max(2, min(16, (1 << 19) // depth))
            for name in types.split(","):
                values = s.n_head_kv * s.head_dim * depth
                operations = count_products(s, n_tokens, depth)
                if name in STOCK:
                    seconds = time_stock(ffi, s, name, depth, n_tokens, copies)
                    size = 2 * values * STOCK[name][2] // STOCK[name][1]
                else:
                    kinds = parse_kinds(name)
                    seconds = time_kvtc(ffi, s, kinds, depth, n_tokens, copies, masked)
                    size = depth * sum(size_of(kind, s.n_head_kv, s.head_dim) for kind in kinds)
                    operations += 0 if is_turbo(kinds[0]) else count_rebuild(s, depth)  # turbo's keys are not rebuilt
                floor = limits.floor(size, operations)
                rows.append((shape, name, n_tokens, depth, seconds * 1e6, size / seconds / 1e9,
                             operations / seconds / 1e12, seconds / floor, limits.bandwidth, limits.rate))  # fmt: skip
                print_row(name, n_tokens, depth, seconds * 1e6, seconds / floor)
    if output:
        write_csv(output, COLUMNS, rows)


if __name__ == "__main__":
    typer.run(main)
