"""The text a model is calibrated on: half sampled by the model itself, half the standard library's prose; or a file.

Nothing is downloaded. The model's own samples cover what it says, the prose covers what it is given to read.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvtc_gguf.capture import Capture
from kvtc_gguf.layout import FormatError

MODULES = """
argparse ast asyncio base64 bisect calendar cmath collections concurrent.futures configparser contextlib copy csv
dataclasses datetime decimal difflib doctest email enum fractions functools gettext glob hashlib heapq html http
inspect io ipaddress itertools json locale logging math multiprocessing numbers operator optparse pathlib pickle
platform pprint queue random re sched secrets shutil socket sqlite3 ssl statistics string subprocess tarfile
tempfile textwrap threading time tokenize traceback typing unicodedata unittest urllib.parse uuid weakref zipfile
"""
EXCERPT = 1500  # characters taken from one place, so that a few thousand tokens meet many subjects
TEXTS = 4  # sampled texts in one chunk: shorter ones stray less, and a wider batch means fewer steps
SEED = 1


def prose() -> str:
    """Excerpts of the language reference and of the docstrings of the standard library, in a fixed random order."""
    topics = importlib.import_module("pydoc_data.topics").topics
    texts = [topics[key] for key in sorted(topics)]
    for name in MODULES.split():
        try:
            module = importlib.import_module(name)
        except ImportError:  # some builds of Python leave modules out
            continue
        members = [m for _, m in sorted(vars(module).items()) if inspect.isclass(m) or inspect.isfunction(m)]
        with warnings.catch_warnings():  # deprecated members have docstrings too
            warnings.simplefilter("ignore")
            texts.append("\n\n".join(filter(None, map(inspect.getdoc, [module, *members]))))
    pieces = [text[i : i + EXCERPT] for text in texts for i in range(0, len(text), EXCERPT)]
    np.random.default_rng(SEED).shuffle(pieces)
    return "\n\n".join(pieces)


def default_chunks(capture: Capture, n_chunks: int, size: int, step: Callable[[], None] | None = None) -> np.ndarray:
    """The default corpus, i32 [n_chunks, size]: sampled text and prose in turn. step: called per sampled token."""
    read = capture.tokenize(prose())
    own = np.zeros((0, size), np.int32)
    count = n_chunks // 2
    if count:
        texts = capture.sample(TEXTS * count, size // TEXTS, SEED, step).reshape(count, -1)
        own = np.stack([joined(row, size, capture) for row in texts])
    need = n_chunks - count
    if len(read) < need * size:
        read = np.resize(read, need * size)
    given = split(read, size, need, capture)
    out = np.empty((n_chunks, size), np.int32)
    out[1::2], out[0::2] = own, given
    return out


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
