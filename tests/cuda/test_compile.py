"""Caught where nvcc is installed: a CUDA file of ours that one architecture no longer takes, or that CMake forgets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.compile import find_nvcc

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not find_nvcc(), reason="nvcc is not installed")
def test_every_cuda_file_compiles_for_every_architecture() -> None:
    tree = next(iter(sorted((ROOT / "build" / "upstream").glob("llama_cpp_python-*/vendor/llama.cpp"))))
    command = [sys.executable, "-m", "tests.cuda.compile", tree]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
