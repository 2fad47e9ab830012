"""Models that several tests run; the tools must have been built (`make build`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import tools


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with the tiny models and the text."""
    missing = [name for name in ("llama-completion", "llama-perplexity") if not (tools.BIN / name).exists()]
    if missing:
        pytest.fail(f"{tools.BIN} lacks {', '.join(missing)}: run `make build`", pytrace=False)
    return tmp_path_factory.mktemp("tools")


@pytest.fixture(scope="session")
def text(folder) -> Path:
    return tools.write_text(folder / "text.txt")


@pytest.fixture(scope="session")
def llama(folder) -> Path:
    """RoPE pairs neighbours."""
    return tools.calibrated_model(folder / "llama.gguf")


@pytest.fixture(scope="session")
def qwen2(folder) -> Path:
    """RoPE pairs halves; keys have a bias."""
    return tools.calibrated_model(folder / "qwen2.gguf", "qwen2")
