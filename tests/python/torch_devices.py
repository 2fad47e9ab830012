"""The devices that tests of torch code run on: the CPU, and CUDA's where torch has one.

KVTC_TORCH_DEVICE names one alone, "cuda" say: tests fail where torch has no such device.
"""

from __future__ import annotations

import os


def devices() -> list[str]:
    """Names that torch takes."""
    if named := os.environ.get("KVTC_TORCH_DEVICE"):
        return [named]
    try:
        import torch
    except ImportError:  # the modules that ask say so themselves
        return ["cpu"]
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
