"""What the tests of the patches share: running the build's fetch and patch step, and comparing trees."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "cmake" / "prepare_upstream.cmake"
CMAKE = shutil.which("cmake") or str(ROOT / ".venv" / "bin" / "cmake")


def prepare(directory: Path, **variables: Path | str) -> subprocess.CompletedProcess[str]:
    """Run the build's fetch and patch step alone, unpacking in ``directory``."""
    variables = {"KVTC_UPSTREAM_DIR": directory, **variables}
    options = [f"-D{name}={value}" for name, value in variables.items()]
    return subprocess.run([CMAKE, *options, "-P", str(SCRIPT)], capture_output=True, text=True)


def said(result: subprocess.CompletedProcess[str]) -> str:
    """What CMake printed, with its line wrapping undone."""
    return " ".join((result.stdout + result.stderr).split())


def tree_hash(root: Path) -> str:
    """Hash over the relative paths and bytes of every file below ``root``."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
