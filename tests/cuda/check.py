"""The kernels of a device against the numpy twin: ``python -m tests.cuda.check --device CUDA0``.

Needs no pytest, so that it runs wherever the libraries and a device are ($KVTC_LIB_DIR names their folder). Every case
runs twice, with its result poisoned before, and must give the same bytes and a finite result near the f64 reference.
Failures caught: all that tests/native/test_attention.py and test_codec.py name, on kernels with other tiles and orders.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import typer

from tests.cuda.cases import cases, quick_cases

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "native"), str(HERE.parent / "python"), str(HERE.parents[1] / "python")]
NMSE = 1e-5  # the bound of test-backend-ops is 5e-4; f16 operands leave about 1e-6
# A key's gain is rounded to f16, which changes its logit by up to 2^-11: more where these cases' logits are large.
LARGE_LOGITS = tuple(
    f"few {d}, {name}" for d in (64, 128) for name in ("cells 20000", "sparse", "interleaved", "many slabs, window")
)
LARGE_NMSE = 5e-5


def check_attention(case: object) -> float:
    """NMSE of a case; an assertion says what else is wrong."""
    from attention_case import Inputs, expected, run

    x = Inputs(case)
    first, second = run(x), run(x)
    assert np.isfinite(first).all(), f"{(~np.isfinite(first)).mean():.1%} of the result is not finite"
    assert first.tobytes() == second.tobytes(), "two runs differ"
    right = expected(x)
    return float(((first - right) ** 2).sum() / (right**2).sum())


def check_chunks(case: object) -> float:
    """The same with so little scratch that cells come in many chunks, whose sums are folded before the last."""
    os.environ["GGML_KVTC_SCRATCH_MIB"] = "1"
    try:
        return check_attention(case)
    finally:
        del os.environ["GGML_KVTC_SCRATCH_MIB"]


def check_store(case: object) -> float:
    """NMSE of attention whose batch is then written over exact rows that it reads, perhaps by its last kernel."""
    from attention_case import Inputs, expected, run_and_store

    x = Inputs(case)
    n = case.streams * case.tokens
    idxs = x.slot[x.slot >= 0][:n].astype(np.int64)
    assert len(idxs) == n, "the store has too few rows"
    idxs[3::4] = -1
    out, stores = run_and_store(x, idxs)
    right = expected(x)
    for side, start in ((0, 0), (1, stores[0].size)):
        store = x.store[start : start + stores[side].size].reshape(stores[side].shape).copy()
        store[:, idxs[idxs >= 0]] = x.batch_z(side).transpose(1, 0, 2)[:, idxs >= 0].astype(np.float16)
        assert stores[side].tobytes() == store.tobytes(), f"exact rows of side {side} differ"
    return float(((out - right) ** 2).sum() / (right**2).sum())


def layers(d: int) -> dict[str, dict[str, object]]:
    """What `check_layer` varies."""
    from kvtc_gguf.reference_rope import Rope

    # so that attention leaves one processor: the write of the token's codes then waits for it to begin
    many = {"many slabs": {"heads": 2, "n_kv": 148_000, "empty": 0}} if d in (64, 128) else {}
    if d == 256:
        rope = Rope(d, neox=True, freq_base=1e6, freq_scale=0.125)
        many = {"slow pairs": {"heads": 16, "n_kv": 3100, "window": 60, "exact": "some", "rope": rope}}
    return many | {
        "short": {},
        "alone": {"n_kv": 64, "empty": 63},
        "long": {"n_kv": 9000, "window": 60, "exact": "some"},
        "window 1": {"n_kv": 700, "window": 1},
        "batch alone": {"exact": "batch"},
        "shuffled, softcap, sinks": {"n_kv": 500, "order": "shuffled", "softcap": 20.0, "sink_logits": True},
        "normal 40 of them": {"rope": Rope(40, neox=False)},
        "yarn": {"rope": Rope(d, neox=True, freq_scale=0.25, ext_factor=1.0, n_ctx_orig=512)},
        "no rope": {"rope": None},
        "far": {"start": 999_900},
        "all seen": {"empty": 0, "mask": "none"},
    }


def check_layer(case: object) -> float:
    """NMSE of attention of one token and of the nodes that make its key and value, beside each other and behind.

    Beside, the graph runs as it is, is captured, and is replayed.
    """
    from attention_case import Inputs, expected, run_layer

    x = Inputs(case)
    x.q *= 0.02  # so that no other cell has all the weight
    beside = run_layer(x, times=4)
    os.environ["GGML_KVTC_BESIDE"] = "0"
    try:
        behind = run_layer(x, shift=1 << 16)
    finally:
        del os.environ["GGML_KVTC_BESIDE"]
    # the token's own vectors count as they were before coding, not rounded to f16
    assert (beside != behind).any(), "attention ran behind the nodes that it could run beside"
    right = expected(x)
    return max(float(((out - right) ** 2).sum() / (right**2).sum()) for out in (beside, behind))


def check_rows(n_head: int, d: int, kind: int | str) -> float:
    """Fraction of bytes of coded rows that differ from the CPU's, for the same z; exact rows must be equal.

    A kind is the bits of a kvtc type or "turbo<bits>".
    """
    import ffi
    import ggml_graph
    import synthetic
    from sides import bits_of, coded_sides, size_of, type_of

    native, own = coded_sides(n_head, ((kind, d), (kind, d)))
    pack = native.pack(0, bits_of(kind), bits_of(kind))
    rng = np.random.default_rng(bits_of(kind))
    values = ffi.base.ggml_kvtc_row_values(type_of(kind), n_head, d)
    n, n_rows = 150, 200
    where = rng.permutation(n_rows)[:n].astype(np.int64)
    where[::7] = -1
    different = 0.0
    for side in (ffi.K, ffi.V):
        z = synthetic.draw(rng, own[side][0], n)
        z[3] = 0.0
        z[5] *= np.float32(1e6)
        right = np.full((n_rows, size_of(kind, n_head, d)), 0xFF, np.uint8)
        right[where[where >= 0]] = ffi.encode_rows(pack, side, z, right.shape[1])[where >= 0]
        with ggml_graph.graph(64) as g:
            cache = g.rows(type_of(kind), values, np.full_like(right, 0xFF))
            tensors = g.tensor(z.transpose(1, 0, 2)), g.tensor(where), g.pack(pack)
            rows = g.compute(ffi.base.ggml_kvtc_set_rows(g.ctx, cache, *tensors, side), 1).reshape(right.shape)
        different = max(different, float((rows != right).mean()))
        exact = np.full((n_head, n_rows, d), -1.0, np.float16)
        right = exact.copy()
        with np.errstate(over="ignore"):  # f16 has no numbers as large
            right[:, where[where >= 0]] = z.transpose(1, 0, 2)[:, where >= 0].astype(np.float16)
        with ggml_graph.graph(64) as g:
            tensors = g.tensor(exact), g.tensor(z.transpose(1, 0, 2)), g.tensor(where), g.pack(pack)
            stored = g.compute(ffi.base.ggml_kvtc_set_rows(g.ctx, *tensors, side), 1, poison=False)
        assert stored.tobytes() == right.tobytes(), "exact rows differ"
    return different


def check_write(n_head: int, d: int, kinds: tuple[int | str, int | str], n_tokens: int) -> float:
    """NMSE of the z of keys and values as a decoded token is written; its codes must be those of that z, byte for byte.

    The graph is the one of llama_kvtc::store, which a device may run as one kernel.
    """
    import ffi
    import ggml_graph
    import synthetic
    from attention_case import transform
    from sides import bits_of, coded_sides, size_of, type_of

    native, own = coded_sides(n_head, ((kinds[0], d), (kinds[1], d)))
    pack = native.pack(0, *map(bits_of, kinds))
    rng = np.random.default_rng(bits_of(kinds[0]) + n_tokens)
    where = rng.permutation(40)[:n_tokens].astype(np.int64)
    where[3::4] = -1
    error = 0.0
    with ggml_graph.graph(64) as g:
        results, right = [], []
        for side in (ffi.K, ffi.V):
            matrix, bias = native.encode_matrix(0, side)
            z = synthetic.draw(rng, own[side][0], n_tokens)  # [tokens, heads, d]
            x, _, total = transform(g, native, side, z)
            right.append(np.einsum("hij,thj->hti", matrix.astype(float), x) + bias[:, None])
            kind = type_of(kinds[side])
            values, size = ffi.base.ggml_kvtc_row_values(kind, n_head, d), size_of(kinds[side], n_head, d)
            cache = g.rows(kind, values, np.full((40, size), 0xFF, np.uint8))
            rows = ffi.base.ggml_kvtc_set_rows(g.ctx, cache, total, g.tensor(where), g.pack(pack), side)
            results += [total, rows]
        out = g.compute_all(results, 1, poison=False)
    for side in (ffi.K, ffi.V):
        z = out[2 * side].view(np.float32).reshape(n_head, n_tokens, d)
        error = max(error, float(((z - right[side]) ** 2).sum() / (right[side] ** 2).sum()))
        size = size_of(kinds[side], n_head, d)
        expected = np.full((40, size), 0xFF, np.uint8)
        rows = ffi.encode_rows(pack, side, np.ascontiguousarray(z.transpose(1, 0, 2)), size)
        expected[where[where >= 0]] = rows[where >= 0]
        assert out[2 * side + 1].tobytes() == expected.tobytes(), f"codes of side {side} differ"
    return error


def main(device: str = "CUDA0", only: str = "", quick: bool = False, part: str = "0/1") -> None:
    """Check the kernels of DEVICE; --only takes cases whose names hold a text, --quick some of each kind, --part I/N of
    these every N-th from the I-th on."""
    os.environ["KVTC_TEST_DEVICE"] = device
    import ffi

    print(f"{device}: {ffi.ffi.string(ffi.base.ggml_backend_dev_description(ffi.device()[0])).decode()}")
    started, failures, count, worst = time.monotonic(), 0, 0, 0.0
    bounds = {True: LARGE_NMSE, False: NMSE}
    work = [
        (name, bounds[name.startswith(LARGE_LOGITS)], lambda case=case: check_attention(case)) for name, case in cases()
    ]
    for heads, d in ((1, 64), (3, 64), (2, 80), (1, 96), (8, 128), (1, 256), (4, 256), (1, 512)):
        for kind in (*range(1, 7), "turbo2", "turbo3", "turbo4"):
            work.append((f"rows {heads} x {d} {kind}", 0.0, lambda a=(heads, d, kind): check_rows(*a)))
            for n_tokens in (1, 5, 37):
                name = f"write {heads} x {d} {kind} {n_tokens} tokens"
                work.append((name, NMSE, lambda a=(heads, d, (kind, kind), n_tokens): check_write(*a)))
        for kinds in ((2, "turbo3"), ("turbo4", 3)):
            name = f"write {heads} x {d} {kinds[0]} and {kinds[1]}"
            work.append((name, NMSE, lambda a=(heads, d, kinds, 2): check_write(*a)))
    for d in (64, 80, 96, 128, 256):
        for tokens, streams, group in ((1, 1, 1), (1, 1, 4), (3, 1, 2), (1, 3, 3), (16, 1, 4), (16, 1, 8), (40, 1, 4)):
            from attention_case import Case
            from kvtc_gguf.reference_rope import Rope

            case = Case(
                dk=d,
                tokens=tokens,
                streams=streams,
                group=group,
                n_kv=300,
                window=250,
                exact="store",
                rope=Rope(d, neox=True),
            )
            for k, v in ((2, 3), ("turbo3", "turbo2"), ("turbo4", 3), (3, "turbo4")):
                name = f"store head_dim {d} tokens {tokens} streams {streams} group {group}, {k} and {v}"
                work.append((name, NMSE, partial(check_store, replace(case, k=k, v=v))))
            if tokens == 1:
                for name, extra in layers(d).items():
                    layer = replace(case, **{"mask": "span", "k": 2, "v": 4, **extra})
                    name = f"layer head_dim {d} streams {streams} group {group}, {name}"
                    work.append((name, NMSE, partial(check_layer, layer)))
    for tokens, n_kv, exact in ((40, 5000, "some"), (40, 5000, "none"), (300, 9000, "store")):
        from attention_case import Case

        case = Case(tokens=tokens, n_kv=n_kv, exact=exact, window=200)
        for k, v in ((2, 3), ("turbo3", "turbo2"), (3, "f16")):
            name = f"chunks tokens {tokens} exact {exact}, {k} and {v}"
            work.append((name, NMSE, partial(check_chunks, replace(case, k=k, v=v))))
    first, step = map(int, part.split("/"))
    taken = quick_cases([x[0] for x in work]) if quick else range(len(work))
    chosen = [work[i] for i in taken if only in work[i][0]]
    for name, bound, run in chosen[first::step]:
        count += 1
        try:
            error = run()
            worst = max(worst, error)
            problem = None if error <= bound else f"error {error:.2e}"
        except AssertionError as wrong:
            problem = str(wrong)
        if problem:
            failures += 1
            print(f"FAILED {name}: {problem}", flush=True)
    print(f"{count} cases, {failures} failed, largest error {worst:.1e}, {time.monotonic() - started:.0f} s")
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    typer.run(main)
