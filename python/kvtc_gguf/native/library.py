"""The shared libraries through cffi: C declarations from the headers that belong to them, one `Library` a folder."""

from __future__ import annotations

import functools
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cffi import FFI

from kvtc_gguf.libraries import NativeError, folder, headers

K, V = 0, 1  # enum ggml_kvtc_side
F32, F16, I8, I32, I64 = 0, 1, 24, 26, 27  # enum ggml_type, fixed by the GGUF format
LOADING = threading.Lock()  # two FFIs of one library would not take each other's pointers

# What kvtc.h and its users here need of ggml.h.
GGML = """
enum ggml_type { GGML_TYPE_F32 = 0 };
struct ggml_init_params { size_t mem_size; void * mem_buffer; bool no_alloc; };
struct ggml_context * ggml_init(struct ggml_init_params params);
void ggml_free(struct ggml_context * ctx);
struct ggml_tensor * ggml_new_tensor_1d(struct ggml_context *, int type, int64_t);
struct ggml_tensor * ggml_new_tensor_2d(struct ggml_context *, int type, int64_t, int64_t);
struct ggml_tensor * ggml_new_tensor_4d(struct ggml_context *, int type, int64_t, int64_t, int64_t, int64_t);
struct ggml_tensor * ggml_view_1d(struct ggml_context *, struct ggml_tensor *, int64_t, size_t offset);
struct ggml_tensor * ggml_view_4d(struct ggml_context *, struct ggml_tensor *, int64_t, int64_t, int64_t, int64_t,
                                  size_t nb1, size_t nb2, size_t nb3, size_t offset);
void * ggml_get_data(const struct ggml_tensor *);
size_t ggml_nbytes(const struct ggml_tensor *);
size_t ggml_row_size(int type, int64_t ne);
struct ggml_cgraph * ggml_new_graph(struct ggml_context *);
void ggml_build_forward_expand(struct ggml_cgraph *, struct ggml_tensor *);
int ggml_graph_compute_with_ctx(struct ggml_context *, struct ggml_cgraph *, int n_threads);
"""


@dataclass(frozen=True)
class Library:
    """ffi and the two libraries whose functions kvtc's headers declare. Nothing in it changes: share it."""

    ffi: FFI
    base: Any
    cpu: Any

    def pointer(self, array: np.ndarray, kind: str = "void *") -> Any:
        """The address of a contiguous array, which must outlive it."""
        if not array.flags.c_contiguous:
            raise ValueError("the array is not contiguous")
        return self.ffi.cast(kind, array.ctypes.data)

    def string(self, text: Any) -> str:
        return self.ffi.string(text).decode("utf-8", "replace")


def declarations(header: Path) -> str:
    """The C declarations of one of our headers as cffi parses them."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", header.read_text(encoding="utf-8"), flags=re.S)
    defines = dict(re.findall(r"^#define (\w+)[ \t]+(\d+)", text, flags=re.M))
    text = re.sub(r'^#ifdef __cplusplus\n.*?^#endif\n|^#[^\n]*\n|^extern "C".*?\n', "", text, flags=re.M | re.S)
    for name, value in defines.items():
        text = re.sub(rf"\b{name}\b", value, text)
    text = re.sub(r"(\d+)/(\d+)", lambda m: str(int(m[1]) // int(m[2])), text)
    return re.sub(r"\bGGML_(?:BACKEND_)?API\b", "", text).replace("enum ggml_type ", "int ")


def load(more: str = "") -> Library:
    """The libraries that `kvtc_gguf.libraries` finds.

    more: further C declarations. Raises NativeError where there is none, or it is not the patched one.
    """
    with LOADING:
        return _load(folder(), more)


@functools.cache
def _load(folder: Path, more: str) -> Library:
    # Read when libgomp loads. Where cores are shared, threads spinning at barriers made a step seven times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    ffi = FFI()
    try:
        ffi.cdef(GGML)
        ffi.cdef(more)
        for header in headers(folder):
            ffi.cdef(declarations(header))
        base, cpu = (open_library(ffi, folder, name) for name in ("libggml-base", "libggml-cpu"))
        for library, name in ((base, "ggml_kvtc_calibration_open"), (cpu, "ggml_kvtc_cpu_encode")):
            getattr(library, name)  # AttributeError where it is not the patched one
    except (OSError, AttributeError) as error:
        raise NativeError(f"{folder}: the patched llama.cpp does not load: {error}") from error
    return Library(ffi, base, cpu)


def open_library(ffi: FFI, folder: Path, name: str) -> Any:
    """A library of the folder, its symbols visible to those opened later. Raises OSError."""
    names = (f"{name}.so", f"{name}.dylib", f"{name.removeprefix('lib')}.dll", f"{name}.dll")
    found = [folder / file for file in names if (folder / file).exists()]
    if not found:
        raise OSError(f"{folder} holds no {name}")
    return ffi.dlopen(str(found[0]), ffi.RTLD_NOW | ffi.RTLD_GLOBAL)
