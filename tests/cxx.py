"""C++ of ours that tests compile for themselves; needs a compiler, as the build does."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from kvtc_gguf.libraries import folder

ROOT = Path(__file__).resolve().parent.parent


def llama_cpp() -> Path:
    """The tree that the build has patched."""
    return next(iter(sorted((ROOT / "build" / "upstream").glob("llama_cpp_python-*/vendor/llama.cpp"))))


def compiled(output: Path, sources: Iterable[Path], include: Iterable[Path], *options: str, link: bool = False) -> Path:
    """A program or, with -shared, a library, of sources that see ggml_kvtc/ and `include`; link: with ggml-base."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))))
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", *options]
    command += [f"-I{path}" for path in (ROOT / "ggml_kvtc", *include)]
    libraries = [f"-L{folder()}", "-lggml-base", f"-Wl,-rpath,{folder()}"] if link else []
    subprocess.run([*command, *sources, "-o", output, *libraries], check=True)
    return output
