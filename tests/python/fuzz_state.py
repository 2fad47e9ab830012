"""Fuzzes the readers of saved states: `python -m tests.python.fuzz_state -max_total_time=600` (needs atheris).

Coverage guides what Python's reader sees; where the built library is there, the C++ reader is given the same bytes and
must judge them alike. Checksums are made to fit, or nothing beyond them would ever be reached. Corpus and findings go
to build/fuzz. Without atheris, `test_state_fuzz.py` drives the same function with made-up damage.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
from kvtc_gguf import reference_rows, state_file
from kvtc_gguf.layout import FormatError

ROOT = Path(__file__).resolve().parents[2]
MOST = 64 << 20  # bytes that either reader may allocate: the cap of a record, of a block's rows, and of a model
PROCESS_MOST = 1 << 20  # rows * bytes that Python decodes; the rest is left to C++


def refit(data: bytes) -> bytes:
    """The bytes as a container whose checksums are right, as far as its records can be told."""
    out, at, crc, n = bytearray(data), 8, 0, 0
    while at + state_file.FIELDS.size <= len(out):
        kind = out[at]
        size = int.from_bytes(out[at + 16 : at + 20], "little")
        if kind == state_file.END:
            out[at + 12 : at + 16], out[at + 20 : at + 24] = struct.pack("<I", n), struct.pack("<I", crc)
        else:
            out[at + 20 : at + 24] = struct.pack("<I", zlib.crc32(out[at + 28 : at + 28 + size]))
        own = struct.pack("<I", zlib.crc32(out[at : at + 24]))
        out[at + 24 : at + 28] = own
        at, crc, n = at + 28 + size, zlib.crc32(own, crc), n + 1
    return bytes(out)


def python_takes(data: bytes) -> bool | None:
    """Whether Python reads the container to its end; None: it has more rows than it is worth to decode here."""
    try:
        items, end = state_file.read_container(data)
        for section in (item for item in items if isinstance(item, state_file.Section)):
            model, size = section.row_model(), section.block_row_bytes()
            for block in section.blocks:
                if size * block.n_rows > PROCESS_MOST:
                    return None
                if block.coder == state_file.STORED:
                    if len(block.data) != size * block.n_rows:
                        return False
                elif model is None:
                    return False
                else:
                    assert model.decode(block.data, block.n_rows).dtype == np.uint8
    except FormatError:
        return False
    return end == len(data)


def library() -> ctypes.CDLL | None:
    """libllama, or None where it is not built."""
    from kvtc_gguf.capture import library as built

    try:
        api = built.load()[0]
    except FormatError:
        return None
    check = api._lib.llama_kvtc_container_check
    check.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    check.restype = ctypes.c_bool
    return api._lib


def check(data: bytes, lib: ctypes.CDLL | None) -> None:
    """Both readers come to an end, allocate little, and agree."""
    for each in (data, refit(data)):
        tracemalloc.start()
        taken = python_takes(each)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST + 4 * len(each), peak
        if lib is not None:
            reason = ctypes.create_string_buffer(256)
            native = lib.llama_kvtc_container_check(each, len(each), reason, 256)
            assert taken is None or native == taken, (taken, reason.value)
            assert native or reason.value


def main() -> None:
    import atheris

    sys.path.insert(0, str(ROOT / "tests" / "python"))
    import states

    folder = ROOT / "build" / "fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "whole").write_bytes(state_file.container_bytes(states.items()))
    (folder / "small").write_bytes(state_file.container_bytes([states.section(3, block=2), states.stored(2, 3)]))
    lib = library()
    for name in ("read_container", "_in_range"):
        setattr(state_file, name, atheris.instrument_func(getattr(state_file, name)))
    for name in ("decode", "from_bytes"):
        function = reference_rows.RowModel.__dict__[name]
        inner = atheris.instrument_func(getattr(function, "__func__", function))
        setattr(reference_rows.RowModel, name, classmethod(inner) if isinstance(function, classmethod) else inner)
    arguments = [sys.argv[0], *sys.argv[1:], f"-artifact_prefix={folder}/", str(folder)]
    atheris.Setup(arguments, lambda data: check(data, lib))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
