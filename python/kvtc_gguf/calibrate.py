"""`python -m kvtc_gguf.calibrate model.gguf`: runs the model twice over a text and writes its kvtc calibration."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvtc_gguf import budget, corpus, format, statistics_file
from kvtc_gguf.capture import Capture
from kvtc_gguf.capture.llama_cpp import LlamaCapture
from kvtc_gguf.coder import library_check
from kvtc_gguf.console import one_line_errors, peak_memory, warn
from kvtc_gguf.corpus import Mix
from kvtc_gguf.embed import embed
from kvtc_gguf.fingerprint import fingerprint
from kvtc_gguf.format import Calibration
from kvtc_gguf.layer_table import table
from kvtc_gguf.layout import BUDGETS, FormatError
from kvtc_gguf.model_info import ModelInfo
from kvtc_gguf.run import Run, Stopped, last, stoppable
from kvtc_gguf.sidecar import beside
from kvtc_gguf.statistics_file import Statistics, Text

MIN_CTX = 256  # below, hardly any token lies outside sinks and window, and values cannot be judged
DEFAULT_TOKENS = 16384
REPORT_WIDTH = 150

KINDS = ", ".join(corpus.KINDS)

app = typer.Typer(add_completion=False)


@dataclass
class Request:
    """What the command line asks for; n_chunks 0: no text but that of in_files."""

    model: Path
    text: Path | Mix
    embedded: Path | None
    in_files: list[Path]
    statistics: Path | None
    n_chunks: int
    ctx_size: int
    threads: int
    force: bool
    bpv: float | None = None  # bits per value by layer, from measured sensitivities
    kv_size: int | None = None  # the same as bytes of the codes of kv_ctx tokens
    kv_ctx: int | None = None
    checkpoint: str | None = None  # run this in transformers instead of the model
    device: str = "cpu"
    dtype: str = "auto"
    tokens_of: Path | None = None  # statistics of a run whose tokens are read, of whatever engine or model


def load_statistics(files: list[Path], fingerprint_: str, architecture: str) -> Statistics:
    """The statistics of earlier runs, merged. Raises FormatError if one is broken or of another model."""
    result = Statistics(fingerprint_, architecture)
    for file in files:
        try:
            result.merge(statistics_file.read(file))
        except FormatError as error:
            raise FormatError(str(error) if str(error).startswith(str(file)) else f"{file}: {error}") from error
    return result


def fit_model(run: Run, request: Request, others: list[Text]) -> Calibration:
    """Both passes; others: the texts of request.tokens_of.

    Raises FormatError (one line), and Stopped after Ctrl-C; what was gathered by then is kept.
    """
    for kind in run.info.undecodable():
        run.progress.console.print(
            f"kvtc: warning: the gguf package cannot decode {kind}, the type of attn_output.weight: values are scored "
            "without it; a calibration made from another quantization of this model scores them by it"
        )
    run.probe()
    with run.progress:
        if request.tokens_of:
            run.statistics.texts += [replace(text, done=0) for text in others]
        elif request.n_chunks:
            run.add_text(request.text, request.n_chunks, request.ctx_size)
        run.gather()
        if request.statistics:
            statistics_file.write(run.statistics, request.statistics)
        run.fit()
    return run.calibration()


def interrupted(run: Run, request: Request, beside: Path) -> NoReturn:
    """Keeps what there is after Ctrl-C, says how to go on, and exits with code 130."""
    if not run.statistics.texts:
        warn("interrupted: nothing was gathered yet, nothing is written")
        raise typer.Exit(130)
    stem = run.model.name.removesuffix(".gguf") + ".kvtc-statistics"
    names = (beside.with_name(f"{stem}{number}.gguf") for number in ("", *(f"-{n}" for n in range(2, 10**6))))
    path = request.statistics or next(name for name in names if not name.exists())
    statistics_file.write(run.statistics, path)
    warn(f"interrupted: statistics kept in {path}; go on with --in-file {path}")
    raise typer.Exit(130)


def outputs(request: Request, output: Path | None) -> Path | None:
    """The sidecar to write, if any, after a check of all outputs, before hours of work. Raises FormatError."""
    model = request.model
    if output is None and request.embedded is None:
        output = beside(model)
    for path in filter(None, (output, request.embedded, request.statistics)):
        if path.exists() and (path.is_dir() or path.samefile(model)):
            raise FormatError(
                f"{path}: is {'a folder' if path.is_dir() else 'the model itself'}, choose another output"
            )
        if path.exists() and not request.force:
            raise FormatError(f"{path}: exists already, pass --force to replace it")
        if not os.access(path.absolute().parent, os.W_OK):
            raise FormatError(f"{path}: cannot be written, its folder is absent or read-only")
    return output


def open_capture(request: Request, info: ModelInfo, run_size: int) -> AbstractContextManager[Capture]:
    """The engine that runs the model on chunks of at most run_size tokens."""
    if request.checkpoint:
        try:
            from kvtc_gguf.capture.transformers import TransformersCapture
        except ImportError as error:
            raise FormatError(f"--hf needs torch and transformers: pip install 'kvtc-gguf[hf]' ({error})") from error
        return TransformersCapture(request.checkpoint, info, request.device, request.dtype, request.threads)
    return LlamaCapture(request.model, run_size, request.threads)


def calibrate(request: Request, output: Path | None, console: Console) -> tuple[Calibration, Run]:
    """Everything from a request to the files. Raises FormatError (one line), and typer.Exit(130) after Ctrl-C."""
    for path, what in (
        (request.model, "model"),
        (request.text if isinstance(request.text, Path) else None, "text"),
        (request.tokens_of, "statistics"),
        *((f, "statistics") for f in request.in_files),
    ):
        if path and not path.is_file():
            raise FormatError(f"{path}: no such {what} file")
    sidecar = outputs(request, output)
    mark, info = fingerprint(request.model), ModelInfo(request.model)
    statistics = load_statistics(request.in_files, mark, info.architecture)
    others = statistics_file.read(request.tokens_of).texts if request.tokens_of else []
    size = max([request.ctx_size, *(text.chunks.shape[1] for text in statistics.texts + others)])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
    with (
        stoppable() as check_stop,
        open_capture(request, info, size) as capture,
        Run(request.model, info, capture, statistics, progress, check_stop, request.threads) as run,
    ):
        try:
            calibration = fit_model(run, request, others)
        except Stopped:
            interrupted(run, request, sidecar or request.embedded or request.model)
    if request.bpv or request.kv_size:
        spend_bits(request, calibration, run, console)
    check = library_check(calibration, warn)
    if sidecar:
        format.write(calibration, sidecar, check)
    if request.embedded:
        embed(request.model, calibration, request.embedded, force=request.force, check=check)
    written = [path for path in (sidecar, request.embedded, request.statistics) if path]
    names = " and ".join(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)" for path in written)
    console.print(f"wrote {names}{peak_memory()}", highlight=False, soft_wrap=True)
    return calibration, run


def spend_bits(request: Request, calibration: Calibration, run: Run, console: Console) -> None:
    """Gives every layer its own bits, within --bpv or --kv-size, and says what that gains."""
    bpv = request.bpv
    if request.kv_size and request.kv_ctx:
        bpv = budget.bits_per_value(calibration, request.kv_size, request.kv_ctx)
    assert bpv is not None
    chunks = last(run.statistics.texts[0].chunks)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring layers", total=budget.steps(calibration))
        told = budget.spend(request.model, calibration, chunks, bpv, request.threads, lambda: progress.advance(task))
    console.print(told, highlight=False, soft_wrap=True)


@app.command()
def main(
    model: Annotated[Path | None, typer.Argument(help="The model's GGUF.", show_default=False)] = None,
    model_option: Annotated[Path | None, typer.Option("-m", "--model", help="The same, as an option.")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Text to calibrate on, instead of our own.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Calibration to write (default: <model>.kvtc.gguf).")
    ] = None,
    embedded: Annotated[
        Path | None, typer.Option("--embed", help="Write a copy of the model with the calibration in its metadata.")
    ] = None,
    in_files: Annotated[
        list[Path] | None,
        typer.Option("--in-file", help="Statistics of earlier runs to merge or go on with; no new text unless asked."),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option("--statistics", help="Keep the statistics for --in-file; they hold the text's tokens."),
    ] = None,
    chunks: Annotated[int | None, typer.Option(min=2, help="Chunks to run, instead of --tokens.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2 * MIN_CTX, help=f"Tokens to calibrate on (default: {DEFAULT_TOKENS}).")
    ] = None,
    ctx_size: Annotated[int, typer.Option("-c", "--ctx-size", min=MIN_CTX, help="Tokens of a chunk.")] = 1024,
    threads: Annotated[int, typer.Option("-t", "--threads", min=1, help="Threads.")] = os.cpu_count() or 1,
    mix: Annotated[
        str | None,
        typer.Option("--corpus", help=f"Shares of our own text, of {KINDS}; also seed=1. (Default: {Mix().written})"),
    ] = None,
    tokens_of: Annotated[
        Path | None,
        typer.Option(help="Calibrate on the tokens of these statistics, made by another engine or of another model."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    bpv: Annotated[
        float | None, typer.Option("--bpv", help="Give layers their own bits: the least KLD in so many bits a value.")
    ] = None,
    kv_size: Annotated[
        str | None, typer.Option("--kv-size", help="The same by the size of the codes, such as 4GiB, of --ctx tokens.")
    ] = None,
    kv_ctx: Annotated[int | None, typer.Option("--ctx", min=1, help="With --kv-size: tokens of the cache.")] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option("--hf", help="Run the checkpoint that the GGUF is made from, in transformers: a folder or an id."),
    ] = None,
    device: Annotated[str, typer.Option(help="With --hf: where it runs, such as cuda.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="With --hf: bfloat16, float32, …; auto: as the checkpoint has it.")
    ] = "auto",
) -> None:
    """Calibrate a model for the kvtc cache types."""
    console = Console(stderr=True)
    with one_line_errors():
        if (model is None) == (model_option is None):
            raise FormatError("name one model: python -m kvtc_gguf.calibrate model.gguf")
        path = model or model_option
        assert path is not None
        if bool(kv_size) != bool(kv_ctx) or (kv_size and bpv):
            raise FormatError("give --bpv, or --kv-size and --ctx together")
        if bpv is not None and not BUDGETS[0] <= bpv <= BUDGETS[-1]:
            raise FormatError(f"--bpv {bpv:g}: must be {BUDGETS[0]} to {BUDGETS[-1]}")
        if sum(map(bool, (file, mix, tokens_of))) > 1:
            raise FormatError("give one of -f, --corpus and --tokens-of")
        fresh = not in_files or file or mix or tokens or chunks
        n_chunks = (chunks or max(2, (tokens or DEFAULT_TOKENS) // ctx_size)) if fresh else 0
        request = Request(
            path,
            file or (corpus.parse_mix(mix) if mix else Mix()),
            embedded,
            in_files or [],
            statistics,
            n_chunks,
            ctx_size,
            threads,
            force,
            bpv,
            budget.parse_size(kv_size) if kv_size else None,
            kv_ctx,
            checkpoint,
            device,
            dtype,
            tokens_of,
        )
        calibration, run = calibrate(request, output, console)
    # A file or pipe has no width of its own; a terminal's is respected.
    Console(width=None if sys.stdout.isatty() else REPORT_WIDTH).print(table(calibration, run.fitter))


if __name__ == "__main__":
    app()
