"""Failures caught: a wheel with CUDA kernels that does not ask for CUDA's packages, or that pip takes for damaged."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tools

METADATA = "Metadata-Version: 2.1\nName: tiny\nVersion: 1\nRequires-Dist: numpy\n\nRequires-Dist: of the description\n"
FILES = {
    "tiny/__init__.py": "",
    "tiny/bin/tool": "#!/bin/sh\n",
    "tiny-1.dist-info/METADATA": METADATA,
    "tiny-1.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}


def digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


@pytest.fixture
def wheel(tmp_path) -> Path:
    path = tmp_path / "tiny-1-py3-none-any.whl"
    record = "".join(f"{name},{digest(text.encode())},{len(text)}\n" for name, text in FILES.items())
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**FILES, "tiny-1.dist-info/RECORD": record + "tiny-1.dist-info/RECORD,,\n"}.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o100755 if "bin" in name else 0o100644) << 16
            archive.writestr(info, text)
    return path


@pytest.fixture
def add():
    spec = importlib.util.spec_from_file_location("wheel_requirements", tools.ROOT / "cmake" / "wheel_requirements.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.add_requirements


def test_requirements_are_in_the_metadata_and_the_record_fits(wheel, add, tmp_path) -> None:
    add(wheel, ["nvidia-cuda-runtime~=13.0", "nvidia-cublas~=13.0"])
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read("tiny-1.dist-info/METADATA").decode()
        record = archive.read("tiny-1.dist-info/RECORD").decode().splitlines()
        for line in record[:-1]:
            name, listed, size = line.split(",")
            assert (listed, int(size)) == (digest(archive.read(name)), len(archive.read(name)))
        assert archive.getinfo("tiny/bin/tool").external_attr >> 16 == 0o100755
    asked = [line for line in metadata.partition("\n\n")[0].splitlines() if line.startswith("Requires-Dist")]
    assert asked == [f"Requires-Dist: {name}" for name in ("numpy", "nvidia-cuda-runtime~=13.0", "nvidia-cublas~=13.0")]
    assert metadata.endswith("\n\nRequires-Dist: of the description\n")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", tmp_path / "installed", wheel], check=True)
    assert list(tmp_path.glob(".*")) == []


def test_wheel_without_requirements_stays_as_it_is(wheel, add) -> None:
    before = wheel.read_bytes()
    add(wheel, [])
    assert wheel.read_bytes() == before
