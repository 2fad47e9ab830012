"""ggml_kvtc/kvtc.h through cffi: what the C library itself says of a calibration, and its codes and attention.

    calibration = Calibration("model.kvtc.gguf")
    pack = calibration.pack(layer=0, bits_k=2, bits_v=4)
    rows = pack.encode(K, calibration.transform(0, K, keys))     # keys before RoPE, f32 [n, H, d]
    z = pack.decode(K, rows)

Only reads share anything here, and the library keeps no state of its own, so threads need no lock.
"""

from kvtc_gguf.native.attend import attend
from kvtc_gguf.native.calibration import Calibration, Pack, fingerprint
from kvtc_gguf.native.library import K, Library, NativeError, V, load

__all__ = ["Calibration", "K", "Library", "NativeError", "Pack", "V", "attend", "fingerprint", "load"]
