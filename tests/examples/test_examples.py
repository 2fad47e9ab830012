"""Failures caught: an example that no longer runs, or runs without the compressed cache.

Those that need frameworks are slow: `make examples-test` installs these and runs all.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import tools
from kvtc_gguf import libraries

from tests.serving.process import serve

EXAMPLES = tools.ROOT / "python" / "examples"
LIBRARIES = libraries.folder()
MODULE = libraries.bindings(LIBRARIES)
LIMIT = 180  # seconds; the frameworks alone take many to import


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.calibrated_model(tmp_path_factory.mktemp("examples") / "llama.gguf")


def environment() -> dict[str, str]:
    """The build tree's llama_cpp on its own libraries; verbose, so that the log names the cache."""
    found = {"PYTHONPATH": str(MODULE.parent), "LLAMA_CPP_LIB_PATH": str(LIBRARIES), "OMP_WAIT_POLICY": "passive"}
    return {**os.environ, **found, "PYTHONIOENCODING": "utf-8:replace"}


def example(name: str, *arguments: object, text: str = "") -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    result = subprocess.run(command, input=text.encode(), capture_output=True, env=environment(), timeout=LIMIT)
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    return result.stdout.decode(errors="replace")


@contextlib.contextmanager
def python_server(model: Path, folder: Path) -> Iterator[str]:
    """The address of llama-cpp-python's server with a compressed cache."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"model": model, "cache_type": "kvtc-k2v4", "host": "127.0.0.1", "port": port, "n_threads": 1}
    command = [sys.executable, "-m", "llama_cpp.server", *(str(x) for k, v in options.items() for x in (f"--{k}", v))]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
        try:
            for _ in range(LIMIT):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models"):
                    break
                assert process.poll() is None, (folder / "server.log").read_text()
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
            assert "calibration from" in (folder / "server.log").read_text()
        finally:
            process.kill()
            process.wait()


def test_script_generates(model) -> None:
    assert example("generate.py", model, "The capital of France is").strip()


def test_chat_streams_an_answer_to_each_line(model) -> None:
    out = example("stream_chat.py", model, text="Who are you?\nAnd who am I?\n")
    assert out.count("\n") >= 2 and out.strip()


def test_example_without_a_calibration_says_why(tmp_path) -> None:
    import synthetic

    synthetic.tiny_model(tmp_path / "bare.gguf")
    command = [sys.executable, str(EXAMPLES / "generate.py"), str(tmp_path / "bare.gguf"), "Hello"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=LIMIT)
    assert result.returncode != 0 and "no calibration for" in result.stderr  # so the others had a compressed cache


@pytest.mark.slow
@pytest.mark.parametrize("name", ["langchain_routes.py", "llama_index_routes.py"])
def test_frameworks_run_by_both_routes(model, tmp_path, name) -> None:
    assert example(name, model).strip()
    with python_server(model, tmp_path) as url:
        assert example(name, url).strip()
    with serve(tmp_path, model, "-ct", "kvtc-k2v4") as server:
        assert example(name, f"http://127.0.0.1:{server.port}/v1").strip()
