"""Compile every CUDA file of ours for each architecture, without linking: ``python -m tests.cuda.compile LLAMA_CPP``.

For machines without a GPU or a whole toolkit: it needs nvcc alone, and takes cuBLAS's headers from PyPI where the
toolkit has none. Failures caught: a file that CMake builds and one architecture does not take, one that CMake forgets.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import typer

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "ggml_kvtc"
# Turing, Ampere, Hopper, Blackwell; ggml builds 12.0 with its architecture's own instructions, as do we.
ARCHITECTURES = ("75", "80", "90", "120a")
# Files with this in their names exist for one architecture alone, see ggml_kvtc/CMakeLists.txt.
HOPPER = "sm90"
# What ggml-cuda's own CMakeLists.txt passes to nvcc, less what its headers and nvcc's own code do not keep to.
WARNINGS = "-Wall,-Wextra,-Wcast-qual,-Wno-unused-function,-Wno-unused-parameter,-Wno-array-bounds"
FLAGS = ("-std=c++17", "-O3", "-use_fast_math", "-extended-lambda", f"-Xcompiler=-fPIC,{WARNINGS}")
DEFINITIONS = ("NDEBUG", "GGML_BACKEND_BUILD", "GGML_BACKEND_SHARED", "GGML_SHARED", "GGML_CUDA_USE_GRAPHS")


def stop(message: str) -> None:
    print(f"kvtc: {message}", file=sys.stderr)
    raise typer.Exit(1)


def find_nvcc() -> Path | None:
    """nvcc of $CUDACXX, of PATH, or of the toolkit's usual folder; None if there is none."""
    for name in (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(name) if name else None
        if found:
            return Path(found)
    return None


def listed_files() -> list[Path]:
    """The CUDA files that ggml_kvtc/CMakeLists.txt adds to ggml-cuda; stops when it forgets one."""
    text = (SOURCES / "CMakeLists.txt").read_text(encoding="utf-8")
    files = [SOURCES / name for name in dict.fromkeys(re.findall(r"(?<![\w/])(cuda/[\w.-]+\.cu)\b", text))]
    forgotten = set((SOURCES / "cuda").glob("*.cu")) - set(files)
    if forgotten:
        stop(f"ggml_kvtc/CMakeLists.txt does not list {', '.join(sorted(path.name for path in forgotten))}")
    return files


def fast_compile(nvcc: Path) -> list[str]:
    """Flags that leave most of the device code unoptimised (20 times faster), where nvcc knows them (12.9 on)."""
    told = subprocess.run([nvcc, "--help"], capture_output=True, text=True, check=True).stdout
    return ["-Ofc", "max"] if "--Ofast-compile" in told else []


def has_cublas(nvcc: Path, *include: str) -> bool:
    command = [nvcc, "-E", "-x", "cu", *include, "-"]
    return subprocess.run(command, input=b"#include <cublas_v2.h>\n", capture_output=True).returncode == 0


def cublas_headers(nvcc: Path, directory: Path) -> list[str]:
    """Flags that find cuBLAS's headers: none, or the folder that they are unpacked to from the wheel on PyPI."""
    if has_cublas(nvcc):
        return []
    include = ["-I", str(directory / "nvidia" / "cu13" / "include")]
    if not has_cublas(nvcc, *include):
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", version)
        if release is None or int(release[1]) < 13:
            stop("this CUDA toolkit has no cuBLAS headers; install them (PyPI's are for CUDA 13)")
            raise AssertionError
        wheel = f"nvidia-cublas=={release[1]}.{release[2]}.*"
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            print(f"fetching {wheel}, for its headers", flush=True)
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
            if subprocess.run([*pip, "-d", scratch, wheel]).returncode != 0:
                stop(f"could not download {wheel}; install cuBLAS's headers beside nvcc's toolkit")
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
                headers = [name for name in archive.namelist() if "/include/" in name]
                archive.extractall(directory, headers)
        if not has_cublas(nvcc, *include):
            stop(f"{wheel} holds no cublas_v2.h that nvcc takes")
    return include


def main(
    llama_cpp: Path = typer.Argument(..., help="patched llama.cpp tree"),
    cublas: Path = typer.Option(ROOT / "build" / "cublas", help="where headers from PyPI are kept"),
    only: str = typer.Option("", help="compile the files whose name contains this"),
    jobs: int = typer.Option(os.cpu_count() or 1, help="files at a time"),
    optimised: bool = typer.Option(
        False, help="as a build does, for what the optimiser alone would tell; 40 minutes on 2 cores"
    ),
) -> None:
    """Compile every CUDA file of ours for each architecture; objects are thrown away."""
    nvcc = find_nvcc()
    if nvcc is None:
        stop("nvcc was not found; install NVIDIA's CUDA toolkit, or set CUDACXX=/path/to/nvcc")
        raise AssertionError
    ggml = llama_cpp / "ggml"
    if not (ggml / "src" / "ggml-cuda" / "common.cuh").is_file():
        stop(f"{llama_cpp} is no llama.cpp tree; `make cuda-compile` makes one")
    folders = (SOURCES, ggml / "src" / "ggml-cuda", ggml / "src", ggml / "include")
    common = [
        *FLAGS,
        *(f"-D{name}" for name in DEFINITIONS),
        *(f"-I{folder}" for folder in folders),
        *cublas_headers(nvcc, cublas),
        *([] if optimised else fast_compile(nvcc)),
    ]

    def compile_one(path: Path) -> bool:
        began = time.monotonic()
        names = ("90a",) if HOPPER in path.name else ARCHITECTURES
        codes = [f"--generate-code=arch=compute_{name},code=sm_{name}" for name in names]
        with tempfile.TemporaryDirectory() as scratch:
            command = [nvcc, "-c", *common, *codes, path, "-o", Path(scratch) / "object.o"]
            result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        word = "ok" if result.returncode == 0 else "FAILED"
        # what ptxas says of unoptimised code's speed tells nothing
        told = [line for line in result.stdout.splitlines() if optimised or not line.startswith("ptxas info")]
        print("\n".join([f"{path.name}: {word} ({time.monotonic() - began:.0f} s)", *told]), flush=True)
        return result.returncode == 0

    files = [path for path in listed_files() if only in path.name]
    with ThreadPoolExecutor(jobs) as pool:
        good = sum(pool.map(compile_one, files))
    print(f"{good} of {len(files)} files compile for sm_{', sm_'.join(ARCHITECTURES)}")
    if good < len(files) or not files:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
