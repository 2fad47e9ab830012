"""The built libraries as Python sees them: ggml's few functions a test needs, and everything of the kvtc headers.

The folder is $KVTC_LIB_DIR, or build/bin of this repository. The kvtc declarations come from the headers themselves.
With $KVTC_TEST_DEVICE (CUDA0, say) graphs run on that device of ggml's, and packs hold its layout before the CPU's.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from cffi import FFI
from kvtc_gguf import format as kvtc_format

ROOT = Path(__file__).resolve().parents[2]
LIB_DIR = Path(os.environ.get("KVTC_LIB_DIR") or ROOT / "build" / "bin")
K, V = 0, 1  # enum ggml_kvtc_side
DEVICE = os.environ.get("KVTC_TEST_DEVICE", "")
ROPE_NONE, ROPE_NORMAL, ROPE_NEOX = 0, 1, 2  # enum ggml_kvtc_rope_type
F32, F16, Q8_0, I8, I32, I64 = 0, 1, 8, 24, 26, 27  # enum ggml_type, fixed by the GGUF format

GGML = """
enum ggml_type { GGML_TYPE_F32 = 0 };
enum ggml_status { GGML_STATUS_SUCCESS = 0 };
struct ggml_init_params { size_t mem_size; void * mem_buffer; bool no_alloc; };
struct ggml_context * ggml_init(struct ggml_init_params params);
void ggml_free(struct ggml_context * ctx);
struct ggml_tensor * ggml_new_tensor_1d(struct ggml_context *, int type, int64_t);
struct ggml_tensor * ggml_new_tensor_2d(struct ggml_context *, int type, int64_t, int64_t);
struct ggml_tensor * ggml_new_tensor_3d(struct ggml_context *, int type, int64_t, int64_t, int64_t);
struct ggml_tensor * ggml_new_tensor_4d(struct ggml_context *, int type, int64_t, int64_t, int64_t, int64_t);
struct ggml_tensor * ggml_view_1d(struct ggml_context *, struct ggml_tensor *, int64_t, size_t offset);
struct ggml_tensor * ggml_view_3d(struct ggml_context *, struct ggml_tensor *, int64_t, int64_t, int64_t,
    size_t nb1, size_t nb2, size_t offset);
struct ggml_tensor * ggml_view_4d(struct ggml_context *, struct ggml_tensor *, int64_t, int64_t, int64_t, int64_t,
                                  size_t nb1, size_t nb2, size_t nb3, size_t offset);
struct ggml_tensor * ggml_mul_mat(struct ggml_context *, struct ggml_tensor *, struct ggml_tensor *);
struct ggml_tensor * ggml_add(struct ggml_context *, struct ggml_tensor *, struct ggml_tensor *);
struct ggml_tensor * ggml_permute(struct ggml_context *, struct ggml_tensor *, int, int, int, int);
struct ggml_tensor * ggml_rope_ext(struct ggml_context *, struct ggml_tensor * a, struct ggml_tensor * pos,
    struct ggml_tensor * factors, int n_dims, int mode, int n_ctx_orig, float freq_base, float freq_scale,
    float ext_factor, float attn_factor, float beta_fast, float beta_slow);
