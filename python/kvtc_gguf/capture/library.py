"""libllama through llama-cpp-python's ctypes declarations, without importing all of llama_cpp.

The declarations (`llama_cpp/llama_cpp.py`) are pure Python inside the upstream tree; the package's own `__init__` would
ask for jinja2 and diskcache, so a bare package object takes its place.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
import types
from pathlib import Path

from kvtc_gguf.libraries import PACKAGE, NativeError, bindings, folder


@functools.cache
def load() -> tuple[types.ModuleType, ctypes.CDLL]:
    """(llama-cpp-python's low-level module, ggml-base library), of the libraries that `kvtc_gguf.libraries` finds.

    Raises NativeError where there are none, or they do not load.
    """
    library = folder()
    module = bindings(library)
    os.environ["LLAMA_CPP_LIB_PATH"] = str(library)
    # Read when libgomp loads. Where cores are shared, threads spinning at barriers made a step seven times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Imported under its own name, as it imports its neighbours by it, but kept private: another llama_cpp in this
    # process stays what it is.
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == PACKAGE}
    try:
        bare = types.ModuleType(PACKAGE)
        bare.__path__ = [str(module)]  # type: ignore[attr-defined]
        sys.modules[PACKAGE] = bare
        api = importlib.import_module(f"{PACKAGE}.llama_cpp")
        extensions = importlib.import_module(f"{PACKAGE}._ctypes_extensions")
        base = extensions.load_shared_library("ggml-base", library)
    except (OSError, RuntimeError, ImportError, AttributeError) as error:
        raise NativeError(f"{library}: the patched llama.cpp does not load: {error}") from error
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
        sys.modules.update(others)
    return api, declare(base)


class _KvtcParams(ctypes.Structure):
    """struct llama_kvtc_params"""

    _fields_ = [("files", ctypes.c_char_p), ("n_sink", ctypes.c_int32), ("n_window", ctypes.c_int32)]


def set_kvtc_params(api: types.ModuleType, file: Path | None = None, sink: int = -1, window: int = -1) -> None:
    """Calibration, sinks and window of the contexts created next; None and -1: llama.cpp's own search and defaults."""
    function = api._lib.llama_kvtc_set_params
    function.argtypes, function.restype = [_KvtcParams], None
    function(_KvtcParams(str(file).encode() if file else None, sink, window))


def declare(base: ctypes.CDLL) -> ctypes.CDLL:
    """Sets the signatures of the few ggml functions that reading a graph node takes."""
    tensor = ctypes.c_void_p
    base.ggml_get_name.argtypes, base.ggml_get_name.restype = [tensor], ctypes.c_char_p
    base.ggml_nelements.argtypes, base.ggml_nelements.restype = [tensor], ctypes.c_int64
    base.ggml_nrows.argtypes, base.ggml_nrows.restype = [tensor], ctypes.c_int64
    base.ggml_backend_tensor_get.argtypes = [tensor, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    base.ggml_backend_tensor_get.restype = None
    return base
