"""Failures caught: a patch that no longer fits the pinned upstream, says nothing or grows, a changed download."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from upstream import ROOT, prepare, said, tree_hash

PATCHES = ROOT / "patches"
PACKAGE = PATCHES / "llama-cpp-python"  # on the Python package around llama.cpp
OURS = ROOT / "python" / "llama_cpp_python"  # modules placed beside upstream's
MAX_ADDED = 60  # lines a patch may add, exclusive


def series(folder: Path = PATCHES) -> list[Path]:
    lines = (folder / "series").read_text(encoding="utf-8").splitlines()
    return [folder / line.strip() for line in lines if line.strip() and not line.startswith("#")]


def git_apply(directory: Path, patch: Path, *options: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment["GIT_CEILING_DIRECTORIES"] = str(directory.resolve().parent)
    command = ["git", "-c", "core.autocrlf=false", "apply", "-p1", "--whitespace=nowarn", *options, str(patch)]
    subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True)


@pytest.fixture(scope="module")
def sdist() -> Path:
    """The sdist that `make build` fetched, or the local one it was given."""
    upstream = dict(re.findall(r"^([a-z0-9.]+): (.+)$", (PATCHES / "UPSTREAM").read_text(encoding="utf-8"), re.M))
    places = [ROOT / "build" / "upstream" / upstream["sdist"]]
    cache = ROOT / "build" / "CMakeCache.txt"
    if cache.exists():
        places += [Path(path) for path in re.findall(r"^KVTC_UPSTREAM_SDIST:\w+=(.+)$", cache.read_text(), re.M)]
    places += [Path(os.environ["KVTC_UPSTREAM_SDIST"])] if os.environ.get("KVTC_UPSTREAM_SDIST") else []
    for path in places:
        if path.is_file():
            return path.resolve()
    pytest.fail(f"{upstream['sdist']} is not in build/upstream; run `make build` first, or set KVTC_UPSTREAM_SDIST")


@pytest.fixture(scope="module")
def patched(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The real tree with the real series: (llama.cpp folder, hash before, hash after)."""
    directory = tmp_path_factory.mktemp("upstream")
    with tarfile.open(sdist) as archive:
        archive.extractall(directory / "pristine")
    pristine = next((directory / "pristine").iterdir())
    (pristine / "vendor" / "llama.cpp" / ".git").unlink()
    before = tree_hash(pristine)
    shutil.rmtree(pristine)
    result = prepare(directory, KVTC_UPSTREAM_SDIST=sdist)
    assert result.returncode == 0, said(result)
    tree = next(directory.glob("llama_cpp_python-*"))
    return tree / "vendor" / "llama.cpp", before, tree_hash(tree)


def test_series_applies_and_reverses_to_the_pristine_tree(patched: tuple[Path, str, str], tmp_path: Path) -> None:
    llama_cpp, before, after = patched
    assert (before != after) == bool(series())
    copy = tmp_path / "tree"
    shutil.copytree(llama_cpp.parents[1], copy)
    for patch in reversed(series()):
        git_apply(copy / "vendor" / "llama.cpp", patch, "-R")
    for patch in reversed(series(PACKAGE)):
        git_apply(copy, patch, "-R")
    for module in OURS.glob("*.py"):
        (copy / "llama_cpp" / module.name).unlink()
    assert tree_hash(copy) == before


def test_applying_again_changes_nothing(patched: tuple[Path, str, str], sdist: Path) -> None:
    llama_cpp, _, after = patched
    tree = llama_cpp.parents[1]
    times = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    result = prepare(tree.parent, KVTC_UPSTREAM_SDIST=sdist)
    assert result.returncode == 0, said(result)
    assert "applying" not in said(result)
    assert times == {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    assert tree_hash(tree) == after


def test_patch_without_fuzz_gives_the_same_tree_as_git(
    patched: tuple[Path, str, str], sdist: Path, tmp_path: Path
) -> None:
    result = prepare(tmp_path, KVTC_UPSTREAM_SDIST=sdist, KVTC_GIT="OFF")
    assert result.returncode == 0, said(result)
    assert tree_hash(next(tmp_path.glob("llama_cpp_python-*"))) == patched[2]


@pytest.mark.parametrize("folder", [PATCHES, PACKAGE])
def test_every_patch_is_listed_once(folder: Path) -> None:
    listed = series(folder)
    assert sorted(listed) == sorted(folder.glob("*.patch"))
    assert len(set(listed)) == len(listed)


def test_every_patch_says_what_and_why_parses_and_is_small(tmp_path: Path) -> None:
    for patch in series() + series(PACKAGE):
        text = patch.read_bytes().decode("utf-8")
        head = text[: text.find("\n--- ")]
        for name in ("Subject", "Reason"):
            assert re.search(rf"^{name}: \S", head, re.M), f"{patch.name} has no '{name}: ' line before its first hunk"
        command = ["git", "apply", "--numstat", str(patch)]
        counted = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert counted.returncode == 0, f"{patch.name}: {counted.stderr}"
        added = sum(int(line.split("\t")[0]) for line in counted.stdout.splitlines())
        assert 0 < added < MAX_ADDED, f"{patch.name} adds {added} lines"


def test_download_with_another_hash_stops_the_build(tmp_path: Path) -> None:
    wrong = tmp_path / "llama_cpp_python-0.3.36.tar.gz"
    wrong.write_bytes(b"not the pinned sdist")
    result = prepare(tmp_path / "up", KVTC_UPSTREAM_SDIST=wrong)
    assert result.returncode != 0
    assert "sha256 mismatch" in said(result)
    assert not list(tmp_path.glob("up/llama_cpp_python-*"))
