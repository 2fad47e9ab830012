"""Would components across all layers and heads (the paper's, arXiv 2511.01815) pay for parked caches of kvtc types?

``python -m bench.parked MODEL WORK -o F`` fits bases over all layers as `bench.cross_layer` does, weighted, and codes
the rows of a held-out state with them: f16's own (what could be had at best), or what a live cache's codes decode to
(all that a state tool has). What comes back becomes live codes again, through the calibration's encoder, in a saved
state that llama.cpp restores; KLD is that of the tokens after it against the f16 cache. Beside it, f16's rows go back
into an f16 state: the loss of the components alone. Sizes count everything that a file would hold: exact rows and
cells as the plain container has them, each component's codes at their order-0 entropy, and its table at half of
log2(rows) bits for each value beyond the first; not the bases, which lie with the model. The coded rows lack sinks,
window and what rollbacks keep, whose codes the exact rows give again.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from gguf import GGUFValueType
from kvtc_gguf import format, native, reference, state
from kvtc_gguf.format import SIDES
from kvtc_gguf.model_info import ModelInfo
from kvtc_gguf.reference_rope import Rope
from kvtc_gguf.state_file import MODEL, STORED, Section, read

from bench import heldout, machine
from bench.caches import Cache
from bench.cross_layer import Codec, PlainState, capture, divergence, log_probabilities, rotate, weights
from bench.csv_file import write_csv
from bench.states import BATCH, Engine

SINKS, NEWEST, JUDGED = 4, 128 + 64, 128  # tokens: exact ones, and those after the state whose logits are compared
DEAD = 0.4  # what is added before a component over its step is cut off: fewer ones, which cost more than they are worth


@dataclass(frozen=True)
class Live:
    """A kvtc cache's codes: what they decode to, and back. Rows are keys before RoPE and values."""

    opened: native.Calibration
    calibration: format.Calibration  # the same
    bits: tuple[int, int]

    def decode(self, layer: int, side: int, rows: np.ndarray) -> np.ndarray:
        """f32 [n, H * d] of rows u8 [n, row_bytes]."""
        z = self.opened.pack(layer, *self.bits).decode(side, rows)
        return reference.reconstruct(self.calibration.layers[layer][SIDES[side]], z).reshape(len(rows), -1)

    def encode(self, layer: int, side: int, x: np.ndarray) -> np.ndarray:
        heads = x.reshape(len(x), self.opened.shape(layer, side)[0], -1)
        return self.opened.pack(layer, *self.bits).encode(side, self.opened.transform(layer, side, heads))


def entropy_and_tables(codes: np.ndarray) -> tuple[float, float]:
    """Bits of codes i32 [n, components]: at each component's order-0 entropy, and of what tells it."""
    bits, tables, n = 0.0, 0.0, len(codes)
    for column in codes.T:
        counts = np.bincount(column - column.min())
        counts = counts[counts > 0]
        bits += float(-(counts * np.log2(counts / n)).sum())
        tables += 1 + 0.5 * math.log2(n) * (len(counts) - 1)
    return bits, tables


def quantise(z: np.ndarray, step: float) -> np.ndarray:
    return (np.sign(z) * np.floor(np.abs(z) / step + DEAD)).astype(np.int32)


def at_rate(parts: dict[str, np.ndarray], wanted: float) -> tuple[dict[str, np.ndarray], float, float]:
    """(components of both sides at steps where each takes `wanted` bits a value, bytes of codes, bytes of tables)."""
    out, codes_size, tables_size = {}, 0.0, 0.0
    for name, z in parts.items():
        low, high = math.log(float(z.std()) / 64), math.log(float(z.std()) * 64)
        for _ in range(12):
            middle = (low + high) / 2
            codes = quantise(z, math.exp(middle))
            bits, tables = entropy_and_tables(codes)
            low, high = (middle, high) if (bits + tables) / z.size > wanted else (low, middle)
        step = np.float32(math.exp(middle))
        # the middle of what a code stands for: the mean magnitude of what has it, one number a side and magnitude
        size = np.abs(codes).astype(np.int64)
        sums = np.bincount(size.ravel(), np.abs(z).ravel().astype(np.float64))
        means = sums / np.maximum(np.bincount(size.ravel()), 1)
        means[0] = 0
        out[name] = (np.sign(codes) * means[size]).astype(np.float32)
        codes_size, tables_size = codes_size + bits / 8, tables_size + tables / 8
        print(f"  {name}: step {step:.4g}, components in use {int((codes != 0).any(axis=0).sum())}", flush=True)
    return out, codes_size, tables_size


def replace_rows(path: Path, out: Path, live: Live, rows: dict[str, np.ndarray]) -> None:
    """The state at `path` with the codes of its rows SINKS … n - NEWEST made anew from rows [n, layers, width]."""
    whole = read(path)
    for items in whole.containers:
        for i, item in enumerate(items):
            if not isinstance(item, Section) or item.model.what > 1:
                continue
            layer, side = item.model.layer, item.model.what
            coded = np.concatenate(list(state.rows_of(item)))
            inner = slice(SINKS, len(coded) - NEWEST)
            coded[inner] = live.encode(layer, side, rows[SIDES[side]][inner, layer])
            head = replace(item.model, kind=MODEL, coder=STORED, data=struct.pack("<I", coded.shape[1]))
            blocks = [
                replace(block, coder=STORED, data=coded[block.first : block.first + block.n_rows].tobytes())
                for block in item.blocks
            ]
            items[i] = Section(head, blocks)
    out.write_bytes(whole.to_bytes())


