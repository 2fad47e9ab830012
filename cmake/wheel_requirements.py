"""Requirements that only the build knows, for a finished wheel: with CUDA kernels it asks for CUDA's own packages."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path


def add_requirements(wheel: Path, requirements: Sequence[str]) -> None:
    """Write ``Requires-Dist`` lines into a wheel's metadata, and its RECORD anew; without any it stays as it is."""
    if not requirements:
        return
    partial = wheel.with_name(f".{wheel.name}")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as new:
        (name,) = (path for path in old.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", path))
        head, blank, description = old.read(name).partition(b"\n\n")
        asked = [f"Requires-Dist: {requirement}".encode() for requirement in requirements]
        metadata = b"\n".join([head, *asked]) + blank + description
        digest = base64.urlsafe_b64encode(hashlib.sha256(metadata).digest()).rstrip(b"=").decode()
        line = f"{name},sha256={digest},{len(metadata)}".encode()
        for info in old.infolist():
            data = metadata if info.filename == name else old.read(info)
            if info.filename == name.replace("METADATA", "RECORD"):
                data = re.sub(rb"(?m)^%s,[^\r\n]*" % re.escape(name.encode()), lambda _: line, data)
            new.writestr(info, data)  # with the mode of a tool: pip makes those with an x executable
    os.replace(partial, wheel)
