"""Saved states: what they take on disk, how fast they load, and what other coders would make of them.

``python -m bench.states MODEL... -o results.csv`` evaluates held-out text with every cache, saves its sequence at some
lengths, restores it, compares the greedy continuation and saves it again. (A cache of a sliding window has its cells in
other places after a restore, f16's too: sums then round otherwise, and greedy text may part.) ``--coders`` also
measures zstd, zlib, LZMA and the order-0 entropy on the same rows, a core each (zstd needs the package zstandard);
``--no-others`` leaves out all but zstd of the f16 files and the entropy, which takes minutes off.
"""

from __future__ import annotations

import ctypes
import lzma
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from kvtc_gguf import state
from kvtc_gguf.capture import library
from kvtc_gguf.native.rows import RowCodec
from kvtc_gguf.reference_rows import HALF, RowModel
from kvtc_gguf.state_file import Section, container_bytes, read

from bench import heldout, machine
from bench.caches import Cache
from bench.csv_file import write_csv

TYPES = {"f16": 1, "q8_0": 8, **{f"kvtc{bits}": 42 + bits for bits in range(1, 7)}}
BATCH, CONTINUE, REPEAT = 512, 64, 5  # tokens; best of


class Engine:
    """A model in the built libllama."""

    def __init__(self, path: Path, threads: int) -> None:
        self.api, self.threads = library.load()[0], threads
        self._silent = self.api.llama_log_callback(lambda *_: None)
        self.api.llama_log_set(self._silent, None)
        self.api.llama_backend_init()
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self.api.llama_model_load_from_file(str(path).encode(), params)
        self.vocab = self.api.llama_model_get_vocab(self.model)

    def tokenize(self, text: bytes, n: int) -> list[int]:
        out = (ctypes.c_int32 * len(text))()
        count = self.api.llama_tokenize(self.vocab, text, len(text), out, len(text), True, False)
        if count < n:
            raise typer.BadParameter(f"the text has {count} tokens, {n} are needed")
        return list(out[:n])

    @contextmanager
    def context(self, cache: tuple[str, str], n: int) -> Iterator[Context]:
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n, BATCH, BATCH, 1
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k, params.type_v = (TYPES[name] for name in cache)
        params.flash_attn_type = 1
        params.swa_full = False
        pointer = self.api.llama_init_from_model(self.model, params)
        try:
            yield Context(self, pointer)
        finally:
            self.api.llama_free(pointer)


@dataclass
class Context:
    engine: Engine
    pointer: int

    def decode(self, tokens: list[int], start: int, logits: bool = False) -> np.ndarray | None:
        api, batch = self.engine.api, self.engine.api.llama_batch_init(len(tokens), 0, 1)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = int(logits and i + 1 == len(tokens))
        batch.n_tokens = len(tokens)
        assert api.llama_decode(self.pointer, batch) == 0
        api.llama_synchronize(self.pointer)
        api.llama_batch_free(batch)
        n_vocab = api.llama_vocab_n_tokens(self.engine.vocab)
        return np.ctypeslib.as_array(api.llama_get_logits_ith(self.pointer, -1), (n_vocab,)) if logits else None

    def greedy(self, first: int, start: int, n: int) -> list[int]:
        out = [first]
        for i in range(n):
            out.append(int(self.decode(out[-1:], start + i, True).argmax()))
        return out[1:]

    def cut(self, n: int) -> None:
        """Positions from n on are removed."""
        api = self.engine.api
        assert api.llama_memory_seq_rm(api.llama_get_memory(self.pointer), 0, n, -1)

    def save(self, path: Path, tokens: list[int]) -> None:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        assert self.engine.api.llama_state_seq_save_file(self.pointer, str(path).encode(), 0, array, len(tokens))

    def restore(self, path: Path, n: int) -> None:
        array, count = (ctypes.c_int32 * n)(), ctypes.c_size_t(0)
        name = str(path).encode()
        assert self.engine.api.llama_state_seq_load_file(self.pointer, name, 0, array, n, ctypes.byref(count))


def best(work: Callable[[], object]) -> float:
    """Seconds, the least of REPEAT runs."""
    times = []
    for _ in range(REPEAT):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def entropy(model: RowModel, rows: np.ndarray) -> float:
    """Bits that the fields of rows u8 [n, row_bytes] take at the order-0 entropy of each, noise bytes whole."""
    planes, bit, total = np.unpackbits(rows, axis=1, bitorder="little"), 0, 0.0
    for run in model.runs:
        for _ in range(run.count):
            own = planes[:, bit + run.bits - run.table_bits : bit + run.bits]
            counts = np.bincount(own @ (1 << np.arange(own.shape[1])), minlength=1)
            p = counts[counts > 0] / len(rows)
            total += len(rows) * (-(p * np.log2(p)).sum() + (8 if run.kind == HALF else 0)) if run.table_bits else 0
            bit += run.bits
    return total


def decoding(section: Section) -> float:
    """CPU seconds of this thread to decode the coded blocks of a section, the least of REPEAT runs."""
    if not section.model.coder:
        return 0.0
    codec, times = RowCodec.read(section.model.data), []
    for _ in range(REPEAT):
        start = time.thread_time()
        for block in section.blocks:
            if block.coder:
                codec.decode(block.data, block.n_rows)
        times.append(time.thread_time() - start)
    return min(times)


