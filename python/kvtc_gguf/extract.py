"""Write the calibration that a model's GGUF embeds to a file of its own: `python -m kvtc_gguf.extract model.gguf`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvtc_gguf.console import one_line_errors
from kvtc_gguf.format import read, write
from kvtc_gguf.layout import FormatError
from kvtc_gguf.sidecar import beside

app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[Path, typer.Argument(help="A GGUF that embeds a calibration.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write.", show_default="<model>.kvtc.gguf")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write the calibration that a GGUF embeds to a file of its own."""
    target = output or beside(model)
    with one_line_errors():
        # an existing sidecar may hold statistics that the embedded copy does not
        if target.exists() and not force:
            raise FormatError(f"{target}: exists already; choose another -o, or replace it with --force")
        write(read(model), target)
    print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    app()
