"""Truncated and damaged calibrations. Failures caught: the C loader crashing, or taking what Python refuses."""

from __future__ import annotations

import multiprocessing
import os
import resource

import ffi
import numpy as np
import pytest
import synthetic
from damage import adaptive, write_embedded
from kvtc_gguf import format as kvtc_format
from kvtc_gguf.format import FormatError
from kvtc_gguf.gguf_io import Reader
from kvtc_gguf.layout import BUDGETS, row_bytes


def in_child(check, *args):
    """Run `check(progress, *args)` where a crash shows as an exit code; progress names the case it was at."""
    context = multiprocessing.get_context("fork")
    progress = context.Array("c", 200)
    child = context.Process(target=_limited, args=(check, progress, *args))
    child.start()
    child.join()
    assert child.exitcode == 0, f"exit code {child.exitcode} at {progress.value.decode()}"


def _limited(check, progress, *args):
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # its shadow is terabytes of addresses
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    check(progress, *args)


def use(path):
    """Open a file; if the loader takes it, do everything with it that a cache would. True if it did."""
    try:
        c = ffi.Native(path)
    except ffi.NativeError as error:
        assert str(error).startswith(f"calibration {path}: ") and "\n" not in str(error), error
        return False
    rng = np.random.default_rng(0)
    for side in (ffi.K, ffi.V):
        n_head, d = c.shape(0, side)
        for bits in c.bits:
            pack, size = c.pack(0, bits, bits), row_bytes(n_head, d, bits)
            assert c.layer_bits(0, side, bits) in c.bits
            ffi.encode_rows(pack, side, rng.standard_normal((5, n_head, d)).astype(np.float32), size)
            ffi.decode_rows(pack, side, rng.integers(0, 256, (20, size), np.uint8), n_head, d)
        c.encode_matrix(0, side)
    return True


def small_files(folder):
    calibration = adaptive(synthetic.calibration(1, 2, 16, bits=(2, 4)))
    kvtc_format.write(calibration, folder / "sidecar.gguf")
    write_embedded(calibration, folder / "embedded.gguf")
    return [(folder / name).read_bytes() for name in ("sidecar.gguf", "embedded.gguf")]


def truncate(progress, path, content, cuts):
    for cut in cuts:
        progress.value = f"byte {cut}".encode()
        path.write_bytes(content[:cut])
        assert not use(path), f"accepted when cut at byte {cut} of {len(content)}"


def damage(progress, path, content, seeds):
    for seed in seeds:
        progress.value = f"seed {seed}".encode()
        rng = np.random.default_rng(seed)
        bad = bytearray(content)
        for _ in range(rng.integers(1, 5)):
            # the front holds the sizes, types and names, where damage does most
            at = rng.integers(0, rng.choice([64, 1200, len(bad)]))
            bad[at] = rng.choice([0, 1, 127, 128, 255, bad[at] ^ 1, bad[at] ^ 128])
        path.write_bytes(bad)
        use(path)


def test_a_truncated_file_is_refused(tmp_path):
    for content in small_files(tmp_path):
        end = len(content.rstrip(b"\0"))  # padding follows
        cuts = [*range(0, end, max(1, end // 120)), end - 1]
        in_child(truncate, tmp_path / "cut.gguf", content, cuts)


@pytest.mark.parametrize("which", [0, 1], ids=["sidecar", "embedded"])
def test_a_damaged_file_never_crashes(tmp_path, which):
    in_child(damage, tmp_path / "bad.gguf", small_files(tmp_path)[which], range(300))


def test_c_takes_layer_bits_exactly_when_python_does(tmp_path):
    calibration = synthetic.calibration(3, 1, 16, bits=(2, 4))
    del calibration.layers[1]
    path, rng, taken = tmp_path / "a.gguf", np.random.default_rng(0), 0
    for seed in range(200):
        table = rng.choice([2, 4], (2, 3)).astype(np.int32) * [1, 0, 1]
        if rng.random() < 0.7:
            table[tuple(rng.integers(0, (2, 3)))] = rng.choice([0, *BUDGETS, -1, 2**31 - 1])
        flat = table.astype(np.int32).reshape(-1)[: rng.choice([5, 6, 6, 6])]
        write_embedded(calibration, path, **{f"kvtc.layer_bits.{rng.choice(['k', 'v'])}": flat})
        try:
            kvtc_format.read(path)
            python = True
        except FormatError:
            python = False
        assert use(path) is python, f"seed {seed}: {table.tolist()}"
        taken += python
    assert 20 < taken < 180


def test_c_takes_a_damaged_payload_exactly_when_python_does(tmp_path):
    content = small_files(tmp_path)[0]
    path = tmp_path / "bad.gguf"
    start, taken = Reader(tmp_path / "sidecar.gguf").tensors[0].data_offset, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        bad = bytearray(content)
        bad[int(rng.integers(start, len(bad)))] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(bad)
        try:
            kvtc_format.read(path)
            python = True
        except FormatError:
            python = False
        assert use(path) is python, f"seed {seed}"
        taken += python
    assert 20 < taken < 190
