"""kvtc cache types for llama_cpp: what `Llama`, `LlamaContext` and the server call.

The library takes a calibration's file, sinks and window as process-wide parameters of the contexts created next, since
bindings mirror `llama_context_params`. Here they are set, used and put back under a lock, so that every `Llama` has its
own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import threading
import warnings
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import llama_cpp.llama_cpp as llama_cpp
from llama_cpp._ctypes_extensions import load_shared_library

BY_TYPE = -1  # LLAMA_KVTC_BY_TYPE: 4 sinks and a window of 128; with turbo types alone none
LOG_ERROR = 4  # enum ggml_log_level
# as the command lines take; numbers fixed by the GGUF format
STOCK = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2, "q4_1": 3, "iq4_nl": 20, "q5_0": 6, "q5_1": 7}
PLAIN = ("f32", "f16", "bf16")  # values that attention reads without flash attention
CODED = tuple(f"kvtc{bits}" for bits in range(1, 7)) + ("turbo2", "turbo3", "turbo4")
PROMPT_CACHES = ("ram", "disk")  # what the server's cache_type said before it also named KV cache types

Files = Union[str, "os.PathLike[str]", Sequence[Union[str, "os.PathLike[str]"]]]
Type = Union[int, str]


class _Params(ctypes.Structure):
    """struct llama_kvtc_params"""

    _fields_ = [("files", ctypes.c_char_p), ("n_sink", ctypes.c_int32), ("n_window", ctypes.c_int32)]


@dataclass(frozen=True)
class Options:
    """What a context of kvtc types takes beyond `llama_context_params`; None: the library's default."""

    file: Optional[Files] = None
    window: Optional[int] = None
    sink: Optional[int] = None

    def __post_init__(self) -> None:
        for name, count in (("kvtc_window", self.window), ("kvtc_sink", self.sink)):
            if count is not None and not (isinstance(count, int) and 0 <= count < 10**9):
                raise ValueError(f"{name} takes a number of tokens from 0 to 999999999, not {count!r}")
        for path in self.paths():
            if not isinstance(path, (str, os.PathLike)) or "," in os.fspath(path):  # the library parts them by commas
                raise ValueError(f"kvtc_file takes a path without commas, or several, not {path!r}")

    def paths(self) -> List[Any]:
        """The calibrations."""
        return list(self.file) if isinstance(self.file, (list, tuple)) else [] if self.file is None else [self.file]

    def state(self) -> dict:
        """The keyword arguments of `Llama` that make these options."""
        return {"kvtc_file": self.file, "kvtc_window": self.window, "kvtc_sink": self.sink}


MISSING = "this libllama has no kvtc cache types: use the one that came with this package"


def _function(name: str, arguments: Sequence[Any], result: Any, library: Any = llama_cpp._lib) -> Any:
    try:
        function = getattr(library, name)
    except AttributeError:
        raise RuntimeError(MISSING) from None
    function.argtypes, function.restype = list(arguments), result
    return function


@functools.lru_cache(maxsize=None)
def types() -> Dict[str, int]:
    """The ggml type of every name that a side of a KV cache can have."""
    base = load_shared_library("ggml-base", llama_cpp._base_path)
    from_name = _function("ggml_kvtc_type_from_name", [ctypes.c_char_p], ctypes.c_int, base)
    return {**STOCK, **{name: from_name(name.encode()) for name in CODED}}


def parse_type(name: Type) -> int:
    """The ggml type of one side of a KV cache, from its name ("kvtc2", "q8_0") or number. Raises ValueError."""
    text = str(name).strip().lower()
    if text in types():
        return types()[text]
    if text.isdecimal() and int(text) in types().values():
        return int(text)
    raise ValueError(f"{name!r} is no KV cache type: choose one of {', '.join(types())}")


def is_coded(number: int) -> bool:
    """Is this ggml type one of kvtc's or of the turbo types?"""
    return any(number == types()[name] for name in CODED)


def parse_types(cache_type: Optional[str], type_k: Optional[Type], type_v: Optional[Type]) -> Tuple[Optional[int], ...]:
    """The types of K and V; None for a side that was not named.

    cache_type: "kvtc-k<a>v<b>", or one name for both sides; it excludes type_k and type_v. Raises ValueError.
    """
    if cache_type is None:
        return tuple(None if side is None else parse_type(side) for side in (type_k, type_v))
    if type_k is not None or type_v is not None:
        raise ValueError("cache_type names the types of K and V: give either it, or type_k and type_v")
    sides = re.fullmatch(r"kvtc-k(\d)v(\d)", str(cache_type).strip().lower())
    names = [f"kvtc{bits}" for bits in sides.groups()] if sides else [cache_type, cache_type]
    try:
        return parse_type(names[0]), parse_type(names[1])
    except ValueError:
        raise ValueError(
            f"cache_type takes kvtc-k<a>v<b> with a, b from 1 to 6, or one type of both sides ({', '.join(types())}), "
            f"not {cache_type!r}"
        ) from None


