"""`python -m kvtc_gguf.calibrate model.gguf`: runs the model twice over a text and writes its kvtc calibration."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvtc_gguf import __version__, corpus, format
from kvtc_gguf.capture import LayerSample
from kvtc_gguf.capture.llama_cpp import LlamaCapture
from kvtc_gguf.console import one_line_errors
from kvtc_gguf.embed import embed
from kvtc_gguf.fingerprint import fingerprint
from kvtc_gguf.fit import SCORE_BITS, Fitter, Side
from kvtc_gguf.format import Calibration, SideCalibration
from kvtc_gguf.layout import BUDGETS, FormatError
from kvtc_gguf.model_info import ModelInfo

MIN_CTX = 256  # below, hardly any token lies outside sinks and window, and values cannot be judged
HELD_OUT = 4  # every fourth chunk only judges the competition
TABLE_BITS = (2, 4)
REPORT_WIDTH = 150

app = typer.Typer(add_completion=False)


def fit_model(
    model: Path, text: Path | None, n_chunks: int, ctx_size: int, threads: int, progress: Progress
) -> tuple[Calibration, Fitter]:
    """Captures, fits and returns the calibration with the fitter behind it. Raises FormatError (one line)."""
    mark = fingerprint(model)
    info = ModelInfo(model)
    for kind in info.undecodable():
        progress.console.print(
            f"kvtc: warning: the gguf package cannot decode {kind}, the type of attn_output.weight: values are scored "
            "without it; a calibration made from another quantization of this model scores them by it"
        )
    shape: dict[int, tuple[int, int]] = {}

    def moments(sample: LayerSample) -> None:
        shape[sample.layer] = (sample.q.shape[1], sample.v.shape[2])
        check(model, sample)
        fitter.observe_moments(sample)

    with LlamaCapture(model, ctx_size, threads) as capture:
        fitter = Fitter(
            lambda d: info.pairs(d, capture.interleaved), lambda layer: info.gram(layer, *shape[layer]), info.softcap
        )
        # A model that cannot be served says so now, not after minutes of sampling.
        capture.run(np.full(8, max(capture.bos, 0), np.int32), lambda sample: check(model, sample))
        chunks = corpus.file_chunks(capture, text, n_chunks) if text else None
        with progress:
            if chunks is None:
                task = progress.add_task("sampling text", total=ctx_size // corpus.TEXTS - 1)
                chunks = corpus.default_chunks(capture, n_chunks, lambda: progress.advance(task))
            task = progress.add_task("two passes over the model", total=2 * len(chunks))
            for chunk in chunks:
                capture.run(chunk, moments)
                progress.advance(task)
            fitter.end_moments()
            held_out = len(chunks) - max(1, len(chunks) // HELD_OUT)
            for i, chunk in enumerate(chunks):
                if i == held_out:
                    fitter.begin_scoring()
                capture.run(chunk, lambda sample, i=i: fitter.observe_histograms(sample, scoring=i >= held_out))
                progress.advance(task)
    layers = fitter.finish(BUDGETS)
    return Calibration(
        fingerprint=mark,
        architecture=info.architecture,
        block_count=info.block_count,
        bits=list(BUDGETS),
        layers=layers,
        corpus=text.name if text else "half sampled by the model, half Python's documentation",
        tokens=int(chunks.size),
        tool=f"kvtc_gguf {__version__}",
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        stats=statistics(fitter, info.block_count),
    ), fitter


def check(model: Path, sample: LayerSample) -> None:
    """Raises FormatError for shapes that the format cannot hold and for activations that are no numbers."""
    for name, x in (("keys", sample.k), ("values", sample.v)):
        if x.shape[2] % 8 or x.shape[2] > 512:
            raise FormatError(f"{model}: layer {sample.layer}: head_dim {x.shape[2]} is no multiple of 8 up to 512")
        if not np.isfinite(x).all():
            raise FormatError(
                f"{model}: layer {sample.layer}: {name} hold NaN or infinity; the model file may be damaged"
            )


def statistics(fitter: Fitter, block_count: int) -> dict[str, np.ndarray]:
    """To be kept in the sidecar, f32: moments of every layer `blk.N.{k,v}.{mean,covariance}`, `blk.N.k.metric`, and what
    coding a layer at each budget does to attention's output, `error.{k,v}` [len(BUDGETS), block_count].
    """
    stats = {}
    for name in ("k", "v"):
        error = np.zeros((len(BUDGETS), block_count), np.float32)
        for layer, sides in fitter.layers.items():
            error[:, layer] = sides[name].cost
        stats[f"error.{name}"] = error
    for layer, sides in fitter.layers.items():
        for name, side in sides.items():
            heads = [side.moments.head(h) for h in range(side.heads)]
            stats[f"blk.{layer}.{name}.mean"] = np.stack([h.mean for h in heads]).astype(np.float32)
            stats[f"blk.{layer}.{name}.covariance"] = np.stack([h.covariance for h in heads]).astype(np.float32)
        stats[f"blk.{layer}.k.metric"] = sides["k"].moments.mean_metric().astype(np.float32)
    return stats


def table(calibration: Calibration, fitter: Fitter) -> Table:
    """Per layer: the transforms chosen, the widths of the 2- and 4-bit budgets and the predicted error."""
    out = Table(
        title=f"{calibration.architecture}: {len(calibration.layers)} layers, {calibration.tokens} tokens",
        caption=f"error: held out, {SCORE_BITS[0]} bits, relative: keys of the logit, values of the attention output",
    )
    out.add_column("layer", justify="right")
    for side in ("K", "V"):
        out.add_column(f"{side} transform")
        for bits in TABLE_BITS:
            out.add_column(f"{side} widths @{bits}")
        out.add_column(f"{side} error", justify="right")
    for layer, sides in sorted(calibration.layers.items()):
        cells = [str(layer)]
        for name in ("k", "v"):
            side: Side = fitter.layers[layer][name]
            counts = Counter(sides[name].transforms)
            cells.append(", ".join(t if len(counts) == 1 else f"{n} {t}" for t, n in counts.items()))
            cells += [widths_text(sides[name], calibration.bits.index(bits)) for bits in TABLE_BITS]
            cells.append(f"{fitter.predicted(side)[0]:.1%}")
        out.add_row(*cells)
    return out


def widths_text(side: SideCalibration, budget: int) -> str:
    """One digit per group, one line per kv head; for more than 4 heads the mean over the heads, marked ~."""
    widths = side.widths[:, budget]
    if len(widths) > 4:
        return "~" + "".join(str(round(float(w))) for w in widths.mean(axis=0))
    return "\n".join("".join(map(str, row)) for row in widths)


def peak_memory() -> str:
    """Largest resident size of this process so far, as text; empty where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f", peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MiB"


