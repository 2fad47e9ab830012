"""The text a model is calibrated on: a mix of what it samples itself and what is installed with Python; or a file.

Nothing is downloaded. The model's own samples cover what it says, the rest covers what it is given to read.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kvtc_gguf.capture import SAMPLED_TOGETHER, Capture
from kvtc_gguf.layout import FormatError
from kvtc_gguf.openings import BEGINNINGS, QUESTIONS

MODULES = """
argparse ast asyncio base64 bisect calendar cmath collections concurrent.futures configparser contextlib copy csv
dataclasses datetime decimal difflib doctest email enum fractions functools gettext glob hashlib heapq html http
inspect io ipaddress itertools json locale logging math multiprocessing numbers operator optparse pathlib pickle
platform pprint queue random re sched secrets shutil socket sqlite3 ssl statistics string subprocess tarfile
tempfile textwrap threading time tokenize traceback typing unicodedata unittest urllib.parse uuid weakref zipfile
"""
KINDS = {
    "docs": "Python's documentation",
    "own": "sampled by the model",
    "code": "Python's library",
    "chat": "the model's answers",
    "begun": "continued by the model in other languages",
    "tongues": "a little in many languages",
}
SAMPLED = ("own", "chat", "begun")


@dataclass(frozen=True)
class Mix:
    """What a corpus is made of: shares by kind (see KINDS), and how.

    excerpt: characters taken from one place, so that a few thousand tokens meet many subjects. texts: sampled texts in
    one chunk: shorter ones stray less, and a wider batch means fewer steps.
    """

    shares: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 1))
    excerpt: int = 1500
    texts: int = 4
    temperature: float = 1.0
    seed: int = 1

    @property
    def name(self) -> str:
        """As a calibration keeps it."""
        return ", ".join(f"{share} {KINDS[kind]}" for kind, share in self.shares.items())

    @property
    def written(self) -> str:
        """The shares as `parse_mix` reads them."""
        return ",".join(f"{kind}={share}" for kind, share in self.shares.items())

    def of(self, capture: Capture) -> Mix:
        """What of this mix a model can give: one without a chat format samples no chats. Raises FormatError."""
        if "chat" not in self.shares or capture.chat(QUESTIONS[0]) is not None:
            return self
        rest = {kind: share for kind, share in self.shares.items() if kind != "chat"}
        if not rest:
            raise FormatError("--corpus chat: the model has no chat format that is known here")
        return replace(self, shares=rest)

    def kinds(self, n_chunks: int) -> list[str]:
        """The kind of each chunk, in turn, so that any stretch holds about the shares."""
        total, taken = sum(self.shares.values()), dict.fromkeys(self.shares, 0)
        result = []
        for i in range(n_chunks):
            kind = max(self.shares, key=lambda k: self.shares[k] * (i + 1) / total - taken[k])
            taken[kind] += 1
            result.append(kind)
        return result

    def steps(self, n_chunks: int, size: int) -> int:
        """How many tokens are sampled one after the other."""
        counts = [self.kinds(n_chunks).count(kind) for kind in SAMPLED]
        return sum(-(-count * self.texts // SAMPLED_TOGETHER) for count in counts) * (size // self.texts - 1)


def parse_mix(text: str) -> Mix:
    """A mix written as "docs=1,own=1,texts=2". Raises FormatError."""
    shares, rest = {}, {}
    for part in text.split(","):
        match = re.fullmatch(r"(\w+)=(\d+(?:\.\d+)?)", part.strip())
        if match and match[1] in KINDS and match[2].isdigit():
            shares[match[1]] = int(match[2])
        elif match and match[1] == "temperature" and float(match[2]) > 0:
            rest[match[1]] = float(match[2])
        elif match and match[1] in ("excerpt", "texts", "seed") and match[2].isdigit() and int(match[2]) > 0:
            rest[match[1]] = int(match[2])
        else:
            raise FormatError(f"--corpus {text}: {part} is no share of {', '.join(KINDS)}, such as docs=1")
    shares = {kind: share for kind, share in shares.items() if share} or Mix().shares
    return replace(Mix(shares), **rest)


def modules() -> list:
    """The modules whose documentation and code are read; some builds of Python leave some out."""
    found = []
    for name in MODULES.split():
        try:
            found.append(importlib.import_module(name))
        except ImportError:
            continue
    return found


def prose(excerpt: int = Mix.excerpt, seed: int = Mix.seed) -> str:
    """Excerpts of the language reference and of the docstrings of the standard library, in a fixed random order."""
    topics = importlib.import_module("pydoc_data.topics").topics
    texts = [topics[key] for key in sorted(topics)]
    for module in modules():
        members = [m for _, m in sorted(vars(module).items()) if inspect.isclass(m) or inspect.isfunction(m)]
        with warnings.catch_warnings():  # deprecated members have docstrings too
            warnings.simplefilter("ignore")
            texts.append("\n\n".join(filter(None, map(inspect.getdoc, [module, *members]))))
    return excerpts(texts, excerpt, seed)


def code(excerpt: int = Mix.excerpt, seed: int = Mix.seed) -> str:
    """Excerpts of the sources of the standard library, in a fixed random order; documentation where there are none."""
    texts = []
    for module in modules():
        try:
            texts.append(inspect.getsource(module))
        except (OSError, TypeError):  # compiled, or installed without sources
            continue
    return excerpts(texts, excerpt, seed) or prose(excerpt, seed)


def tongues(excerpt: int = Mix.excerpt, seed: int = Mix.seed) -> str:
    """What `openings` holds, in a random order."""
    return excerpts([*BEGINNINGS, *QUESTIONS], excerpt, seed)


READ = {"docs": prose, "code": code, "tongues": tongues}


def excerpts(texts: list[str], excerpt: int, seed: int) -> str:
    """All texts, cut in pieces of `excerpt` characters that are shuffled."""
    pieces = [text[i : i + excerpt] for text in texts for i in range(0, len(text), excerpt)]
    np.random.default_rng(seed).shuffle(pieces)
    return "\n\n".join(pieces)


def mixed_chunks(
    capture: Capture, mix: Mix, n_chunks: int, size: int, step: Callable[[], None] | None = None
) -> np.ndarray:
    """A corpus, i32 [n_chunks, size], kinds in turn. step: called per sampled token."""
    kinds = mix.kinds(n_chunks)
    parts = {}
    for kind in mix.shares:
        count = kinds.count(kind)
        if kind in SAMPLED:
            parts[kind] = iter(sampled(capture, mix, kind, count, size, step) if count else ())
        else:
            read = capture.tokenize(READ[kind](mix.excerpt, mix.seed))
            parts[kind] = iter(split(np.resize(read, max(len(read), count * size)), size, count, capture))
    return np.stack([next(parts[kind]) for kind in kinds])


def sampled(
    capture: Capture, mix: Mix, kind: str, count: int, size: int, step: Callable[[], None] | None = None
) -> np.ndarray:
    """Chunks i32 [count, size] that the model samples: from BOS, from questions to it, or from beginnings of texts."""
    if size // mix.texts < 2:
        raise FormatError(f"--corpus texts={mix.texts}: more than a chunk of {size} tokens holds; at most {size // 2}")
    n = mix.texts * count
    openings = None
    rng = np.random.default_rng(mix.seed)
    seed = mix.seed + SAMPLED.index(kind)
    if kind != "own":
        chats = kind == "chat"
        each = map(capture.chat, QUESTIONS) if chats else map(capture.tokenize, BEGINNINGS)
        given = [tokens for tokens in each if tokens is not None]
        order = np.concatenate([rng.permutation(len(given)) for _ in range(-(-n // len(given)))])[:n]
        openings = [given[i] for i in order]
    texts = capture.sample(n, size // mix.texts, seed, step, openings, mix.temperature, kind == "chat")
    return np.stack([joined(row, size, capture) for row in texts.reshape(count, -1)])


def joined(texts: np.ndarray, size: int, capture: Capture) -> np.ndarray:
    """One chunk, i32 [size], of sampled texts i32 [n] that lie one behind the other; what is short wraps around.

    Each text was begun by BOS. Models that start every context with one see no other, and its key is far from any other
    key: levels that are spent on it are lost.
    """
    if not capture.add_bos:
        return np.resize(texts, size)
    rest = np.resize(texts[texts != capture.bos], size - 1)
    return np.concatenate([[capture.bos], rest]).astype(np.int32)


def file_chunks(capture: Capture, path: Path, n_chunks: int, size: int, least: int = 2) -> np.ndarray:
    """The first n_chunks chunks of a text file, i32 [n, size]; fewer where the text ends.

    Raises FormatError when the file cannot be read or holds less than `least` chunks.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(
            f"{path}: cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or error}"
        ) from error
    tokens = capture.tokenize(text)
    if len(tokens) < least * size:
        raise FormatError(f"{path}: text too short: {len(tokens)} tokens, {least * size} are needed (or a smaller -c)")
    return split(tokens, size, min(n_chunks, len(tokens) // size), capture)


def split(tokens: np.ndarray, size: int, count: int, capture: Capture) -> np.ndarray:
    """count chunks of `size` tokens; each starts with BOS where the model wants one, as llama-perplexity does."""
    chunks = tokens[: count * size].reshape(count, size).copy()
    if capture.add_bos:
        chunks[:, 0] = capture.bos
    return chunks
