"""One call of the attention operation: made from a description, run in C and in the f64 reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ffi
import ggml_graph
import gguf
import numpy as np
import synthetic
from kvtc_gguf.reference_attention import CodedCells, PlainCells, alibi_slopes, attention, span_mask
from kvtc_gguf.reference_rope import Rope
from sides import PLAIN, bits_of, coded_sides, is_turbo, size_of, type_of

HIDDEN = np.float16(-np.inf)
SPARE = 7  # cells of a cache behind those that are attended to


@dataclass(frozen=True)
class Case:
    """S streams of n_kv cells; the last T used cells of each are this batch's tokens, which are the queries."""

    k: int | str = 2  # budget of a kvtc type, "turbo<bits>", or a name of PLAIN
    v: int | str = 3
    dk: int = 64
    dv: int | None = None  # None: dk
    heads: int = 2  # kv heads
    group: int = 2  # query heads of one kv head
    tokens: int = 5
    n_kv: int = 100
    empty: int = 9  # of the n_kv cells, at the end
    streams: int = 1
    rope: Rope | None = field(default_factory=lambda: Rope(64, neox=True), hash=False)
    start: int = 0  # position of the first token
    # cells: contiguous, swapped (some neighbours), shuffled, sparse (positions 97 apart), interleaved (two sequences)
    order: str = "contiguous"
    sinks: int = 4
    window: int = 32
    exact: str = "store"  # what is exact: none, store (every token), some (of them), batch (only this batch's own)
    # causal, holes (a third hidden as well), dead (and odd queries see nothing), none; span: no mask, but positions
    mask: str = "causal"
    span: int = 2**31 - 1  # of mask "span": how far back a query sees
    softcap: float = 0.0
    sink_logits: bool = False
    max_bias: float = 0.0
    permuted: bool = False  # q and z in memory as a model's graph has them, heads inside tokens
    seed: int = 0

    @property
    def sides(self) -> tuple[tuple[int | str, int], ...]:
        return (self.k, self.dk), (self.v, self.dv or self.dk)