def configure(
    params: llama_cpp.llama_context_params,
    *,
    cache_type: Optional[str] = None,
    type_k: Optional[Type] = None,
    type_v: Optional[Type] = None,
    flash_attn: Optional[bool] = None,
    file: Optional[Files] = None,
    window: Optional[int] = None,
    sink: Optional[int] = None,
) -> Options:
    """Set the cache types in `params`, and flash attention: as asked for, but on where they need it.

    Warns where flash_attn=False or an option has no effect. Raises ValueError for a type or count that is none.
    """
    kinds = parse_types(cache_type, type_k, type_v)
    if kinds[0] is not None:
        params.type_k = kinds[0]
    if kinds[1] is not None:
        params.type_v = kinds[1]
    coded = is_coded(params.type_k) or is_coded(params.type_v)
    needed = coded or params.type_v not in [STOCK[name] for name in PLAIN]
    if needed and flash_attn is False:
        warnings.warn("flash_attn=False has no effect: the types of the KV cache need flash attention", stacklevel=3)
    params.flash_attn_type = (
        llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn or needed else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    options = Options(file, window, sink)
    given = [name for name, value in options.state().items() if value is not None]
    if given and not coded:
        warnings.warn(f"{', '.join(given)} without a kvtc cache type: no effect", stacklevel=3)
    return options


def warn_without_gpu(n_gpu_layers: int) -> None:
    """Warns where layers should go to a GPU and this package, made for one, finds none.

    llama.cpp then runs on the CPU, and its own line about it is in the log that only verbose=True shows.
    """
    made_for_gpus = any(llama_cpp._base_path.glob("*ggml-cuda.*"))
    if n_gpu_layers and made_for_gpus and not llama_cpp.llama_supports_gpu_offload():
        warnings.warn(
            f"n_gpu_layers={n_gpu_layers} has no effect: no CUDA GPU was found, the model runs on the CPU", stacklevel=3
        )


_lock = threading.RLock()


@contextlib.contextmanager
def _process_params(options: Options) -> Iterator[None]:
    """The library's parameters are those of `options` inside, and what they were afterwards. Hold the lock."""
    set_params = _function("llama_kvtc_set_params", [_Params], None)
    defaults = _function("llama_kvtc_default_params", [], _Params)()
    # .files is a copy: the library's own string changes below.
    before = (defaults.files, defaults.n_sink, defaults.n_window)
    files, sink, window = before
    if options.file is not None:
        files = ",".join(os.fspath(path) for path in options.paths()).encode()
    sink = sink if options.sink is None else options.sink
    window = window if options.window is None else options.window
    set_params(_Params(files, sink, window))
    try:
        yield
    finally:
        set_params(_Params(*before))


_log_lock = threading.Lock()
_heard: Dict[int, List[str]] = {}  # by thread: the error lines of those inside `_errors`
_forward: Tuple[Any, Any] = (None, None)  # the logger in place before, and its data


@llama_cpp.llama_log_callback
def _collect(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Never freed: another thread may be in it, or on its way, when the last one leaves `_errors`."""
    lines = _heard.get(threading.get_ident())
    if lines is not None and level == LOG_ERROR and text.strip():
        lines.append(text.decode("utf-8", "replace").strip())
    logger, data = _forward
    if logger:
        logger(level, text, data)


@contextlib.contextmanager
def _errors() -> Iterator[List[str]]:
    """The error lines that the library logs for this thread inside; the logger in place still gets everything."""
    global _forward
    thread, lines = threading.get_ident(), []
    with _log_lock:
        if not _heard:
            logger, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
            llama_cpp.llama_log_get(ctypes.byref(logger), ctypes.byref(data))
            _forward = logger, data
            llama_cpp.llama_log_set(_collect, ctypes.c_void_p(0))
        _heard[thread] = lines
    try:
        yield lines
    finally:
        with _log_lock:
            del _heard[thread]
            if not _heard:
                llama_cpp.llama_log_set(*_forward)


def _failure(what: str, lines: List[str]) -> str:
    """What failed and the first line that says why: kvtc's own before gguf's, which names no file."""
    return ": ".join([what, *sorted(lines, key=lambda line: "kvtc" not in line)[:1]])


def create_context(model: Any, params: llama_cpp.llama_context_params, options: Optional[Options] = None) -> Any:
    """`llama_init_from_model` with these options. Raises ValueError, with the library's own words, where it fails."""
    coded = is_coded(params.type_k) or is_coded(params.type_v)
    with _lock, _process_params(options or Options()) if coded else contextlib.nullcontext(), _errors() as lines:
        context = llama_cpp.llama_init_from_model(model, params)
    if context is None:
        raise ValueError(_failure("Failed to create llama_context", lines))
    return context


def resume_from(context: Any, n_past: int) -> int:
    """How many of the first `n_past` tokens of sequence 0 can stay when the rest is cut off.

    A kvtc cache has exact rows of its newest tokens only: after a long cut those before it must be computed again.
    """
    is_lost = _function("llama_kvtc_is_lost", [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32], ctypes.c_bool)
    if n_past <= 0 or not is_lost(context, 0, n_past):
        return n_past
    return _function("llama_kvtc_recompute_from", [ctypes.c_void_p, ctypes.c_int32], ctypes.c_int32)(context, n_past)


def server_options(settings: Any) -> dict:
    """The keyword arguments of `Llama` for the server's settings; its cache_type may also name a cache of prompts."""
    named = settings.cache_type.strip().lower()
    files = settings.kvtc_file.split(",") if settings.kvtc_file else None  # as --kvtc-file of the command lines
    options = Options(files, settings.kvtc_window, settings.kvtc_sink)
    return {"cache_type": None if named in PROMPT_CACHES else named, **options.state()}


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A ValueError inside ends the program with its message alone: what the user gave cannot be served."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def set_state(llama: Any, state: Any) -> None:
    """Put a saved state in the cache of a `Llama`.

    Raises RuntimeError, with the library's own words, where the state does not fit; the cache is then empty.
    """
    with _errors() as lines:
        done = llama_cpp.llama_state_set_data(llama.ctx, _buffer(state.llama_state), state.llama_state_size)
    if done != state.llama_state_size:
        llama.reset()
        llama._ctx.kv_cache_clear()
        raise RuntimeError(_failure("Failed to set llama state data", lines))


def _buffer(data: bytes) -> Any:
    return (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
