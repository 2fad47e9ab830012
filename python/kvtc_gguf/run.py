"""The two passes of a calibration over its texts, and what is kept of them."""

from __future__ import annotations

import datetime
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from rich.progress import Progress
from threadpoolctl import threadpool_limits

from kvtc_gguf import __version__, corpus
from kvtc_gguf.capture import Capture, LayerSample
from kvtc_gguf.codebook import BIN_WIDTHS, EDGES
from kvtc_gguf.fit import Fitter, Side
from kvtc_gguf.format import Calibration, SideCalibration
from kvtc_gguf.layout import BUDGETS, GROUP, MAX_HEAD_DIM, FormatError
from kvtc_gguf.model_info import ModelInfo
from kvtc_gguf.score import SINKS
from kvtc_gguf.statistics_file import Statistics, Text

PROBE_TOKENS = 8
HELD_OUT = 4  # every fourth chunk only judges the competition,
HELD_OUT_MOST = 4  # but of a long text no more than these: judging takes as long as all the rest, and they suffice
TOGETHER = 8  # samples of layers that are held at once, at most: a large model's are 100 MB each
DRAWN_BINS, DRAWN_REACH = 64, 4.0  # of the histograms that a report draws, in deviations


class Stopped(Exception):
    """The user asked to stop, between two chunks."""


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """A function that raises Stopped once Ctrl-C was pressed; a second Ctrl-C kills as ever.

    A chunk is never cut in the middle: some layers would have seen it and others not. Signals reach the main thread
    alone; elsewhere nothing is asked.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    def check_stop() -> None:
        if asked.is_set():
            raise Stopped

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, ask)
    try:
        yield check_stop
    finally:
        signal.signal(signal.SIGINT, before)


def check(model: Path, sample: LayerSample) -> None:
    """Raises FormatError for shapes that the format cannot hold and for activations that are no numbers."""
    for name, x in (("keys", sample.k), ("values", sample.v)):
        if x.shape[2] % GROUP or x.shape[2] > MAX_HEAD_DIM:
            raise FormatError(
                f"{model}: layer {sample.layer}: head_dim {x.shape[2]} is no multiple of {GROUP} up to {MAX_HEAD_DIM}"
            )
        if not np.isfinite(x).all():
            raise FormatError(
                f"{model}: layer {sample.layer}: {name} hold NaN or infinity; the model file may be damaged"
            )


class Run:
    """One model, its statistics so far, and the engine that runs it. check_stop is called between chunks.

    threads: how many layers are worked on at once, while the engine waits. Use as a context manager.
    """

    def __init__(
        self,
        model: Path,
        info: ModelInfo,
        capture: Capture,
        statistics: Statistics,
        progress: Progress,
        check_stop: Callable[[], None],
        threads: int = 1,
    ) -> None:
        self.model, self.info, self.capture, self.statistics = model, info, capture, statistics
        self.progress, self.check_stop = progress, check_stop
        shape: dict[int, tuple[int, int]] = {}
        self._shape = shape
        self.threads = max(1, min(threads, TOGETHER))
        self.pool = ThreadPoolExecutor(self.threads)
        self.fitter = Fitter(
            lambda d: info.pairs(d, capture.interleaved),
            lambda layer: info.gram(layer, *shape[layer]),
            info.softcap,
            each_layer=self.pool.map,
        )
        for layer, streams in statistics.moments.items():
            self.fitter.layers[layer] = {name: Side(name, streams[name]) for name in ("k", "v")}

    def __enter__(self) -> Run:
        self._limits = threadpool_limits(1)  # layers are the parallel part: threads within a product get in the way
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._limits.restore_original_limits()
        self.pool.shutdown()

    def probe(self) -> None:
        """Runs a few tokens: a model that cannot be served says so now, and the shapes of its heads are known."""
        self.capture.run(np.full(PROBE_TOKENS, max(self.capture.bos, 0), np.int32), self._check)

    def add_text(self, source: Path | corpus.Mix, n_chunks: int, size: int) -> None:
        """Adds a text to the statistics, a file or a mix: n_chunks chunks of `size` tokens."""
        if isinstance(source, Path):
            self.statistics.texts.append(Text(source.name, corpus.file_chunks(self.capture, source, n_chunks, size)))
            return
        mix = source.of(self.capture)
        if mix != source:
            self.progress.console.print("kvtc: note: the model has no chat format known here, so its text has no chats")
        task = self.progress.add_task("sampling text", total=mix.steps(n_chunks, size))

        def step() -> None:
            self.progress.advance(task)
            self.check_stop()

        chunks = corpus.mixed_chunks(self.capture, mix, n_chunks, size, step)
        self.statistics.texts.append(Text(mix.name, chunks))

    def gather(self) -> None:
        """Pass 1, from where the statistics end. They hold whole chunks when Stopped is raised."""
        todo = sum(len(text.chunks) - text.done for text in self.statistics.texts)
        task = self.progress.add_task("pass 1: moments", total=todo)
        for text in self.statistics.texts:
            for chunk in text.chunks[text.done :]:
                self.check_stop()
                self._observe(chunk, self._moments)
                text.done += 1
                self.progress.advance(task)

    def fit(self) -> None:
        """Pass 2: histograms and the competition; the last quarter of every text is held out for the latter."""
        self.fitter.end_moments()
        texts = [text.chunks for text in self.statistics.texts]
        held = [chunk for chunks in texts for chunk in last(chunks)]
        seen = [chunk for chunks in texts for chunk in chunks[: len(chunks) - len(last(chunks))]]
        task = self.progress.add_task("pass 2: histograms", total=len(seen) + len(held))
        for i, chunk in enumerate(seen + held):
            self.check_stop()
            if i == len(seen):
                self.fitter.begin_scoring()
            self._observe(chunk, lambda sample, i=i: self._histograms(sample, i >= len(seen)))
            self.progress.advance(task)

    def calibration(self) -> Calibration:
        """The calibration, after `fit`."""
        layers = self.fitter.finish(BUDGETS)
        return Calibration(
            fingerprint=self.statistics.fingerprint,
            architecture=self.statistics.architecture,
            block_count=self.info.block_count,
            bits=list(BUDGETS),
            layers=layers,
            corpus=self.statistics.corpus,
            tokens=self.statistics.tokens,
            tool=f"kvtc_gguf {__version__}",
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            stats=kept(self.fitter, layers, self.statistics, self.info.block_count),
        )

    def _observe(self, chunk: np.ndarray, work: Callable[[LayerSample], None]) -> None:
        """Runs a chunk, and work on as many layers at once as there are threads."""
        waiting: list[LayerSample] = []

        def flush() -> None:
            samples, waiting[:] = list(waiting), []
            list(self.pool.map(work, samples))

        def take(sample: LayerSample) -> None:
            waiting.append(sample)
            if len(waiting) == self.threads:
                flush()

        self.capture.run(chunk, take)
        flush()

    def _moments(self, sample: LayerSample) -> None:
        layer, of = sample.layer, self.statistics.of
        self._check(sample)
        if layer not in self.fitter.layers:
            sides = {"k": sample.k, "v": sample.v}
            self.fitter.layers[layer] = {n: Side(n, of(layer, n, *x.shape[1:])) for n, x in sides.items()}
        self.fitter.observe_moments(sample)
        for stream, x in (("k_plain", sample.k), ("k_rope", sample.k_rope)):
            of(layer, stream, *x.shape[1:]).add(x[SINKS:], np.ones(x[SINKS:].shape[:2], np.float32))

    def _histograms(self, sample: LayerSample, scoring: bool) -> None:
        self._check(sample)
        if sample.layer not in self.fitter.layers:
            raise FormatError(f"{self.model}: the statistics do not hold layer {sample.layer}; gather them again")
        self.fitter.observe_histograms(sample, scoring)

    def _check(self, sample: LayerSample) -> None:
        check(self.model, sample)
        self._shape[sample.layer] = (sample.q.shape[1], sample.v.shape[2])
        streams = self.statistics.moments.get(sample.layer, {})
        for name, x in (("k", sample.k), ("v", sample.v)):
            if name in streams and streams[name].total.shape != x.shape[1:]:
                raise FormatError(f"{self.model}: the statistics are of {streams[name].total.shape} {name} heads")


def last(chunks: np.ndarray) -> np.ndarray:
    """The chunks of a text i32 [n, T] that are held out, to judge by."""
    return chunks[-max(1, min(len(chunks) // HELD_OUT, HELD_OUT_MOST)) :]


def kept(
    fitter: Fitter, layers: dict[int, dict[str, SideCalibration]], statistics: Statistics, block_count: int
) -> dict[str, np.ndarray]:
    """What a sidecar keeps for reports and for fitting again, all f32; H kv heads, d head_dim, G groups.

    `blk.N.{k,v}.{mean,covariance}` [H, d], [H, d, d]; `.error` [len(fit.SCORE_BITS)], held out, relative (amplitudes);
    `error.{k,v}` [len(BUDGETS), block_count]: what coding a layer at a budget does to attention's output;
    `.histogram` [H, G, 64]: share of the unit-norm components of each group, over their scale, in bins from -4 to 4;
    `blk.N.k.query` [H, d]; `blk.N.k.spectra` [2, H, d]: eigenvalues of the keys' covariance before and after RoPE.
    """
    result = {f"error.{name}": np.zeros((len(BUDGETS), block_count)) for name in ("k", "v")}
    for layer, sides in fitter.layers.items():
        for name, side in sides.items():
            result[f"error.{name}"][:, layer] = side.cost
            prefix = f"blk.{layer}.{name}"
            heads = [side.moments.head(h) for h in range(side.heads)]
            result[f"{prefix}.mean"] = np.stack([h.mean for h in heads])
            result[f"{prefix}.covariance"] = np.stack([h.covariance for h in heads])
            result[f"{prefix}.error"] = fitter.predicted(side)
            result[f"{prefix}.histogram"] = histograms(side, layers[layer][name])
        result[f"blk.{layer}.k.query"] = sides["k"].moments.mean_query()
        streams = [statistics.moments[layer][name] for name in ("k_plain", "k_rope")]
        covariances = [[m.head(h).covariance for h in range(len(m.total))] for m in streams]
        result[f"blk.{layer}.k.spectra"] = np.maximum(np.linalg.eigvalsh(covariances)[..., ::-1], 0.0)
    return {name: array.astype(np.float32) for name, array in result.items()}


def histograms(side: Side, fitted: SideCalibration) -> np.ndarray:
    """Histograms f64 [H, G, DRAWN_BINS] of the groups of the transforms that won, in the order of the calibration."""
    drawn = np.linspace(-DRAWN_REACH, DRAWN_REACH, DRAWN_BINS + 1)
    overlap = np.minimum(EDGES[1:, None], drawn[1:]) - np.maximum(EDGES[:-1, None], drawn[:-1])
    share = np.maximum(overlap, 0.0) / BIN_WIDTHS[:, None]
    result = np.zeros((side.heads, side.head_dim // GROUP, DRAWN_BINS))
    for h, name in enumerate(fitted.transforms):
        histogram = side.histograms[name.removesuffix("+norm")]
        columns = histogram.transforms.decode[h].T.astype(np.float16)
        place = {column.tobytes(): i for i, column in enumerate(columns)}
        order = [place[column.tobytes()] for column in np.ascontiguousarray(fitted.decode[h].T)]
        count = histogram.count[h, order].astype(np.float64)
        count /= np.maximum(count.sum(axis=1, keepdims=True), 1e-30)
        result[h] = (count @ share).reshape(-1, GROUP, DRAWN_BINS).mean(axis=1)
    return result
