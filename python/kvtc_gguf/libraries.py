"""The one search for the patched llama.cpp: shared libraries, kvtc's C headers, llama-cpp-python's declarations.

`KVTC_LIB_DIR` names a folder of libraries, and then no other counts. Else they are this repository's, as `make build`
leaves them in build/bin, or those of the installed wheel.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from kvtc_gguf.layout import FormatError

ROOT = Path(__file__).resolve().parents[2]
UPSTREAM = "upstream/llama_cpp_python-*"
PACKAGE = "llama_cpp"
HEADERS = ("kvtc.h", "kvtc-rows.h", "cpu/kvtc-cpu.h")
ADVICE = "install its wheel, run `make build`, or set KVTC_LIB_DIR"


class NativeError(FormatError):
    """A message of the patched llama.cpp, or that there is none."""


def folder() -> Path:
    """Where libggml-base, libllama and the rest are. Raises NativeError where there are none."""
    named = os.environ.get("KVTC_LIB_DIR")
    places = [Path(named)] if named else [ROOT / "build" / "bin", *(p / "lib" for p in _installed())]
    for place in places:
        if any(place.glob("*ggml-base.*")):
            return place
    if named:
        raise NativeError(f"KVTC_LIB_DIR={named}: holds no llama.cpp")
    raise NativeError(f"the patched llama.cpp was not found: {ADVICE}")


def headers(libraries: Path) -> list[Path]:
    """HEADERS as they were when the libraries in this folder were made. Raises NativeError."""
    wheel = [libraries.parent / "include" / Path(name).name for name in HEADERS]
    for found in (wheel, [ROOT / "ggml_kvtc" / name for name in HEADERS]):
        if all(path.is_file() for path in found):
            return found
    raise NativeError(f"{libraries}: kvtc's C headers are not in {wheel[0].parent}: {ADVICE}")


def bindings(libraries: Path) -> Path:
    """The folder of llama_cpp.py for the libraries in this folder. Raises NativeError.

    That of the tree that `KVTC_UPSTREAM_DIR` names, else of the wheel or build tree that the libraries are in, else of
    build/, else of the installed package.
    """
    named = os.environ.get("KVTC_UPSTREAM_DIR")
    places = [Path(named) / PACKAGE] if named else _around(libraries)
    for place in places:
        if (place / "llama_cpp.py").is_file():
            return place
    if named:
        raise NativeError(f"KVTC_UPSTREAM_DIR={named}: holds no {PACKAGE}/llama_cpp.py")
    raise NativeError(f"llama-cpp-python's declarations were not found: {ADVICE} and KVTC_UPSTREAM_DIR")


def _around(libraries: Path) -> list[Path]:
    trees = (tree for build in (libraries.parent, ROOT / "build") for tree in sorted(build.glob(UPSTREAM)))
    return [libraries.parent, *(tree / PACKAGE for tree in trees), *_installed()]


def _installed() -> list[Path]:
    found = importlib.util.find_spec(PACKAGE)
    return [Path(found.origin).parent] if found and found.origin else []
