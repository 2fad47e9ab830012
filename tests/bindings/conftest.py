"""The build tree's patched llama_cpp on its own libraries, as `import llama_cpp`; no wheel is needed."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import tools
from kvtc_gguf import libraries
from kvtc_gguf.format import write

LIBRARIES = libraries.folder()
MODULE = libraries.bindings(LIBRARIES)
sys.path.insert(0, str(MODULE.parent))
os.environ["LLAMA_CPP_LIB_PATH"] = str(LIBRARIES)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import llama_cpp  # noqa: E402
from llama_cpp import kvtc  # noqa: E402


@pytest.fixture(autouse=True)
def no_process_parameters() -> None:
    """Other tests set the library's parameters and leave them."""
    kvtc._function("llama_kvtc_set_params", [kvtc._Params], None)(kvtc._Params(None, kvtc.BY_TYPE, kvtc.BY_TYPE))


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What libllama says."""
    lines: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda _level, text, _data: lines.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    yield lines
    llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.calibrated_model(tmp_path_factory.mktemp("bindings") / "llama.gguf")


@pytest.fixture(scope="session")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another calibration of the same model."""
    path = tmp_path_factory.mktemp("other") / "other.kvtc.gguf"
    write(tools.calibration_of(model, seed=1), path)
    return path


@pytest.fixture
def open_llama(model: Path) -> Iterator[Callable[..., llama_cpp.Llama]]:
    """`Llama` of the model with any arguments, closed after the test."""
    with ExitStack() as stack:

        def make(*, path: Path = model, **arguments: Any) -> llama_cpp.Llama:
            fixed = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
            return stack.enter_context(closing(llama_cpp.Llama(str(path), **{**fixed, **arguments})))

        yield make
