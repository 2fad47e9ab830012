"""What kvtc_gguf.native does not offer: ggml's graphs, devices, data-free types.

The libraries are those of build/bin, or of $KVTC_LIB_DIR.
With $KVTC_TEST_DEVICE (CUDA0, say) graphs run on that device of ggml's, and packs hold its layout before the CPU's.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from kvtc_gguf import format as kvtc_format
from kvtc_gguf.libraries import folder
from kvtc_gguf.native import Calibration, K, NativeError, V, fingerprint, load
from kvtc_gguf.native import calibration as codec
from kvtc_gguf.native.calibration import aligned
from kvtc_gguf.native.library import F16, F32, I8, I32, I64, open_library

__all__ = ["F16", "F32", "I8", "I32", "I64", "K", "NativeError", "V", "aligned", "fingerprint"]

DEVICE = os.environ.get("KVTC_TEST_DEVICE", "")
ROPE_NONE, ROPE_NORMAL, ROPE_NEOX = 0, 1, 2  # enum ggml_kvtc_rope_type
Q8_0 = 8  # enum ggml_type

MORE = """
enum ggml_status { GGML_STATUS_SUCCESS = 0 };
struct ggml_tensor * ggml_new_tensor_3d(struct ggml_context *, int type, int64_t, int64_t, int64_t);
struct ggml_tensor * ggml_view_3d(struct ggml_context *, struct ggml_tensor *, int64_t, int64_t, int64_t,
    size_t nb1, size_t nb2, size_t offset);
struct ggml_tensor * ggml_mul_mat(struct ggml_context *, struct ggml_tensor *, struct ggml_tensor *);
struct ggml_tensor * ggml_add(struct ggml_context *, struct ggml_tensor *, struct ggml_tensor *);
struct ggml_tensor * ggml_permute(struct ggml_context *, struct ggml_tensor *, int, int, int, int);
struct ggml_tensor * ggml_rope_ext(struct ggml_context *, struct ggml_tensor * a, struct ggml_tensor * pos,
    struct ggml_tensor * factors, int n_dims, int mode, int n_ctx_orig, float freq_base, float freq_scale,
    float ext_factor, float attn_factor, float beta_fast, float beta_slow);
const char * ggml_type_name(int type);
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

LIBRARY = load(MORE)
ffi, base, cpu, pointer = LIBRARY.ffi, LIBRARY.base, LIBRARY.cpu, LIBRARY.pointer


@functools.cache
def device() -> tuple[Any, Any]:
    """The device $KVTC_TEST_DEVICE names, and a backend on it."""
    registry = open_library(ffi, folder(), "libggml")
    found = registry.ggml_backend_dev_by_name(DEVICE.encode())
    if not found:
        raise RuntimeError(f"KVTC_TEST_DEVICE={DEVICE}: ggml has no such device in {folder()}")
    return found, base.ggml_backend_dev_init(found, ffi.NULL)


@ffi.callback("void(int, const char *, void *)")
def _silent(level: int, text: Any, data: Any) -> None:
    """ggml's own complaints about a broken GGUF; the tests look at ours."""


base.ggml_log_set(_silent, ffi.NULL)


class Native(Calibration):
    """A calibration opened by the C loader. Raises NativeError with the loader's message."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, LIBRARY)

    @classmethod
    def _of(cls, handle: Any) -> Native:
        result = object.__new__(cls)
        result.library, result.handle = LIBRARY, ffi.gc(handle, base.ggml_kvtc_calibration_free)
        return result

    def with_turbo(self, side: int, bits: int, n_head: int, head_dim: int) -> Native:
        """A copy in which K or V of layer 0 is one of the data-free type turbo<bits>."""
        result = Native._of(base.ggml_kvtc_calibration_copy(self.handle))
        base.ggml_kvtc_calibration_set_turbo(result.handle, 0, side, turbo_type(bits), n_head, head_dim)
        return result

    @classmethod
    def empty(cls) -> Native:
        """A calibration without layers and without a file, for `with_turbo`."""
        return cls._of(base.ggml_kvtc_calibration_copy(ffi.NULL))

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
    result = ffi.new("int32_t[7]")
    if DEVICE:
        base.ggml_kvtc_cuda_pack_limits(pointer(pack), result)
    return list(result)


def native(calibration: kvtc_format.Calibration, folder: Path) -> Native:
    """The calibration by way of a sidecar file."""
    path = folder / "calibration.kvtc.gguf"
    kvtc_format.write(calibration, path)
    return Native(path)


def set_rope(pack: np.ndarray, rope: Any, head_dim: int) -> None:
    """Give a pack the rotation of a `reference_rope.Rope`."""
    codec.set_rope(LIBRARY, cpu_part(pack), rope)
    given = codec.rope_struct(LIBRARY, rope)
    assert given.n_rot <= head_dim
    if DEVICE:
        base.ggml_kvtc_cuda_pack_set_rope(pointer(pack), given)


def encode_rows(pack: np.ndarray, side: int, z: np.ndarray, row_bytes: int) -> np.ndarray:
    """Rows u8 [n, row_bytes] of z f32 [n, H, d]."""
    return codec.encode_rows(LIBRARY, cpu_part(pack), side, z, row_bytes)


def decode_rows(pack: np.ndarray, side: int, rows: np.ndarray, n_head: int, head_dim: int) -> np.ndarray:
    """z f32 [n, H, d] of rows u8 [n, row_bytes]."""
    return codec.decode_rows(LIBRARY, cpu_part(pack), side, rows, n_head, head_dim)


def kvtc_type(bits: int) -> int:
    """The ggml type kvtc<bits>."""
    return base.ggml_kvtc_type_from_name(f"kvtc{bits}".encode())


def turbo_type(bits: int) -> int:
    """The ggml type turbo<bits>."""
    return base.ggml_kvtc_type_from_name(f"turbo{bits}".encode())
