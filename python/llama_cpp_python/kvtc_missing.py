"""What to do about a shared library that is not there, for the error of the import that needs it."""

from __future__ import annotations

import re

DRIVER = "it is part of NVIDIA's driver, which this package needs; where there is none, install a wheel for the CPU"


def advice(error: BaseException) -> str:
    """Words to add to the loader's own; empty for an error that is about none of CUDA's libraries."""
    found = re.match(r"(libcuda|libcudart|libcublas|libcublasLt)\.so\.(\d+): cannot open", str(error))
    if not found:
        return ""
    if found[1] == "libcuda":
        return f" ({DRIVER})"
    if int(found[2]) < 13:  # PyPI's packages of those are not looked for
        return f" (it is part of CUDA {found[2]}: install that)"
    return f" (python -m pip install nvidia-cuda-runtime=={found[2]}.* nvidia-cublas=={found[2]}.*)"
