"""Texts of four kinds from what is installed, each in two parts that share no source: to calibrate on, to judge on.

The held-out parts share none with the default calibration corpus either.

Prose: licences, and descriptions of installed packages. Code: the standard library's sources. Chat: questions and
answers from its docstrings, in ChatML. Foreign: manual pages in other languages than English (Debian), else messages of
installed translations.
"""

from __future__ import annotations

import ast
import gettext
import gzip
import importlib.metadata
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from kvtc_gguf import corpus

KINDS = ("prose", "code", "chat", "foreign")
PART = 400_000  # characters of a part, at most
EXCERPT = 3000  # characters taken from one source at a time
LANGUAGES = ("de", "fr", "es", "ru", "ja", "zh_CN", "pt_BR", "pl")
STDLIB = Path(sysconfig.get_paths()["stdlib"])
READ = {name.split(".")[0] for name in corpus.MODULES.split()}  # by the default corpus
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings"}


def text(kind: str, held_out: bool) -> str:
    """The calibration part of a kind of text, or the held-out part, in a fixed random order.

    Held out is every third source of those that the default corpus (kvtc_gguf.corpus) does not read.

    Raises ValueError for an unknown kind, or where nothing of this kind is installed.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind}: must be one of {', '.join(KINDS)}")
    sources = [(name, s) for name, s in SOURCES[kind]() if len(s) > 500]
    unread = list(dict.fromkeys(name for name, _ in sources if name not in READ))
    apart = set(unread[::3])
    chosen = [s for name, s in sources if (name in apart) == held_out]
    pieces = [s[i : i + EXCERPT] for s in chosen for i in range(0, min(len(s), 5 * EXCERPT), EXCERPT)]
    if not pieces:
        raise ValueError(f"nothing installed holds text of kind {kind}")
    np.random.default_rng(0).shuffle(pieces)
    return "\n\n".join(pieces)[:PART]


def _prose() -> Iterator[tuple[str, str]]:
    for path in sorted(Path("/usr/share/common-licenses").glob("*")):
        if path.is_file() and not path.is_symlink():
            yield str(path), path.read_text(errors="ignore")
    found = sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"] or "")
    for distribution in found:
        body = distribution.metadata.get_payload() or distribution.metadata.get("Description")
        if isinstance(body, str):
            yield f"distribution {distribution.metadata['Name']}", body
    for path in sorted(Path("/usr/share/perl").rglob("*.pod")):
        yield str(path), path.read_text(errors="ignore")


def _modules() -> Iterator[tuple[str, Path]]:
    """(top module, file) of the standard library; a package's files stay together."""
    for path in sorted(STDLIB.rglob("*.py")):
        inner = path.relative_to(STDLIB).parts
        if not LEFT_OUT & set(inner):
            yield inner[0].removesuffix(".py"), path


def _code() -> Iterator[tuple[str, str]]:
    for module, path in _modules():
        yield module, path.read_text(errors="ignore")


def _chat() -> Iterator[tuple[str, str]]:
    for module, path in _modules():
        turns = []
        try:
            tree = ast.parse(path.read_text(errors="ignore"))
        except SyntaxError:  # templates and examples of old Python
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and len(about := ast.get_docstring(node) or "") > 120:
                asked = f"What does {node.name} in Python's {path.stem} module do?"
                turns.append(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{about}<|im_end|>\n")
        yield module, "".join(turns)


def _foreign() -> Iterator[tuple[str, str]]:
    for language in LANGUAGES:
        for path in sorted(Path("/usr/share/man", language).rglob("*.gz")):
            page = gzip.decompress(path.read_bytes()).decode(errors="ignore")
            yield str(path), re.sub(r"(?m)^[.'].*$\n?|\\f.|\\[-&]", "", page)
        for path in sorted(Path("/usr/share/locale", language, "LC_MESSAGES").glob("*.mo")):
            try:
                with path.open("rb") as file:
                    catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
            except UnicodeDecodeError:  # an old one, in another encoding than it says
                continue
            yield str(path), "\n".join(str(message) for key, message in catalog.items() if key and message)


SOURCES = {"prose": _prose, "code": _code, "chat": _chat, "foreign": _foreign}