void * ggml_get_data(const struct ggml_tensor *);
size_t ggml_nbytes(const struct ggml_tensor *);
size_t ggml_row_size(int type, int64_t ne);
const char * ggml_type_name(int type);
struct ggml_cgraph * ggml_new_graph(struct ggml_context *);
void ggml_build_forward_expand(struct ggml_cgraph *, struct ggml_tensor *);
int ggml_graph_compute_with_ctx(struct ggml_context *, struct ggml_cgraph *, int n_threads);
typedef void * ggml_backend_t;
typedef void * ggml_backend_dev_t;
typedef void * ggml_backend_buffer_t;
void ggml_backend_load_all(void);
ggml_backend_dev_t ggml_backend_dev_by_name(const char * name);
const char * ggml_backend_dev_description(ggml_backend_dev_t);
ggml_backend_t ggml_backend_dev_init(ggml_backend_dev_t, const char * params);
bool ggml_backend_dev_supports_op(ggml_backend_dev_t, const struct ggml_tensor * op);
ggml_backend_buffer_t ggml_backend_alloc_ctx_tensors(struct ggml_context *, ggml_backend_t);
void ggml_backend_buffer_free(ggml_backend_buffer_t);
void ggml_backend_tensor_set(struct ggml_tensor *, const void * data, size_t offset, size_t size);
void ggml_backend_tensor_get(const struct ggml_tensor *, void * data, size_t offset, size_t size);
enum ggml_status ggml_backend_graph_compute(ggml_backend_t, struct ggml_cgraph *);
void ggml_backend_synchronize(ggml_backend_t);
typedef void (*ggml_log_callback)(int level, const char * text, void * user_data);
void ggml_log_set(ggml_log_callback callback, void * user_data);
"""


def declarations(header: Path) -> str:
    """The C declarations of one of our headers as cffi parses them."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", header.read_text(encoding="utf-8"), flags=re.S)
    defines = dict(re.findall(r"^#define (\w+)[ \t]+(\d+)", text, flags=re.M))
    text = re.sub(r'^#ifdef __cplusplus\n.*?^#endif\n|^#[^\n]*\n|^extern "C".*?\n', "", text, flags=re.M | re.S)
    for name, value in defines.items():
        text = re.sub(rf"\b{name}\b", value, text)
    text = re.sub(r"(\d+)/(\d+)", lambda m: str(int(m[1]) // int(m[2])), text)
    return re.sub(r"\bGGML_(?:BACKEND_)?API\b", "", text).replace("enum ggml_type ", "int ")


ffi = FFI()
ffi.cdef(GGML)
ffi.cdef(declarations(ROOT / "ggml_kvtc" / "kvtc.h"))
ffi.cdef(declarations(ROOT / "ggml_kvtc" / "kvtc-rows.h"))
ffi.cdef(declarations(ROOT / "ggml_kvtc" / "cpu" / "kvtc-cpu.h"))


def _open(name: str) -> Any:
    found = [LIB_DIR / (name + end) for end in (".so", ".dylib", ".dll") if (LIB_DIR / (name + end)).exists()]
    if not found:
        raise FileNotFoundError(f"{LIB_DIR} holds no {name}: run `make build`, or set KVTC_LIB_DIR")
    return ffi.dlopen(str(found[0]), ffi.RTLD_NOW | ffi.RTLD_GLOBAL)


base, cpu = _open("libggml-base"), _open("libggml-cpu")


@functools.cache
def device() -> tuple[Any, Any]:
    """The device $KVTC_TEST_DEVICE names, and a backend on it."""
    registry = _open("libggml")
    found = registry.ggml_backend_dev_by_name(DEVICE.encode())
    if not found:
        raise RuntimeError(f"KVTC_TEST_DEVICE={DEVICE}: ggml has no such device in {LIB_DIR}")
    return found, base.ggml_backend_dev_init(found, ffi.NULL)


@ffi.callback("void(int, const char *, void *)")
def _silent(level: int, text: Any, data: Any) -> None:
    """ggml's own complaints about a broken GGUF; the tests look at ours."""


base.ggml_log_set(_silent, ffi.NULL)


class NativeError(Exception):
    """A message that the library gave."""


class Native:
    """A calibration opened by the C loader. Raises NativeError with the loader's message."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        message = ffi.new("char[1024]")
        self.handle = base.ggml_kvtc_calibration_open(os.fsencode(path), message, 1024)
        if not self.handle:
            raise NativeError(ffi.string(message).decode())
        self.handle = ffi.gc(self.handle, base.ggml_kvtc_calibration_free)

    def with_turbo(self, side: int, bits: int, n_head: int, head_dim: int) -> Native:
        """A copy in which K or V of layer 0 is one of the data-free type turbo<bits>."""
        result = object.__new__(Native)
        result.handle = ffi.gc(base.ggml_kvtc_calibration_copy(self.handle), base.ggml_kvtc_calibration_free)
        base.ggml_kvtc_calibration_set_turbo(result.handle, 0, side, turbo_type(bits), n_head, head_dim)
        return result

    @classmethod
    def empty(cls) -> Native:
        """A calibration without layers and without a file, for `with_turbo`."""
        result = object.__new__(cls)
        result.handle = ffi.gc(base.ggml_kvtc_calibration_copy(ffi.NULL), base.ggml_kvtc_calibration_free)
        return result

    @property
    def fingerprint(self) -> str:
        return ffi.string(base.ggml_kvtc_calibration_fingerprint(self.handle)).decode()

    @property
    def bits(self) -> list[int]:
        return [int(b) for b in ffi.string(base.ggml_kvtc_calibration_bits(self.handle)).decode().split(",")]

    def shape(self, layer: int, side: int) -> tuple[int, int] | None:
        """(kv heads, head_dim), None where the file has no such layer."""
        n_head, head_dim = ffi.new("int *"), ffi.new("int *")
        found = base.ggml_kvtc_calibration_shape(self.handle, layer, side, n_head, head_dim)
        return (n_head[0], head_dim[0]) if found else None

    def layer_bits(self, layer: int, side: int, bits: int) -> int:
        """The bits that a layer keeps where `bits` are asked for, 0 where the file cannot serve that."""
        return base.ggml_kvtc_calibration_layer_bits(self.handle, layer, side, bits)

    def encode_matrix(self, layer: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        """f32 [H, d, d] and bias f32 [H, d]: z = encode @ x + bias."""
        n_head, d = self.shape(layer, side)
        encode, bias = np.empty((n_head, d, d), np.float32), np.empty((n_head, d), np.float32)
        base.ggml_kvtc_encode_matrix(self.handle, layer, side, pointer(encode, "float *"), pointer(bias, "float *"))
        return encode, bias

    def pack(self, layer: int, bits_k: int, bits_v: int) -> np.ndarray:
        """The pack of a layer, u8 at an address that is a multiple of 64; bits 0: a side of another type."""
        size = base.ggml_kvtc_pack_size(self.handle, layer, bits_k, bits_v)
        first = base.ggml_kvtc_cuda_pack_size(self.handle, layer, bits_k, bits_v) if DEVICE else 0
        pack = aligned(first + size)
        base.ggml_kvtc_pack_write(self.handle, layer, bits_k, bits_v, pointer(pack[first:]))
        if DEVICE:
            base.ggml_kvtc_cuda_pack_write(self.handle, layer, bits_k, bits_v, pointer(pack))
        return pack


def cpu_part(pack: np.ndarray) -> np.ndarray:
    """The part of a pack in the CPU's layout: behind that of a device, if it holds both."""
    return pack[int(pack[8:16].view(np.uint64)[0]) :] if DEVICE else pack


def limits(pack: np.ndarray) -> list[int]:
    """What the parameters of the attention operation say of a pack on a device; zeros without one."""
    result = ffi.new("int32_t[6]")
    if DEVICE:
        base.ggml_kvtc_cuda_pack_limits(pointer(pack), result)
    return list(result)


def native(calibration: kvtc_format.Calibration, folder: Path) -> Native:
    """The calibration by way of a sidecar file."""
    path = folder / "calibration.kvtc.gguf"
    kvtc_format.write(calibration, path)
    return Native(path)


def aligned(size: int) -> np.ndarray:
    """u8 [size] that starts at a multiple of 64, filled with 0xAA."""
    memory = np.full(size + 64, 0xAA, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def pointer(array: np.ndarray, kind: str = "void *") -> Any:
    """The address of a contiguous array; the array must outlive it."""
    assert array.flags.c_contiguous
    return ffi.cast(kind, array.ctypes.data)


def set_rope(pack: np.ndarray, rope: Any, head_dim: int) -> None:
    """Give a pack the rotation of a `reference_rope.Rope`, by way of the op_params of ggml's ROPE node."""
    floats = [rope.freq_base, rope.freq_scale, rope.ext_factor, rope.attn_factor, rope.beta_fast, rope.beta_slow]
    params = np.zeros(16, np.int32)
    params[[1, 2, 4]] = rope.n_dims, 2 if rope.neox else 0, rope.n_ctx_orig
    params[5:11] = np.array(floats, np.float32).view(np.int32)
    factors = None if rope.freq_factors is None else np.ascontiguousarray(rope.freq_factors, np.float32)
    result = ffi.new("struct ggml_kvtc_rope *")
    given = ffi.NULL if factors is None else pointer(factors, "float *")
    assert base.ggml_kvtc_rope_from_params(pointer(params, "int32_t *"), given, result)
    assert result.n_rot <= head_dim
    base.ggml_kvtc_pack_set_rope(pointer(cpu_part(pack)), result)
    if DEVICE:
        base.ggml_kvtc_cuda_pack_set_rope(pointer(pack), result)


def encode_rows(pack: np.ndarray, side: int, z: np.ndarray, row_bytes: int) -> np.ndarray:
    """Rows u8 [n, row_bytes] of z f32 [n, H, d]; what they held before is 0xFF."""
    rows = np.full((len(z), row_bytes), 0xFF, np.uint8)
    z = np.ascontiguousarray(z, np.float32)
    cpu.ggml_kvtc_cpu_encode(pointer(cpu_part(pack)), side, len(z), pointer(z, "float *"), pointer(rows, "uint8_t *"))
    return rows


def decode_rows(pack: np.ndarray, side: int, rows: np.ndarray, n_head: int, head_dim: int) -> np.ndarray:
    """z f32 [n, H, d] of rows u8 [n, row_bytes]."""
    z = np.full((len(rows), n_head, head_dim), np.nan, np.float32)
    cpu.ggml_kvtc_cpu_decode(
        pointer(cpu_part(pack)), side, len(rows), pointer(rows, "uint8_t *"), pointer(z, "float *")
    )
    return z


def kvtc_type(bits: int) -> int:
    """The ggml type kvtc<bits>."""
    return base.ggml_kvtc_type_from_name(f"kvtc{bits}".encode())


def turbo_type(bits: int) -> int:
    """The ggml type turbo<bits>."""
    return base.ggml_kvtc_type_from_name(f"turbo{bits}".encode())


def fingerprint(path: str | os.PathLike[str]) -> str:
    """The C++ fingerprint of a model. Raises NativeError with its message."""
    out, message = ffi.new("char[17]"), ffi.new("char[1024]")
    if not base.ggml_kvtc_fingerprint(os.fsencode(path), out, message, 1024):
        raise NativeError(ffi.string(message).decode())
    return ffi.string(out).decode()