def outputs(model: Path, output: Path | None, embedded: Path | None, force: bool) -> tuple[Path | None, Path | None]:
    """(sidecar path, embedded path) to write, checked before hours of work. Raises FormatError."""
    if output is None and embedded is None:
        output = model.with_name(model.name.removesuffix(".gguf") + ".kvtc.gguf")
    for path in filter(None, (output, embedded)):
        if path.exists() and (path.is_dir() or path.samefile(model)):
            raise FormatError(
                f"{path}: is {'a folder' if path.is_dir() else 'the model itself'}, choose another output"
            )
        if path.exists() and not force:
            raise FormatError(f"{path}: exists already, pass --force to replace it")
        if not os.access(path.absolute().parent, os.W_OK):
            raise FormatError(f"{path}: cannot be written, its folder is absent or read-only")
    return output, embedded


@app.command()
def main(
    model: Annotated[Path | None, typer.Argument(help="The model's GGUF.", show_default=False)] = None,
    model_option: Annotated[Path | None, typer.Option("-m", "--model", help="The same, as an option.")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Text to calibrate on, instead of our own.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Calibration to write  [default: <model>.kvtc.gguf]")
    ] = None,
    embedded: Annotated[
        Path | None, typer.Option("--embed", help="Write a copy of the model with the calibration in its metadata.")
    ] = None,
    chunks: Annotated[int | None, typer.Option(min=2, help="Chunks to run, instead of --tokens.")] = None,
    tokens: Annotated[int, typer.Option(min=2 * MIN_CTX, help="Tokens to calibrate on.")] = 16384,
    ctx_size: Annotated[int, typer.Option("-c", "--ctx-size", min=MIN_CTX, help="Tokens of a chunk.")] = 1024,
    threads: Annotated[int, typer.Option("-t", "--threads", min=1, help="Threads.")] = os.cpu_count() or 1,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Calibrate a model for the kvtc cache types."""
    console = Console(stderr=True)
    started = time.monotonic()
    with one_line_errors():
        if (model is None) == (model_option is None):
            raise FormatError("name one model: python -m kvtc_gguf.calibrate model.gguf")
        path = model or model_option
        assert path is not None
        if not path.is_file():
            raise FormatError(f"{path}: no such model file")
        if file and not file.is_file():
            raise FormatError(f"{file}: no such text file")
        sidecar, embedded = outputs(path, output, embedded, force)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
        n_chunks = chunks or max(2, tokens // ctx_size)
        calibration, fitter = fit_model(path, file, n_chunks, ctx_size, threads, progress)
        if sidecar:
            format.write(calibration, sidecar)
        if embedded:
            embed(path, calibration, embedded, force=force)
    # A file or pipe has no width of its own; a terminal's is respected.
    Console(width=None if sys.stdout.isatty() else REPORT_WIDTH).print(table(calibration, fitter))
    written = " and ".join(f"{p} ({p.stat().st_size / 2**20:.1f} MiB)" for p in (sidecar, embedded) if p)
    console.print(
        f"wrote {written} in {time.monotonic() - started:.0f} s{peak_memory()}", highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    app()
