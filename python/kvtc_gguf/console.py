"""What every command line of the package shares: errors are one line on stderr, and the exit code says so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from kvtc_gguf.layout import FormatError


def fail(message: str) -> NoReturn:
    """Print `error: message` as one line to stderr and exit with code 1."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise typer.Exit(1)


def warn(message: str) -> None:
    """Print a message to stderr and go on."""
    print(message, file=sys.stderr)


def peak_memory() -> str:
    """Largest resident size of this process so far, as text; empty where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f", peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MiB"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn FormatError and OSError into `fail`. A context manager, and a decorator of functions."""
    try:
        yield
    except FormatError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
