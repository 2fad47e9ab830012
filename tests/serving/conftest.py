"""The model that the server tests serve; the tools must have been built (`make build`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import tools

from tests.serving.process import CODED, PROMPTS, serve


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    if not (tools.BIN / "llama-server").exists():
        pytest.fail(f"{tools.BIN} lacks llama-server: run `make build`", pytrace=False)
    return tools.calibrated_model(tmp_path_factory.mktemp("server") / "llama.gguf")


@pytest.fixture(scope="session")
def exact(llama, tmp_path_factory) -> list[str]:
    """What an f16 cache answers to each prompt alone."""
    with serve(tmp_path_factory.mktemp("f16"), llama, "-fa", "on", "--cache-ram", 0) as server:
        return [server.text(prompt, 0, cache_prompt=False) for prompt in PROMPTS]


@pytest.fixture(scope="session")
def coded(llama, tmp_path_factory) -> list[str]:
    """What a kvtc cache with a small window answers to each prompt alone, 64 tokens each."""
    with serve(tmp_path_factory.mktemp("coded"), llama, *CODED, "--cache-ram", 0) as server:
        return [server.text(prompt, 0, 64, cache_prompt=False) for prompt in PROMPTS]
