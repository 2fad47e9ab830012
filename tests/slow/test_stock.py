"""An embedded calibration that stock llama-cpp-python cannot open fails here.

Slow: installs the pinned llama-cpp-python, unpatched, into an environment of its own (it compiles llama.cpp).
KVTC_STOCK_PYTHON names a Python that has it already.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tools
from kvtc_gguf import format
from kvtc_gguf.embed import embed

SCRIPT = """
import sys, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=256, verbose=False)
print(llama_cpp.__version__, any(k.startswith("kvtc.") for k in llm.metadata))
print(llm("The capital of France is", max_tokens=16, temperature=0)["choices"][0]["text"])
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> str:
    if python := os.environ.get("KVTC_STOCK_PYTHON"):
        return python
    home = tmp_path_factory.mktemp("stock")
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    python = str(home / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "llama-cpp-python==0.3.36"], check=True)
    return python


@pytest.mark.slow
def test_stock_llama_cpp_python_generates_the_same_from_an_embedded_file(stock: str, tmp_path: Path) -> None:
    model = tools.ROOT / "build" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    sidecar = model.with_name(model.name.removesuffix(".gguf") + ".kvtc.gguf")
    assert sidecar.is_file(), "run `make calibration`"
    embedded = tmp_path / "embedded.gguf"
    embed(model, format.read(sidecar), embedded)

    def generate(path: Path) -> list[str]:
        result = subprocess.run([stock, "-c", SCRIPT, path], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    plain, with_calibration = generate(model), generate(embedded)
    assert plain[0].startswith("0.3.36") and with_calibration[0] == "0.3.36 True"
    assert with_calibration[1:] == plain[1:]