class Inputs:
    """The numbers of a case, as numpy arrays with streams first."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rng = np.random.default_rng(case.seed)
        self.native, self.own = coded_sides(case.heads, case.sides)
        bits = [bits_of(kind) for kind, _ in case.sides]
        self.pack = self.native.pack(0, *bits)
        if case.rope is not None and bits[0] and not is_turbo(case.k):
            ffi.set_rope(self.pack, case.rope, case.dk)
        shape = (case.streams, case.heads * case.group, case.tokens, case.dk)
        self.q = self.rng.standard_normal(shape).astype(np.float32)
        self._cells()
        self._mask()
        self.z, self.rows, self.plain = [], [], []
        for side, (kind, d) in enumerate(case.sides):
            self._side(side, kind, d)
        self._exact()
        self.sink_logits = None
        if case.sink_logits:
            self.sink_logits = self.rng.normal(1, 2, case.heads * case.group).astype(np.float32)

    def _cells(self) -> None:
        """Positions and sequences of the cells, -1 where empty, and which cells hold the batch."""
        case, used = self.case, self.case.n_kv - self.case.empty
        self.pos = np.full((case.streams, case.n_kv), -1, np.int32)
        self.seq = np.zeros_like(self.pos)
        self.batch = np.zeros((case.streams, case.tokens), np.int64)  # cell of each token
        for stream in range(case.streams):
            where = np.arange(used)
            if case.order == "swapped":
                where[300:-200:350] += 1
                where[301:-199:350] -= 1
            elif case.order != "contiguous":
                where = self.rng.permutation(case.n_kv)[:used]
            token = np.arange(used)
            if case.order == "interleaved":
                self.seq[stream, where] = token % 2
                token = token // 2 + 500 * (token % 2)
            self.pos[stream, where] = case.start + token * (97 if case.order == "sparse" else 1)
            self.batch[stream] = where[used - case.tokens :]
        self.query_pos = np.take_along_axis(self.pos, self.batch, axis=1)

    def _mask(self) -> None:
        case = self.case
        own = np.take_along_axis(self.seq, self.batch, axis=1)
        sees = (self.pos[:, None] >= 0) & (self.pos[:, None] <= self.query_pos[:, :, None])
        sees &= self.seq[:, None] == own[:, :, None]
        if case.mask in ("holes", "dead"):
            sees &= self.rng.random(sees.shape) > 1 / 3
        if case.mask == "dead":
            sees[:, 1::2] = False
        distance = np.clip(self.pos[:, None] - self.query_pos[:, :, None], -60_000, 0) if case.max_bias else 0
        self.mask = np.where(sees, distance, HIDDEN).astype(np.float16)
        if case.mask == "none":
            self.mask[:] = 0
        if case.mask == "span":  # cells of other sequences count as empty, as llama.cpp's side has them
            assert (own == own[:, :1]).all(), "one sequence a stream"
            self.pos[self.seq != own[:, :1]] = -1
            for stream, mask in enumerate(self.mask):
                mask[:] = span_mask(self.query_pos[stream], self.pos[stream], case.span)

    def _side(self, side: int, kind: int | str, d: int) -> None:
        """z [S, n_kv, H, d] and cache rows of a kvtc side; f32 values and rows of an ordinary one."""
        case, n = self.case, self.case.streams * self.case.n_kv
        if self.own[side] is not None:
            z = synthetic.draw(self.rng, self.own[side][0], n)
            rows = ffi.encode_rows(self.pack, side, z, size_of(kind, case.heads, d))
            empty = self.pos.reshape(-1) < 0
            rows[empty] = self.rng.integers(0, 256, rows.shape[1], np.uint8)
            if is_turbo(kind):  # the largest gains there are: what nobody sees must not become infinity
                start = case.heads * d * bits_of(kind) // 8
                rows[empty, start : start + 2 * case.heads] = np.tile([0xFF, 0x7B], case.heads)
            self.z.append(z.reshape(case.streams, case.n_kv, case.heads, d))
            self.plain.append(None)
        else:
            values = self.rng.standard_normal((n, case.heads * d)).astype(np.float32)
            quantization = gguf.GGMLQuantizationType(PLAIN[kind])
            rows = gguf.quants.quantize(values, quantization).view(np.uint8).reshape(n, -1)
            values = rows.view(np.float16).astype(np.float32) if kind == "f16" else values
            values = gguf.quants.dequantize(rows, quantization) if kind == "q8_0" else values
            self.z.append(None)
            self.plain.append(values.reshape(case.streams, case.n_kv, case.heads, d))
        self.rows.append(rows.reshape(case.streams, case.n_kv, -1))

    def _exact(self) -> None:
        """Slots as the info tensor has them; rows of the store that no cell owns are NaN."""
        case = self.case
        self.slot = np.full((case.streams, case.n_kv), -1, np.int32)
        self.n_slots = case.streams * case.n_kv + 5
        if case.exact in ("store", "some"):
            free = self.rng.permutation(self.n_slots)[: self.slot.size].reshape(self.slot.shape)
            keep = self.rng.random(free.shape) < (1.0 if case.exact == "store" else 0.6)
            self.slot = np.where(keep & (self.pos >= 0), free, -1).astype(np.int32)
        if case.exact != "none":
            own = np.arange(case.streams * case.tokens).reshape(case.streams, -1)
            np.put_along_axis(self.slot, self.batch, (-2 - own).astype(np.int32), axis=1)
        parts = []
        for z in self.z:
            if z is not None:
                store = np.full((self.n_slots, *z.shape[2:]), np.nan, np.float16)
                store[self.slot[self.slot >= 0]] = z[self.slot >= 0].astype(np.float16)
                parts.append(store.transpose(1, 0, 2).reshape(-1))
        self.store = np.concatenate(parts)

    def batch_z(self, side: int) -> np.ndarray | None:
        """z of this batch's tokens f32 [S * T, H, d]."""
        z = self.z[side]
        if z is None or self.case.exact == "none":
            return None
        return np.take_along_axis(z, self.batch[:, :, None, None], axis=1).reshape(-1, *z.shape[2:])


