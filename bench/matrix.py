"""The YAML matrix of a bench: models, caches and tests; read into dataclasses, or refused with one line."""

from __future__ import annotations

import dataclasses
import fnmatch
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from bench.caches import SINK, WINDOW, Cache
from bench.logs import RunError

TASKS = ("needle", "multikey", "tracking")


@dataclass(frozen=True)
class Model:
    """A GGUF file, or the name of a shape of `bench.random_model` that the run makes."""

    name: str
    file: str = ""
    random: str = ""


@dataclass(frozen=True)
class Entry:
    """A cache of the matrix, and the engines that it is for (patterns; empty: all)."""

    cache: Cache
    engines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Test:
    """What all tests have: patterns of names that narrow the matrix to some models, caches or engines."""

    models: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()  # further ones for the tool of this test


@dataclass(frozen=True)
class Quality(Test):
    """llama-perplexity against f16 logits. ubatch 1 is the decode path; base: whose f16, "first" engine's or "own"."""

    ctx: int = 1024
    chunks: int = 8
    ubatch: int = 512
    base: str = "first"

    @property
    def name(self) -> str:
        return "decode" if self.ubatch == 1 else "quality"


@dataclass(frozen=True)
class Speed(Test):
    """llama-bench at depths, caches and engines in turn for every repetition."""

    depths: tuple[int, ...] = (0,)
    prompt: int = 512
    generate: int = 32
    repetitions: int = 3
    name: str = dataclasses.field(default="speed", init=False)


@dataclass(frozen=True)
class Memory(Test):
    """What a context of so many tokens takes, from the log of a run that fills none of it."""

    contexts: tuple[int, ...] = (1024,)
    name: str = dataclasses.field(default="memory", init=False)


@dataclass(frozen=True)
class Retrieval(Test):
    """Answers by llama-server from a haystack of so many tokens."""

    task: str = "needle"
    depths: tuple[int, ...] = (1024,)
    samples: int = 6

    @property
    def name(self) -> str:
        return self.task


KINDS: dict[str, type[Test]] = {"quality": Quality, "speed": Speed, "memory": Memory, "retrieval": Retrieval}


@dataclass(frozen=True)
class Matrix:
    models: tuple[Model, ...]
    caches: tuple[Entry, ...]
    tests: tuple[Test, ...]
    threads: int | None = None
    limit: int = 3600  # seconds of one run of a tool
    arguments: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by tool, "all" for every one


def wants(patterns: tuple[str, ...], name: str) -> bool:
    """True if no pattern is given or one fits the name."""
    return not patterns or any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


