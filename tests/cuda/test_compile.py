"""Caught where nvcc is installed: a CUDA file of ours that one architecture no longer takes, or that CMake forgets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = next(filter(None, map(shutil.which, (os.environ.get("CUDACXX", ""), "nvcc", "/usr/local/cuda/bin/nvcc"))), None)


@pytest.mark.skipif(not NVCC, reason="nvcc is not installed")
def test_every_cuda_file_compiles_for_every_architecture() -> None:
    tree = next(iter(sorted((ROOT / "build" / "upstream").glob("llama_cpp_python-*/vendor/llama.cpp"))))
    command = [sys.executable, "-m", "tests.cuda.compile", tree]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "CUDACXX": str(NVCC)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