def main(
    model: Path,
    work: Annotated[Path, typer.Argument(help="folder for captured rows and states; they take gigabytes")],
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV to write")],
    length: Annotated[int, typer.Option(help="tokens of the held-out state, a multiple of 512")] = 4096,
    rates: Annotated[str, typer.Option(help="bits a value of keys and values, tables counted")] = "0.5,0.68,1.0,1.4",
    live: Annotated[str, typer.Option(help="kvtc caches")] = "kvtc-k2v4,kvtc-k2v2",
    chunks: Annotated[int, typer.Option(help="of 1024 tokens, to fit the bases on")] = 24,
    threads: Annotated[int, typer.Option("-t")] = machine.find().cores,
) -> None:
    """Measure and write one figure a row."""
    work.mkdir(parents=True, exist_ok=True)
    captured, info, n = capture(model, work, chunks, threads), ModelInfo(model), length
    n_layers, n_heads, d, _ = captured.queries.shape
    base = float(info.reader.value(f"{info.architecture}.rope.freq_base", GGUFValueType.FLOAT32) or 10000.0)
    rope, sidecar = Rope(d, False, base), model.with_suffix(".kvtc.gguf")
    opened, calibration = native.Calibration(sidecar), format.read(sidecar)
    engine, figures = Engine(model, threads), []
    tokens = engine.tokenize(heldout.find(work).path.read_bytes()[: 12 * n], n + JUDGED)
    lives = {name: Live(opened, calibration, (int(name[6]), int(name[8]))) for name in live.split(",")}

    def judge(cache: str, path: Path) -> np.ndarray:
        sides = Cache(cache).types
        with engine.context((sides[0], sides[1]), n + JUDGED) as context:
            context.restore(path, n)
            return log_probabilities(context, tokens[n : n + JUDGED], n)

    for cache in ("f16", *lives):
        sides = Cache(cache).types
        if not (work / f"{cache}.bin").exists():
            with engine.context((sides[0], sides[1]), n + JUDGED) as context:
                for at in range(0, n, BATCH):
                    context.decode(tokens[at : at + BATCH], at)
                context.save(work / f"{cache}.bin", tokens[:n])
    expected = judge("f16", work / "f16.bin")
    whole = (work / "f16.bin").stat().st_size

    def note(source: str, rate: str | float, size: float, into: str, path: Path) -> None:
        found = divergence(expected, judge(into, path))
        error = float(found.std() / math.sqrt(len(found)))
        row = {"source": source, "rate": rate, "bytes": int(size), "of f16": round(whole / size, 2), "into": into}
        figures.append({"tokens": n, **row, "kld": round(float(found.mean()), 5), "error": round(error, 5)})
        print(*(f"{key}={value}" for key, value in figures[-1].items()), flush=True)

    plain = PlainState(bytearray((work / "f16.bin").read_bytes()), n, n_layers, n_heads * d)
    sources = {"f16": {name: plain.get(name) for name in "kv"}}
    sources["f16"]["k"] = rotate(sources["f16"]["k"], rope, n_heads, -1)
    besides = 0  # what a file holds besides codes
    for cache, own in lives.items():
        saved = read(work / f"{cache}.bin")
        sections = [s for s in saved.sections if s.model.what < 2]
        size = (work / f"{cache}.bin").stat().st_size
        besides = size - sum(s.size for s in sections)
        note("its own codes", "", size, cache, work / f"{cache}.bin")
        if cache == next(iter(lives)):
            rows = {name: np.empty((n, n_layers, n_heads * d), np.float32) for name in "kv"}
            for s in sections:
                coded = np.concatenate(list(state.rows_of(s)))
                rows[SIDES[s.model.what]][:, s.model.layer] = own.decode(s.model.layer, s.model.what, coded)
            sources[cache] = rows
    codecs = {name: Codec(rows, "all", weights(captured, info, name), n_heads) for name, rows in captured.rows.items()}
    for source, rows in sources.items():
        inner = {name: x[SINKS : n - NEWEST] for name, x in rows.items()}
        parts = {name: codecs[name].components(x)[0] for name, x in inner.items()}
        for rate in map(float, rates.split(",")):
            found, codes_size, tables_size = at_rate(parts, rate)
            back = {name: x.copy() for name, x in rows.items()}
            for name, z in found.items():
                back[name][SINKS : n - NEWEST] = codecs[name].rows(z[None], inner[name].shape)
            size = besides + codes_size + tables_size
            if source == "f16":
                changed = PlainState(bytearray(plain.data), n, n_layers, n_heads * d)
                for name, x in back.items():
                    turned = rotate(x, rope, n_heads, 1) if name == "k" else x
                    kept = plain.get(name)
                    kept[SINKS : n - NEWEST] = turned[SINKS : n - NEWEST]
                    changed.put(name, kept)
                (work / "changed.bin").write_bytes(changed.data)
                note(source, rate, size, "f16", work / "changed.bin")
            for cache, own in lives.items():
                replace_rows(work / f"{cache}.bin", work / "changed.bin", own, back)
                note(source, rate, size, cache, work / "changed.bin")
    write_csv(output, figures[0], figures)


if __name__ == "__main__":
    typer.run(main)
