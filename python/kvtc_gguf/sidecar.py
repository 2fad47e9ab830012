"""Where a model's calibration is looked for."""

from __future__ import annotations

from pathlib import Path

from kvtc_gguf.gguf_io import Reader


def beside(model: Path) -> Path:
    """The sidecar of a GGUF: model.kvtc.gguf beside model.gguf."""
    return model.with_name(model.name.removesuffix(".gguf") + ".kvtc.gguf")


def locate(model: Path) -> Path:
    """Where llama.cpp takes the calibration from if none is named: the model's own metadata, else its sidecar, which
    need not exist. Raises FormatError if the model is no GGUF."""
    return model if "kvtc.version" in Reader(model).fields else beside(model)
