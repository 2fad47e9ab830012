"""Would principal components across layers and heads pay for stored caches, as in the paper (arXiv 2511.01815)?

``python -m bench.cross_layer MODEL WORK -o F`` captures keys (RoPE undone) and values of the default corpus' prose and
fits bases of three reaches: a head, a layer with all its heads, all layers. First it tells, on the prose that is left,
how many bits a value each takes at the mean square error that a head's bases have at 2, 1.5 and 1 (reverse
water-filling over the components' variances, as if they were Gaussian). Then held-out caches are coded with them: mean
removed, one step for all components, the nearest multiple, each component at its own order-0 entropy, which counts no
tables and no basis. What comes back replaces the rows of an f16 state, sinks and window apart; KLD is that of the
tokens after it. ``--layers 10`` takes the first ten alone; ``--weighted`` measures errors as attention sees them: keys
by their queries' second moment, values by W_o. Caches of kvtc types beside it: their states restored, judged by the
same f16 logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from gguf import GGUFValueType
from kvtc_gguf import corpus
from kvtc_gguf.capture import LayerSample
from kvtc_gguf.capture.llama_cpp import LlamaCapture
from kvtc_gguf.model_info import ModelInfo
from kvtc_gguf.reference_rope import Rope

from bench import heldout, machine
from bench.caches import Cache
from bench.csv_file import write_csv
from bench.states import BATCH, Context, Engine

CHUNK = 1024  # tokens captured at a time
SINKS, WINDOW, JUDGED = 4, 128, 128  # tokens: kept exactly, and those after the state whose logits are compared
REACHES = ("head", "layer", "all")


@dataclass
class Captured:
    """Keys before RoPE and values, f16 [tokens, layers, H * d], and second moments of queries [layers, H, d, d]."""

    rows: dict[str, np.ndarray]
    queries: np.ndarray


def capture(model: Path, work: Path, n_chunks: int, threads: int) -> Captured:
    """Of the default corpus' prose; kept in `work`, so that another run takes what is there."""
    if not (work / "queries.npy").exists():
        with LlamaCapture(model, CHUNK, threads) as engine:
            chunks = corpus.split(engine.tokenize(corpus.prose()), CHUNK, n_chunks, engine)
            rows: dict[str, dict[int, list[np.ndarray]]] = {"k": {}, "v": {}}
            queries: dict[int, np.ndarray] = {}

            def take(sample: LayerSample) -> None:
                for name, x in (("k", sample.k), ("v", sample.v)):
                    rows[name].setdefault(sample.layer, []).append(x.reshape(len(x), -1).astype(np.float16))
                n, heads, d = sample.k.shape
                q = sample.q.reshape(n, heads, -1, d)
                moment = np.einsum("thgi,thgj->hij", q, q, optimize=True) / q[:, 0, :, 0].size / len(chunks)
                queries[sample.layer] = queries.get(sample.layer, 0) + moment

            for chunk in chunks:
                engine.run(chunk, take)
        for name, layers in rows.items():
            np.save(work / f"{name}.npy", np.stack([np.concatenate(layers[i]) for i in sorted(layers)], axis=1))
        np.save(work / "queries.npy", np.stack([queries[i] for i in sorted(queries)]))
    return Captured(
        {name: np.load(work / f"{name}.npy", mmap_mode="r") for name in "kv"}, np.load(work / "queries.npy")
    )


def weights(captured: Captured, info: ModelInfo, name: str) -> np.ndarray:
    """The square root of what errors of a side count by, f32 [layers, H, d, d]."""
    layers, heads, d, _ = captured.queries.shape
    if name == "k":
        metric = captured.queries
    else:
        n_head = int(info.tensors["blk.0.attn_q.weight"].shape[1]) // d
        gram = np.stack([info.gram(layer, n_head, d) for layer in range(layers)])
        metric = gram.reshape(layers, heads, -1, d, d).sum(axis=2)
    value, vector = np.linalg.eigh(metric.astype(np.float64))
    value = np.maximum(value, 1e-3 * value.max(axis=-1, keepdims=True))  # no direction is free
    return ((vector * np.sqrt(value)[..., None, :]) @ vector.swapaxes(-1, -2)).astype(np.float32)