def coders(sections: list[Section], what: tuple[int, ...]) -> dict[str, float]:
    """Bytes and decoding speed, MB of rows a second and core, of the rows of some sections under other coders."""
    own = [s for s in sections if s.model.what in what]
    rows = [np.concatenate(list(state.rows_of(s))) for s in own]
    models = [s.row_model() for s in own]
    raw = sum(r.nbytes for r in rows)
    out = {"rows": raw, "coded": sum(s.size for s in own), "model": sum(len(s.model.data) for s in own)}
    out["entropy"] = sum(entropy(m, r) for m, r in zip(models, rows, strict=True) if m) / 8

    out["coded MB/s"] = raw / sum(map(decoding, own)) / 1e6
    for section, r in zip(own, rows, strict=True):
        if section.model.coder:
            codec = RowCodec.read(section.model.data)
            start = time.perf_counter()
            codec.encode(r[:1024])
            out["encode s"] = out.get("encode s", 0.0) + (time.perf_counter() - start) * len(r) / len(r[:1024])
    out["encode MB/s"] = raw / out.pop("encode s") / 1e6
    return out


def packers() -> dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]]:
    """Pack and unpack, by name."""
    found: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
        "zlib 6": (lambda b: zlib.compress(b, 6), zlib.decompress),
        "lzma 6": (lambda b: lzma.compress(b, preset=6), lzma.decompress),
    }
    try:
        import zstandard
    except ImportError:
        return found
    for level in (3, 19):
        found[f"zstd {level}"] = zstandard.ZstdCompressor(level=level).compress, zstandard.ZstdDecompressor().decompress
    return found


def others(sections: list[Section], what: tuple[int, ...]) -> dict[str, float]:
    """What general coders make of the same rows, and of their columns: bytes of one place of all rows side by side."""
    rows = [np.concatenate(list(state.rows_of(s))) for s in sections if s.model.what in what]
    raw, out = sum(r.nbytes for r in rows), {}
    for name, (pack, unpack) in packers().items():
        for kind, parts in (("rows", rows), ("columns", [np.ascontiguousarray(r.T) for r in rows])):
            packed = [pack(part.tobytes()) for part in parts]
            start = time.perf_counter()
            for part in packed:
                unpack(part)
            out[f"{name} {kind}"] = sum(map(len, packed))
            out[f"{name} {kind} MB/s"] = raw / (time.perf_counter() - start) / 1e6
    return out


def measure(
    engine: Engine, caches: list[str], tokens: list[int], lengths: list[int], kept: tuple[bool, bool], keep: Path
) -> Iterator[dict[str, object]]:
    """Rows (cache, tokens, metric, value) of one model. kept: whether coders, and other coders, are measured too."""
    with_coders, with_others = kept
    n_ctx = max(lengths) + CONTINUE + 2
    for cache in caches:
        sides = Cache(cache).types
        with engine.context((sides[0], sides[1]), n_ctx) as context:
            spent = 0.0
            for at in range(0, max(lengths), BATCH):
                start = time.perf_counter()
                context.decode(tokens[at : at + BATCH], at)
                spent += time.perf_counter() - start
                n = at + BATCH
                if n not in lengths:
                    continue
                path = keep / f"{cache}-{n}.bin"
                row = {"prefill s": spent, "save s": best(lambda: context.save(path, tokens[:n]))}  # noqa: B023
                row["bytes"] = path.stat().st_size
                expected = context.greedy(tokens[n], n, CONTINUE)
                row["restore s"] = best(lambda: context.restore(path, n))  # noqa: B023
                row["continuation identical"] = context.greedy(tokens[n], n, CONTINUE) == expected
                context.restore(path, n)
                again = keep / "again.bin"
                context.save(again, tokens[:n])
                row["saved again identical"] = again.read_bytes() == path.read_bytes()
                if with_coders and "kvtc" in cache:
                    saved = read(path)
                    # layers with a sliding window are a cache of their own
                    for i, items in enumerate(saved.containers):
                        row[f"cache {i}: bytes"] = len(container_bytes(items))
                    sections = saved.sections
                    for name, what in (("codes", (0, 1)), ("exact", (2, 3))):
                        found = coders(sections, what)
                        if with_others and n == min(lengths, key=lambda m: abs(m - 2048)):  # they are slow
                            found |= others(sections, what)
                        row |= {f"{name}: {key}": value for key, value in found.items()}
                elif with_coders and "zstd 3" in packers():
                    row["zstd 3"] = len(packers()["zstd 3"][0](path.read_bytes()))
                for metric, value in row.items():
                    yield {"cache": cache, "tokens": n, "metric": metric, "value": float(value)}


def main(
    models: list[Path],
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV to write")],
    caches: Annotated[str, typer.Option(help="comma-separated")] = "f16,kvtc-k2v4,kvtc-k2v2,kvtc-k1v2",
    lengths: Annotated[str, typer.Option(help="tokens, multiples of 512")] = "512,1024,2048,4096,8192",
    text: Annotated[Path | None, typer.Option(help="held-out text (default: as bench.demo)")] = None,
    threads: Annotated[int, typer.Option("-t")] = machine.find().cores,
    with_coders: Annotated[bool, typer.Option("--coders/--no-coders")] = True,
    with_others: Annotated[bool, typer.Option("--others/--no-others")] = True,
) -> None:
    """Measure saved states and write one figure a row."""
    sizes = [int(n) for n in lengths.split(",")]
    figures, cpu = [], machine.find().cpu
    with tempfile.TemporaryDirectory() as scratch:
        source = heldout.find(Path(scratch), text)
        for path in models:
            engine = Engine(path, threads)
            tokens = engine.tokenize(source.path.read_bytes()[: 12 * max(sizes)], max(sizes) + 1)
            for row in measure(engine, caches.split(","), tokens, sizes, (with_coders, with_others), Path(scratch)):
                figures.append({"cpu": cpu, "threads": threads, "model": path.name, **row})
                print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    write_csv(output, figures[0], figures)


if __name__ == "__main__":
    typer.run(main)
