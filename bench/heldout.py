"""The text that cache types are judged on, which no calibration may have seen."""

from __future__ import annotations

import ast
import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2-raw" / "wiki.test.raw"
# Packages whose docstrings the default calibration corpus (kvtc_gguf.corpus) leaves alone; a test holds it to that.
PACKAGES = ("email", "wsgiref", "xml", "xmlrpc")
MIN_DOCSTRING = 200  # characters; shorter ones are signatures rather than prose


@dataclass(frozen=True)
class EvalText:
    """A text file and what a table should call it."""

    path: Path
    title: str


def find(scratch: Path, given: Path | None = None) -> EvalText:
    """The text to evaluate on: ``given``, ``$KVTC_EVAL_TEXT``, WikiText-2 where it lies, else held-out docstrings.

    Args:
        scratch: folder where the docstrings are written when they are needed.

    Raises:
        FileNotFoundError: a text was named that does not exist.
    """
    if given is None and os.environ.get("KVTC_EVAL_TEXT"):
        given = Path(os.environ["KVTC_EVAL_TEXT"])
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(f"evaluation text does not exist: {given}")
        return EvalText(given, given.name)
    if WIKITEXT.is_file():
        return EvalText(WIKITEXT, "WikiText-2 test")
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "heldout.txt"
    path.write_text(docstrings(), encoding="utf-8")
    names = ", ".join(PACKAGES)
    return EvalText(path, f"docstrings of {names} (Python {platform.python_version()} standard library)")


def docstrings(packages: tuple[str, ...] = PACKAGES) -> str:
    """The longer docstrings of the packages' submodules, read from their sources, in the order of their paths."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    for package in packages:
        for source in sorted((library / package).rglob("*.py")):
            if source.name == "__init__.py":  # what a package re-exports is what a corpus of modules picks up
                continue
            tree = ast.parse(source.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    text = ast.get_docstring(node) or ""
                    if len(text) >= MIN_DOCSTRING:
                        texts.append(text)
    return "\n\n".join(texts) + "\n"
