"""Edit the patches as git commits, then write them back; with ``--python`` those on the package around llama.cpp.

``python patches/refresh.py open DIR`` makes DIR a git repository of the pinned llama.cpp: one commit for the pristine
tree, then one for each patch of ``series``. Change them with git (``commit --amend``, ``rebase -i``, new commits).
``python patches/refresh.py save DIR`` writes every commit after the first back as a patch, and ``series``.

A commit's message is the patch's file name, an empty line, and its header (Subject, Reason).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import typer

PATCHES = Path(__file__).resolve().parent
ROOT = PATCHES.parent
PYTHON = typer.Option(False, "--python", help="The series llama-cpp-python/, on the sdist without its llama.cpp.")
app = typer.Typer(add_completion=False, help=__doc__)


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command and return what it printed; stop with its message when it fails."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    if cwd is not None:
        environment["GIT_CEILING_DIRECTORIES"] = str(cwd.resolve().parent)
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True)
    if result.returncode != 0:
        stop(f"{command[0]} failed: {result.stderr.decode(errors='replace').strip()}")
    return result.stdout.decode("utf-8")


def git(directory: Path, *arguments: str | Path) -> str:
    """Run git in ``directory``, whatever the user's own settings are."""
    settings = ("core.autocrlf=false", "user.name=kvtc", "user.email=kvtc@localhost", "commit.gpgsign=false")
    return run("git", *(part for setting in settings for part in ("-c", setting)), *arguments, cwd=directory)


def stop(message: str) -> None:
    print(f"kvtc: {message}", file=sys.stderr)
    raise typer.Exit(1)


def folder_of(python: bool) -> Path:
    return PATCHES / "llama-cpp-python" if python else PATCHES


def series(folder: Path) -> list[str]:
    """The file names in a folder's ``series``, in order."""
    lines = (folder / "series").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def sdist() -> Path:
    """The sdist that the build fetched (or ``$KVTC_UPSTREAM_SDIST``)."""
    named = re.search(r"^sdist: (.+)$", (PATCHES / "UPSTREAM").read_text(encoding="utf-8"), re.M)
    assert named is not None
    path = Path(os.environ.get("KVTC_UPSTREAM_SDIST") or ROOT / "build" / "upstream" / named[1])
    if not path.is_file():
        stop(f"{path} does not exist; run `make build` once, or set KVTC_UPSTREAM_SDIST")
    return path.resolve()


@app.command("open")
def open_tree(directory: Path = typer.Argument(..., help="folder to create"), python: bool = PYTHON) -> None:
    """Make DIRECTORY a repository with one commit for each patch."""
    folder = folder_of(python)
    if directory.exists():
        stop(f"{directory} already exists")
    with tempfile.TemporaryDirectory(dir=directory.resolve().parent) as scratch:
        pristine = Path(scratch) / "patches"
        pristine.mkdir()
        shutil.copy(PATCHES / "UPSTREAM", pristine)
        (pristine / "series").touch()
        options = {"UPSTREAM_DIR": f"{scratch}/upstream", "UPSTREAM_SDIST": sdist(), "PATCH_DIR": pristine}
        defines = [f"-DKVTC_{name}={value}" for name, value in options.items()]
        run("cmake", *defines, "-P", ROOT / "cmake" / "prepare_upstream.cmake")
        tree = next(path for path in Path(scratch).glob("upstream/*") if path.is_dir())
        if python:
            shutil.rmtree(tree / "vendor")
            shutil.rmtree(tree / ".git", ignore_errors=True)
        shutil.move(tree if python else tree / "vendor" / "llama.cpp", directory)
    git(directory, "init", "-q", ".")
    # Forced: upstream's own .gitignore must hide nothing.
    git(directory, "add", "-f", "-A", ".")
    git(directory, "commit", "-q", "-m", "pristine")
    for name in series(folder):
        header = (folder / name).read_text(encoding="utf-8").split("\n--- ", 1)[0].split("\ndiff --git ", 1)[0]
        git(directory, "apply", "-p1", "--index", "--whitespace=nowarn", folder / name)
        git(directory, "commit", "-q", "--cleanup=verbatim", "-m", f"{name}\n\n{header.strip()}\n")
    print(f"{directory}: the pristine tree and {len(series(folder))} patches, a commit each")


@app.command()
def save(directory: Path = typer.Argument(..., help="folder made by `open`"), python: bool = PYTHON) -> None:
    """Write the commits of DIRECTORY back as patches and series."""
    folder = folder_of(python)
    commits = git(directory, "rev-list", "--reverse", "HEAD").split()[1:]
    texts: dict[str, str] = {}
    for commit in commits:
        name, _, header = git(directory, "show", "-s", "--format=%B", commit).strip().partition("\n\n")
        if not re.fullmatch(r"[\w.-]+\.patch", name) or name in texts:
            stop(f"commit {commit[:10]}: its message must start with a patch's file name of its own, not {name!r}")
        diff = git(directory, "-c", "core.abbrev=10", "diff", "--no-color", "--no-renames", f"{commit}^", commit)
        texts[name] = f"{header.strip()}\n\n{diff}"
    comments = [line for line in (folder / "series").read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for old in set(series(folder)) - set(texts):
        (folder / old).unlink()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    (folder / "series").write_text("\n".join([*comments, *texts]) + "\n", encoding="utf-8", newline="\n")
    print(f"{folder}: {len(texts)} patches written")


if __name__ == "__main__":
    app()