def run(x: Inputs, n_threads: int = 1) -> np.ndarray:
    """The operation's result f32 [S, T, n_head, dv]."""
    with ggml_graph.graph(128) as g:
        return of_result(x, g.compute(build(g, x)[0], n_threads))


def run_and_store(x: Inputs, idxs: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The same, and the exact sides f16 [H, n_slots, d] after the batch was written to their rows idxs i64 [S * T]."""
    case = x.case
    with ggml_graph.graph(128) as g:
        result, store, z, pack, _ = build(g, x)
        out, *sides = g.compute_all([result, *write_exact(g, x, store, z, pack, idxs)], 1, poison=False)
        stores = [side.view(np.float16).reshape(case.heads, x.n_slots, -1) for side in sides]
        return of_result(x, out), stores


def run_layer(x: Inputs, *, times: int = 1, shift: int = 0) -> np.ndarray:
    """The same as llama_kvtc's graph has it: the batch's codes are written before, and its exact rows behind it.

    A device may run it beside the nodes that make the batch's z. shift: bytes that come before all tensors, without
    which CUDA may take the graph for one that it has captured.
    """
    case, n = x.case, x.case.streams * x.case.tokens
    with ggml_graph.graph(128) as g:
        if shift:
            g.tensor(np.zeros(shift, np.int8))
        plain, z = zip(*(transform(g, x.native, side, x.batch_z(side))[1:] for side in (ffi.K, ffi.V)), strict=True)
        result, store, _, pack, caches = build(g, x, list(z))
        first = np.arange(case.streams)[:, None] * (case.n_kv + SPARE)
        cells = g.tensor((first + x.batch).reshape(-1))
        writes = [ffi.base.ggml_kvtc_set_rows(g.ctx, caches[s], z[s], cells, pack, s) for s in (ffi.K, ffi.V)]
        exact = write_exact(g, x, store, z, pack, np.full(n, -1, np.int64))
        for write, own in zip(exact, plain, strict=True):
            ffi.base.ggml_kvtc_set_rows_keep(write, own)
        return of_result(x, g.compute_all([*writes, result, *exact], 1, poison=False, times=times)[2])


def write_exact(g: ggml_graph.Graph, x: Inputs, store: Any, z: Sequence[Any], pack: Any, idxs: np.ndarray) -> list[Any]:
    """The nodes that write the batch's z to the rows idxs i64 [S * T] of each side of the exact store."""
    case, nodes, start = x.case, [], 0
    for side, d in enumerate((case.dk, case.dv or case.dk)):
        strides = 2 * d, 2 * d * x.n_slots
        rows = ffi.base.ggml_view_3d(g.ctx, store, d, x.n_slots, case.heads, *strides, start)
        start += 2 * d * x.n_slots * case.heads
        nodes.append(ffi.base.ggml_kvtc_set_rows(g.ctx, rows, z[side], g.tensor(idxs), pack, side))
    return nodes


def transform(g: ggml_graph.Graph, native: ffi.Native, side: int, z: np.ndarray) -> tuple[np.ndarray, Any, Any]:
    """Vectors f32 [n, H, d] whose transform is z [n, H, d], their node, and that of z: llama_kvtc::store's."""
    matrix, bias = native.encode_matrix(0, side)
    x = np.stack([np.linalg.solve(m.astype(float), (z[:, h] - bias[h]).T).T for h, m in enumerate(matrix)], 1)
    x = x.astype(np.float32)
    turned = ffi.base.ggml_permute(g.ctx, g.tensor(x), 0, 2, 1, 3)
    product = ffi.base.ggml_mul_mat(g.ctx, g.tensor(matrix), turned)
    return x, turned, ffi.base.ggml_add(g.ctx, product, g.tensor(bias[:, None]))


def of_result(x: Inputs, out: np.ndarray) -> np.ndarray:
    """The operation's bytes as f32 [S, T, n_head, dv]."""
    case = x.case
    return out.view(np.float32).reshape(case.streams, case.tokens, case.heads * case.group, -1)


def build(g: ggml_graph.Graph, x: Inputs, z: list[Any] | None = None) -> tuple[Any, Any, list[Any], Any, list[Any]]:
    """The operation's node, and of its sources the exact store, the batch's z (if not given), the pack, the caches."""
    case = x.case
    cells, caches = [], []
    for (kind, d), rows in zip(case.sides, x.rows, strict=True):
        kind = type_of(kind)
        # the cache is longer than the view of it
        spare = np.zeros((case.streams, SPARE, rows.shape[2]), np.uint8)
        cache = np.concatenate([rows, spare], axis=1)
        tensor = g.rows(kind, ffi.base.ggml_kvtc_row_values(kind, case.heads, d), cache.reshape(-1, rows.shape[2]))
        caches.append(tensor)
        strides = (rows.shape[2], ffi.base.ggml_row_size(kind, d), cache[0].size)
        cells.append(ffi.base.ggml_view_4d(g.ctx, tensor, d, case.n_kv, case.heads, case.streams, *strides, 0))
    q, mask = g.tensor(x.q), ffi.ffi.NULL
    if case.permuted:
        q = ffi.base.ggml_permute(g.ctx, g.tensor(x.q.transpose(0, 2, 1, 3)), 0, 2, 1, 3)
    if case.mask not in ("none", "span"):
        padded = np.zeros((case.streams, 1, case.tokens + 3, case.n_kv), np.float16)
        padded[:, 0, : case.tokens] = x.mask
        mask = g.tensor(padded)
    batch = [x.batch_z(side) for side in (ffi.K, ffi.V)]
    if z is None and case.permuted:
        z = [b if b is None else ffi.base.ggml_permute(g.ctx, g.tensor(b), 0, 2, 1, 3) for b in batch]
    elif z is None:
        z = [b if b is None else g.tensor(b.transpose(1, 0, 2)) for b in batch]
    z = [ffi.ffi.NULL if b is None else b for b in z]
    info = np.concatenate([np.stack([x.pos, x.slot], axis=2).reshape(-1), x.query_pos.reshape(-1)])
    params = ffi.ffi.new(
        "struct ggml_kvtc_attn_params *",
        {
            "scale": case.dk**-0.5,
            "max_bias": case.max_bias,
            "logit_softcap": case.softcap,
            "n_sink": case.sinks,
            "n_window": case.window,
            "n_slots": x.n_slots,
            "n_span": case.span if case.mask == "span" else 0,
            "limits": ffi.limits(x.pack),
        },
    )
    store = g.tensor(None if case.exact == "none" else x.store)
    pack = g.pack(x.pack)
    tensors = (q, *cells, mask, g.tensor(x.sink_logits), pack, g.tensor(info), store, *z)
    return ffi.base.ggml_kvtc_attn(g.ctx, *tensors, params[0]), store, z, pack, caches


def expected(x: Inputs) -> np.ndarray:
    """The same in f64 [S, T, n_head, dv], by the reference."""
    case, outputs = x.case, []
    n_head = case.heads * case.group
    for stream in range(case.streams):
        sides = []
        for side in (ffi.K, ffi.V):
            if x.own[side] is None:
                sides.append(PlainCells(x.plain[side][stream]))
                continue
            exact = None if case.exact == "none" else x.z[side][stream].astype(np.float16)
            sides.append(CodedCells.of_rows(*x.own[side], x.rows[side][stream], exact, x.slot[stream] != -1))
        outputs.append(
            attention(
                x.q[stream].transpose(1, 0, 2),
                *sides,
                query_positions=x.query_pos[stream],
                cell_positions=x.pos[stream],
                mask=x.mask[stream],
                scale=float(np.float32(case.dk**-0.5)),
                rope=None if is_turbo(case.k) else case.rope,
                sinks=case.sinks,
                window=case.window,
                softcap=case.softcap,
                sink_logits=x.sink_logits,
                slopes=alibi_slopes(n_head, case.max_bias) if case.max_bias else None,
            )
        )
    return np.stack(outputs)
