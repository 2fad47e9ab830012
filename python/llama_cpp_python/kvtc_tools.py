"""llama.cpp's own tools, which come in the wheel, as console scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

FOLDER = Path(__file__).resolve().parent / "bin"


def run(name: str) -> NoReturn:
    """Become the tool, with this process's arguments."""
    path = FOLDER / (name + (".exe" if os.name == "nt" else ""))
    if not path.is_file():
        sys.exit(f"error: {path} is missing: llama_cpp was not installed from the wheel that holds the tools")
    arguments = [str(path), *sys.argv[1:]]
    if os.name == "nt":  # there exec returns to the shell at once
        sys.exit(subprocess.call(arguments))
    os.execv(path, arguments)


def server() -> NoReturn:
    run("llama-server")


def cli() -> NoReturn:
    run("llama-cli")


def bench() -> NoReturn:
    run("llama-bench")


def perplexity() -> NoReturn:
    run("llama-perplexity")