class Codec:
    """Principal components of blocks of channels, in a metric that is the identity unless given."""

    def __init__(self, rows: np.ndarray, reach: str, root: np.ndarray | None, n_heads: int) -> None:
        self.root, self.inverse = root, None if root is None else np.linalg.inv(root)
        n_layers, width = rows.shape[1:]
        self.size = {"head": width // n_heads, "layer": width, "all": n_layers * width}[reach]
        total, moment = 0.0, 0.0
        for at in range(0, len(rows), CHUNK):
            x = self._blocks(np.asarray(rows[at : at + CHUNK], np.float32))
            total, moment = total + x.sum(axis=1), moment + x.swapaxes(1, 2) @ x
        self.mean = (total / len(rows))[:, None, :]
        covariance = moment / len(rows) - self.mean.swapaxes(1, 2) @ self.mean
        self.basis = np.linalg.eigh(covariance)[1].astype(np.float32)

    def _blocks(self, rows: np.ndarray) -> np.ndarray:
        """[n, layers, width] in the metric, as [blocks, n, size]."""
        rows = self._turn(rows, self.root)
        return np.ascontiguousarray(rows.reshape(len(rows), -1, self.size).swapaxes(0, 1))

    def _turn(self, rows: np.ndarray, by: np.ndarray | None) -> np.ndarray:
        if by is None:
            return rows
        n, layers, width = rows.shape
        heads = rows.reshape(n, layers, -1, by.shape[-1])
        return np.einsum("nlhi,lhij->nlhj", heads, by, optimize=True).reshape(n, layers, width)

    def components(self, rows: np.ndarray) -> np.ndarray:
        return (self._blocks(rows) - self.mean) @ self.basis

    def rows(self, components: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        x = components @ self.basis.swapaxes(1, 2) + self.mean
        return self._turn(x.swapaxes(0, 1).reshape(shape), self.inverse)


def entropy(codes: np.ndarray) -> float:
    """Bits of codes i32 [blocks, n, components], each component at its own order-0 entropy."""
    bits, n = 0.0, codes.shape[1]
    for column in codes.swapaxes(1, 2).reshape(-1, n):
        counts = np.bincount(column - column.min())
        counts = counts[counts > 0]
        bits += float(-(counts * np.log2(counts / n)).sum())
    return bits


def at_rate(z: np.ndarray, bits_per_value: float) -> tuple[np.ndarray, float]:
    """(components at the step whose codes have this entropy, that entropy in bits a value)."""
    low, high = math.log(float(z.std()) / 64), math.log(float(z.std()) * 64)
    for _ in range(12):
        step = math.exp((low + high) / 2)
        codes = np.rint(z / step).astype(np.int32)
        rate = entropy(codes) / z.size
        low, high = ((low + high) / 2, high) if rate > bits_per_value else (low, (low + high) / 2)
    return codes * np.float32(step), rate


def water_level(variances: np.ndarray, wanted: float, of_error: bool) -> tuple[float, float]:
    """(bits a value, mean square error) of Gaussian components at the level where one of the two is as wanted."""
    low, high = 1e-12 * float(variances.max()), float(variances.max())
    for _ in range(80):
        level = math.sqrt(low * high)
        bits = float(0.5 * np.log2(np.maximum(variances, level) / level).mean())
        error = float(np.minimum(variances, level).mean())
        low, high = (level, high) if (error < wanted if of_error else bits > wanted) else (low, level)
    return bits, error


@dataclass
class PlainState:
    """The file of an f16 sequence of a llama.cpp cache, values not transposed; rows lie at its end."""

    data: bytearray
    n: int
    n_layers: int
    width: int

    def _views(self, side: int) -> list[np.ndarray]:
        each = 12 + 2 * self.n * self.width  # i32 type, u64 size of a row, the rows
        start = len(self.data) - (2 - side) * self.n_layers * each
        return [
            np.frombuffer(self.data, "<f2", self.n * self.width, start + layer * each + 12).reshape(self.n, self.width)
            for layer in range(self.n_layers)
        ]

    def get(self, name: str) -> np.ndarray:
        """f32 [n, layers, width]."""
        return np.stack(self._views("kv".index(name)), axis=1).astype(np.float32)

    def put(self, name: str, rows: np.ndarray) -> None:
        """Rows [n, layers, width] of the first layers."""
        for layer, view in enumerate(self._views("kv".index(name))[: rows.shape[1]]):
            view[:] = rows[:, layer]


def rotate(rows: np.ndarray, rope: Rope, n_heads: int, sign: int) -> np.ndarray:
    """Keys [n, layers, width] turned to their positions, or back."""
    heads = rows.reshape(len(rows), -1, rows.shape[2] // n_heads)
    return rope.rotate(heads, sign * np.arange(len(rows))).reshape(rows.shape).astype(np.float32)


def log_probabilities(context: Context, tokens: list[int], start: int) -> np.ndarray:
    """f32 [n, n_vocab], of what follows each of the tokens."""
    rows = [context.decode([token], start + i, True).astype(np.float64) for i, token in enumerate(tokens)]
    return np.stack([row - row.max() - np.log(np.exp(row - row.max()).sum()) for row in rows]).astype(np.float32)


def divergence(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KLD of each token, nats, f64 [n], of log probabilities [n, n_vocab]."""
    return (np.exp(base.astype(np.float64)) * (base - other)).sum(axis=1)


def main(
    model: Path,
    work: Annotated[Path, typer.Argument(help="folder for captured rows and states; they take gigabytes")],
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV to write")],
    lengths: Annotated[str, typer.Option(help="tokens of the held-out states, multiples of 512")] = "1024,2048",
    rates: Annotated[str, typer.Option(help="bits a value of keys and values")] = "1.8,1.2",
    caches: Annotated[str, typer.Option(help="kvtc caches beside them")] = "kvtc-k2v2",
    chunks: Annotated[int, typer.Option(help=f"of {CHUNK} tokens, to fit the bases on")] = 24,
    layers: Annotated[int, typer.Option(help="first layers to code; 0: all")] = 0,
    weighted: Annotated[bool, typer.Option("--weighted/--plain")] = False,
    threads: Annotated[int, typer.Option("-t")] = machine.find().cores,
) -> None:
    """Measure and write one figure a row."""
    work.mkdir(parents=True, exist_ok=True)
    captured, info = capture(model, work, chunks, threads), ModelInfo(model)
    n_layers, n_heads, d, _ = captured.queries.shape
    kept = layers or n_layers
    captured = Captured({name: x[:, :kept] for name, x in captured.rows.items()}, captured.queries[:kept])
    fitted = len(captured.rows["k"]) * 4 // 5
    base_key = f"{info.architecture}.rope.freq_base"
    rope = Rope(d, False, float(info.reader.value(base_key, GGUFValueType.FLOAT32) or 10000.0))
    sizes, figures = [int(n) for n in lengths.split(",")], []
    engine = Engine(model, threads)
    tokens = engine.tokenize(heldout.find(work).path.read_bytes()[: 12 * max(sizes)], max(sizes) + JUDGED)
    plain: dict[int, PlainState] = {}
    expected: dict[int, np.ndarray] = {}

    def note(**figure: object) -> None:
        figures.append(figure)
        print(*(f"{key}={value}" for key, value in figure.items()), flush=True)

    def save_all(cache: tuple[str, str], name: str) -> None:
        with engine.context(cache, max(sizes) + JUDGED) as context:
            for at in range(0, max(sizes), BATCH):
                context.decode(tokens[at : at + BATCH], at)
                if at + BATCH in sizes:
                    context.save(work / f"{name}-{at + BATCH}.bin", tokens[: at + BATCH])

    def judge(cache: tuple[str, str], path: Path, n: int) -> np.ndarray:
        with engine.context(cache, max(sizes) + JUDGED) as context:
            context.restore(path, n)
            return log_probabilities(context, tokens[n : n + JUDGED], n)

    save_all(("f16", "f16"), "f16")
    for n in sizes:
        path = work / f"f16-{n}.bin"
        plain[n] = PlainState(bytearray(path.read_bytes()), n, n_layers, n_heads * d)
        expected[n] = judge(("f16", "f16"), path, n)
    for cache in filter(None, caches.split(",")):
        types = Cache(cache).types
        save_all(types, cache)
        for n in sizes:
            found = divergence(expected[n], judge(types, work / f"{cache}-{n}.bin", n)).mean()
            bits = sum(map(int, cache[6::2])) / 2
            note(kind=cache, reach="head", weighted=True, tokens=n, rate="", bits=bits, kld=found)
    wanted: dict[tuple[str, float], float] = {}
    for reach in REACHES:
        codecs = {
            name: Codec(rows[:fitted], reach, weights(captured, info, name) if weighted else None, n_heads)
            for name, rows in captured.rows.items()
        }
        for name, rows in captured.rows.items():
            variances = np.square(codecs[name].components(np.asarray(rows[fitted:], np.float32))).mean(axis=1).ravel()
            for rate in (2.0, 1.5, 1.0):
                error = wanted.setdefault((name, rate), water_level(variances, rate, False)[1])
                bits = round(water_level(variances, error, True)[0], 4)
                kind = f"equal error, {name}"
                note(kind=kind, reach=reach, weighted=weighted, tokens="", rate=rate, bits=bits, kld="")
        for n in sizes:
            rows = {name: plain[n].get(name)[:, :kept] for name in "kv"}
            rows["k"] = rotate(rows["k"], rope, n_heads, -1)
            parts = {name: codecs[name].components(x[SINKS : n - WINDOW]) for name, x in rows.items()}
            for rate in map(float, rates.split(",")):
                changed = PlainState(bytearray(plain[n].data), n, n_layers, n_heads * d)
                bits = 0.0
                for name, z in parts.items():
                    coded, found = at_rate(z, rate)
                    bits += found / 2
                    out = rows[name].copy()
                    out[SINKS : n - WINDOW] = codecs[name].rows(coded, out[SINKS : n - WINDOW].shape)
                    out = rotate(out, rope, n_heads, 1) if name == "k" else out
                    exact = plain[n].get(name)[:, :kept]
                    out[:SINKS], out[n - WINDOW :] = exact[:SINKS], exact[n - WINDOW :]
                    changed.put(name, out)
                path = work / "changed.bin"
                path.write_bytes(changed.data)
                found = divergence(expected[n], judge(("f16", "f16"), path, n)).mean()
                note(kind="pca", reach=reach, weighted=weighted, tokens=n, rate=rate, bits=round(bits, 4), kld=found)
    write_csv(output, figures[0], figures)


if __name__ == "__main__":
    typer.run(main)
