"""Failures caught: a library of CUDA's that is missing and an import that does not say what to install."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from llama_cpp._ctypes_extensions import load_shared_library


def library_that_needs(name: str, folder: Path) -> None:
    """A libllama.so in `folder` that cannot load, since the library `name` is nowhere."""
    compiler = os.environ.get("CC", "cc")
    needed, source = folder / name, folder / "empty.c"
    source.write_text("")
    subprocess.run([compiler, "-shared", "-fPIC", source, f"-Wl,-soname,{name}", "-o", needed], check=True)
    command = [compiler, "-shared", "-fPIC", source, "-Wl,--no-as-needed", needed, "-o", folder / "libllama.so"]
    subprocess.run(command, check=True)
    needed.unlink()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("libcuda.so.1", "part of NVIDIA's driver.*install a wheel for the CPU"),
        ("libcudart.so.98", r"pip install nvidia-cuda-runtime==98\.\* nvidia-cublas==98\.\*"),
        ("libcublasLt.so.98", r"pip install nvidia-cuda-runtime==98\.\* nvidia-cublas==98\.\*"),
        ("libcudart.so.2", "part of CUDA 2: install that"),
        ("libother.so.98", "shared object file: No such file or directory$"),
    ],
)
def test_missing_library_is_named_with_what_to_install(tmp_path, name, words) -> None:
    library_that_needs(name, tmp_path)
    with pytest.raises(RuntimeError, match=f"Failed to load shared library.*{name}: cannot open.*{words}") as raised:
        load_shared_library("llama", tmp_path)
    assert "\n" not in str(raised.value)
