"""Put a calibration into the metadata of its model's GGUF: `python -m kvtc_gguf.embed model.gguf calibration.kvtc.gguf
-o out.gguf`. Stock llama.cpp loads the result as before; tensors and all other metadata are copied byte for byte."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import gguf
import typer

from kvtc_gguf.console import one_line_errors
from kvtc_gguf.fingerprint import fingerprint, open_model
from kvtc_gguf.format import Calibration, metadata_arrays, read
from kvtc_gguf.gguf_io import Reader, Writer, replacing
from kvtc_gguf.layout import FormatError

app = typer.Typer(add_completion=False)


def embed(
    model_path: str | os.PathLike[str],
    calibration: Calibration,
    out_path: str | os.PathLike[str],
    *,
    force: bool = False,
    check: Callable[[Path], None] = lambda path: None,
) -> None:
    """Write the model with the calibration in it to `out_path`, whole or not at all; an older calibration is replaced.

    check: sees the finished file before it takes its place, which it does not if this raises.
    Raises FormatError if the calibration is invalid or of another model, the model is broken or split, or `out_path` is
    the model itself and `force` is not set.
    """
    if len(open_model(model_path)) > 1:
        raise FormatError(
            f"{model_path}: split model; merge it with `llama-gguf-split --merge`, or use the file beside it"
        )
    own = fingerprint(model_path)
    if own != calibration.fingerprint:
        raise FormatError(f"{model_path}: has fingerprint {own}, but the calibration is of {calibration.fingerprint}")
    if not force and Path(out_path).exists() and os.path.samefile(model_path, out_path):
        raise FormatError(f"{out_path}: is the model itself; choose another -o, or change it in place with --force")
    added = metadata_arrays(calibration)
    with replacing(out_path) as temporary:
        _copy(Reader(model_path), added, temporary)
        check(temporary)


def _copy(model: Reader, added: dict, path: Path) -> None:
    writer = Writer(path, alignment=int(model.alignment))
    for key, field in model.fields.items():
        if not key.startswith(("GGUF.", "kvtc.")):
            writer.add_key_value(key, model.raw(key), field.types[0])
    for key, value in added.items():
        writer.add(key, value)
    writer.finish([(t.name, t.data, gguf.GGMLQuantizationType(t.tensor_type)) for t in model.tensors])


@app.command()
def main(
    model: Annotated[Path, typer.Argument(help="The model's GGUF.")],
    calibration: Annotated[Path, typer.Argument(help="Its calibration, or another GGUF that embeds it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The GGUF to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file, or the model itself.")] = False,
) -> None:
    """Write a copy of a model's GGUF with the calibration in its metadata."""
    with one_line_errors():
        if output.exists() and not force:
            raise FormatError(f"{output}: exists already; choose another -o, or replace it with --force")
        embed(model, read(calibration), output, force=force)
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB, model {model.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    app()