def load(path: Path) -> Matrix:
    """Read a matrix.

    Raises:
        RunError: the file cannot be read, or does not say what the dataclasses above hold.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{path}: {' '.join(str(error).split())}") from error
    try:
        return _matrix(document)
    except ValueError as error:
        raise RunError(f"{path}: {error}") from error


def _matrix(document: object) -> Matrix:
    top = _mapping(document, "the matrix", {"models", "caches", "tests", "threads", "limit", "arguments"})
    for name in ("models", "caches", "tests"):
        if not isinstance(top.get(name), list) or not top[name]:
            raise ValueError(f"'{name}' must be a list with at least one entry")
    caches = tuple(_entry(x) for x in top["caches"])
    labels = [entry.cache.label for entry in caches]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"cache '{twice[0]}' is listed twice")
    given = top.get("arguments") or {}
    if isinstance(given, list):
        given = {"all": given}
    arguments = {name: _strings(words, f"arguments of {name}") for name, words in _mapping(given, "arguments").items()}
    options = {name: _value(top[name], int, name) for name in ("threads", "limit") if top.get(name) is not None}
    found = Matrix(tuple(_model(x) for x in top["models"]), caches, tuple(_test(x) for x in top["tests"]),
                  arguments=arguments, **options)  # fmt: skip
    for test in found.tests:
        _check_patterns(test.models, [model.name for model in found.models], "model")
        _check_patterns(test.caches, labels, "cache")
    return found


def _check_patterns(patterns: tuple[str, ...], names: list[str], what: str) -> None:
    """A pattern for nothing is a slip, which would leave a gap in the results unseen."""
    for pattern in patterns:
        if not any(wants((pattern,), name) for name in names):
            raise ValueError(f"no {what} of the matrix is like '{pattern}'; there are {', '.join(names)}")


def _mapping(value: object, what: str, known: set[str] | None = None) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a mapping, not {value!r}")
    if known and (unknown := [key for key in value if key not in known]):
        raise ValueError(f"{what} has no '{unknown[0]}'; it has {', '.join(sorted(known))}")
    return value


def _strings(value: object, what: str) -> tuple[str, ...]:
    words = value if isinstance(value, list) else [value]
    if any(isinstance(word, (dict, list)) or word is None for word in words):
        raise ValueError(f"{what} must be a list of words")
    return tuple(str(word) for word in words)


def _value(value: object, kind: object, what: str) -> object:
    if kind is int:
        if type(value) is not int or value < 0:
            raise ValueError(f"'{what}' must be a whole number, not {value!r}")
        return value
    if typing.get_args(kind)[:1] == (int,):
        return tuple(_value(x, int, what) for x in (value if isinstance(value, list) else [value]))
    if typing.get_args(kind)[:1] == (str,):
        return _strings(value, what)
    return str(value)


def _model(value: object) -> Model:
    if isinstance(value, str):
        value = {"file": value}
    options = _mapping(value, "a model", {"name", "file", "random"})
    if bool(options.get("file")) == bool(options.get("random")):
        raise ValueError("a model needs one of 'file' and 'random'")
    file, random = str(options.get("file") or ""), str(options.get("random") or "")
    return Model(str(options.get("name") or random or Path(file).stem), file, random)


def _entry(value: object) -> Entry:
    if isinstance(value, str):
        value = {"type": value}
    options = _mapping(value, "a cache", {"type", "sinks", "window", "rotation", "engines"})
    if not options.get("type"):
        raise ValueError("a cache needs its 'type'")
    exact = [None if options.get(x) is None else _value(options[x], int, x) for x in ("sinks", "window")]
    cache = Cache(str(options["type"]), *exact, rotation=options.get("rotation", True) is not False)
    if cache.calibrated:  # said, so that rows do not depend on a build's defaults
        sink, window = (default if x is None else x for x, default in zip(exact, (SINK, WINDOW), strict=True))
        cache = dataclasses.replace(cache, sink=sink, window=window)
    return Entry(cache, _strings(options.get("engines") or [], "engines"))


def _test(value: object) -> Test:
    kind = _mapping(value, "a test").get("kind")
    if kind not in KINDS:
        raise ValueError(f"a test's 'kind' is one of {', '.join(KINDS)}, not {kind!r}")
    hints = typing.get_type_hints(KINDS[kind])
    known = {f.name for f in dataclasses.fields(KINDS[kind]) if f.init}
    options = _mapping({k: v for k, v in value.items() if k != "kind"}, f"a {kind} test", known)
    test = KINDS[kind](**{name: _value(x, hints[name], name) for name, x in options.items()})
    if isinstance(test, Retrieval) and test.task not in TASKS:
        raise ValueError(f"a retrieval test's 'task' is one of {', '.join(TASKS)}, not '{test.task}'")
    if isinstance(test, Quality) and test.base not in ("first", "own"):
        raise ValueError(f"a quality test's 'base' is 'first' or 'own', not '{test.base}'")
    counts = [getattr(test, n) for n in ("ctx", "chunks", "ubatch", "repetitions", "samples") if hasattr(test, n)]
    if 0 in counts or () in (getattr(test, "depths", None), getattr(test, "contexts", None)):
        raise ValueError(f"a {kind} test of nothing: counts start at 1")
    return test
