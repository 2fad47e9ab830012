#!/usr/bin/env python3
"""Calibrate a Hugging Face checkpoint for the GGUF that was made from it:

    convert_hf_to_kvtc.py MODEL_DIR_OR_ID --model model.gguf [any option of kvtc_gguf.calibrate]

The same as `python -m kvtc_gguf.calibrate model.gguf --hf MODEL_DIR_OR_ID`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "python"))

from kvtc_gguf.calibrate import app

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        arguments = ["--help"]
    app(["--hf", *arguments] if arguments != ["--help"] else arguments)
