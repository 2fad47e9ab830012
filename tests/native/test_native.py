"""Failures caught: a public binding that differs from the numpy twin, that threads corrupt, or that crashes where it
should raise; a message of another thread's; state that the library keeps for the whole process; headers that cffi no
longer reads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import synthetic
from kvtc_gguf import libraries, native
from kvtc_gguf.format import Calibration, write
from kvtc_gguf.layout import FormatError, row_bytes
from kvtc_gguf.native import K, V
from kvtc_gguf.reference import decode_rows, encode_rows
from kvtc_gguf.reference_attention import CodedCells, attention, span_mask
from kvtc_gguf.reference_rope import Rope

HEADS, DIM, CELLS, TOKENS = 2, 64, 70, 5


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return synthetic.calibration(2, HEADS, DIM)


@pytest.fixture(scope="module")
def opened(calibration, tmp_path_factory) -> native.Calibration:
    path = tmp_path_factory.mktemp("native") / "c.kvtc.gguf"
    write(calibration, path)
    return native.Calibration(path)


def test_file_says_what_was_written(calibration, opened, tmp_path) -> None:
    assert (opened.fingerprint, opened.bits) == (calibration.fingerprint, calibration.bits)
    assert (opened.shape(1, K), opened.shape(2, K), opened.layer_bits(0, V, 3)) == ((HEADS, DIM), None, 3)
    write(synthetic.calibration(2, HEADS, DIM), tmp_path / "same.kvtc.gguf")
    write(synthetic.calibration(2, HEADS, DIM, seed=1), tmp_path / "other.kvtc.gguf")
    same, other = (native.Calibration(tmp_path / f"{name}.kvtc.gguf").hash for name in ("same", "other"))
    assert opened.hash == same != other


def test_rows_are_those_of_the_numpy_twin(calibration, opened) -> None:
    pack, rng = opened.pack(1, 2, 4), np.random.default_rng(0)
    for side, bits in ((K, 2), (V, 4)):
        own = calibration.layers[1]["kv"[side]]
        z = synthetic.draw(rng, own, 40)
        rows = pack.encode(side, z)
        assert pack.row_bytes(side) == row_bytes(HEADS, DIM, bits) == rows.shape[1]
        np.testing.assert_array_equal(rows, encode_rows(own, calibration.bits.index(bits), z, bits))
        expected = decode_rows(own, calibration.bits.index(bits), rows)
        np.testing.assert_allclose(pack.decode(side, rows), expected, rtol=1e-5)


def attended(opened: native.Calibration, calibration: Calibration, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The binding's result and the twin's."""
    rng, pack, rope = np.random.default_rng(seed), opened.pack(0, 2, 4), Rope(DIM, neox=True)
    pack.set_rope(rope)
    own = [calibration.layers[0][side] for side in "kv"]
    z = [synthetic.draw(rng, side, CELLS) for side in own]
    rows = [pack.encode(side, z[side]) for side in (K, V)]
    q = rng.standard_normal((TOKENS, 2 * HEADS, DIM)).astype(np.float32)
    cells = np.arange(CELLS, dtype=np.int32)
    queries = cells[-TOKENS:]
    options = {"scale": DIM**-0.5, "sinks": 4, "window": 16}
    got = native.attend(
        pack, q, *rows, query_positions=queries, cell_positions=cells, exact=(z[0], z[1]), threads=2, **options
    )
    sides = [
        CodedCells.of_rows(own[s], calibration.bits.index(b), rows[s], z[s].astype(np.float16), np.ones(CELLS, bool))
        for s, b in ((K, 2), (V, 4))
    ]
    mask = span_mask(queries, cells, 2**31 - 1)
    expected = attention(q, *sides, query_positions=queries, cell_positions=cells, mask=mask, rope=rope, **options)
    return got, expected


def test_attention_is_the_numpy_twins(opened, calibration) -> None:
    got, expected = attended(opened, calibration, 0)
    assert got.shape == (TOKENS, 2 * HEADS, DIM)
    assert ((got - expected) ** 2).mean() < 1e-5 * (expected**2).mean()


def test_threads_need_no_lock(opened, calibration) -> None:
    alone = [attended(opened, calibration, seed)[0] for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: attended(opened, calibration, seed)[0], range(8)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_each_thread_gets_its_own_message_and_its_own_calibration(calibration, opened, tmp_path) -> None:
    broken, other = tmp_path / "broken.gguf", tmp_path / "other.kvtc.gguf"
    broken.write_bytes(b"GGUF\3\0\0\0")
    write(synthetic.calibration(2, HEADS, DIM, seed=1), other)
    hashes = (opened.hash, native.Calibration(other).hash)
    write(calibration, tmp_path / "same.kvtc.gguf")

    def work(n: int) -> None:
        for turn in range(20):
            absent = tmp_path / f"absent-{n}-{turn}.gguf"
            for open_, path in (
                (native.Calibration, absent),
                (native.fingerprint, absent),
                (native.Calibration, broken),
            ):
                with pytest.raises(native.NativeError, match=re.escape(str(path))) as caught:
                    open_(path)
                assert "\n" not in str(caught.value)
            which = (n + turn) % 2
            assert native.Calibration((tmp_path / "same.kvtc.gguf", other)[which]).hash == hashes[which]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


def test_threads_that_load_at_once_share_one_library() -> None:
    code = """
import threading
import kvtc_gguf.native as n
barrier, found = threading.Barrier(8), []
def load():
    barrier.wait()
    found.append(n.load())
threads = [threading.Thread(target=load) for _ in range(8)]
[t.start() for t in threads], [t.join() for t in threads]
print(len(found), len(set(map(id, found))))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(native.__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["8", "1"], result.stderr


@pytest.mark.skipif("KVTC_LIB_DIR" in os.environ, reason="looks at the objects of `make build`")
def test_library_keeps_no_state_of_its_own() -> None:
    """No variable of our C sources is writable: threads need no lock because of that."""
    tree = libraries.ROOT / "build" / "llama.cpp" / "ggml"
    objects = [path for path in tree.rglob("*.o") if "ggml_kvtc" in path.parts and "ggml-cuda.dir" not in path.parts]
    assert len(objects) > 10
    for path in objects:
        said = subprocess.run(["size", "-A", path], capture_output=True, text=True, check=True).stdout
        sizes = (line.split()[:2] for line in said.splitlines() if line.startswith("."))
        writable = [name for name, size in sizes if re.match(r"\.(data|bss|tdata|tbss)(?!\.rel)", name) and int(size)]
        assert not writable, (path.name, writable)


def test_pack_of_a_layer_with_other_bits_is_that_of_its_bits(calibration, opened, tmp_path) -> None:
    mixed = synthetic.calibration(2, HEADS, DIM)
    mixed.layer_bits["k"] = [[2 if layer else bits for layer in range(2)] for bits in mixed.bits]
    write(mixed, tmp_path / "mixed.kvtc.gguf")
    other = native.Calibration(tmp_path / "mixed.kvtc.gguf")
    assert other.layer_bits(1, K, 4) == 2 and other.layer_bits(0, K, 4) == 4
    for bits in (2, 4):
        np.testing.assert_array_equal(other.pack(1, bits, 4).memory, opened.pack(1, bits, 4).memory)


def test_mistakes_raise(opened, tmp_path) -> None:
    with pytest.raises(native.NativeError, match="K of layer 0 has no 8 bits"):
        opened.pack(0, 8, 4)
    with pytest.raises(native.NativeError, match="K of layer 0 has no -1 bits"):
        opened.pack(0, -1, 4)
    for wrong in (lambda: opened.encode_matrix(7, V), lambda: opened.pack(7, 0, 4)):
        with pytest.raises(native.NativeError, match="no V of layer 7"):
            wrong()
    pack = opened.pack(0, 2, 4)
    with pytest.raises(ValueError, match="heads and head_dim"):
        pack.encode(K, np.zeros((3, HEADS, DIM + 1), np.float32))
    with pytest.raises(ValueError, match="rows of V have"):
        pack.decode(V, np.zeros((3, 5), np.uint8))
    half = opened.pack(0, 0, 4)
    with pytest.raises(ValueError, match="0 bits"):
        half.encode(K, np.zeros((1, HEADS, DIM), np.float32))
    with pytest.raises(ValueError, match="0 bits"):
        half.decode(K, np.zeros((1, 5), np.uint8))
    for rope in (Rope(DIM + 2, neox=True), Rope(DIM - 1, neox=True), Rope(0, neox=False)):
        with pytest.raises(native.NativeError, match="does not fit K of this pack"):
            pack.set_rope(rope)
    with pytest.raises(native.NativeError, match="does not fit K of this pack"):
        half.set_rope(Rope(DIM, neox=True))
    assert issubclass(native.NativeError, FormatError)  # so that a command line prints it as one line


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("q", lambda q: q[:, :, :-8], "queries must be"),
        ("q", lambda q: q[:, :1], "queries must be"),
        ("q", lambda q: q[:0], "queries must be"),
        ("query_positions", lambda p: p[:-1], "queries at"),
        ("cell_positions", lambda p: p[1:], "cells at"),
        ("k_rows", lambda rows: rows[:, :-1], "rows of K must be"),
        ("v_rows", lambda rows: rows[:-1], "rows of V must be"),
        ("exact", lambda exact: (exact[0][:-1], exact[1]), "exact K must be"),
    ],
)
def test_shapes_that_ggml_would_abort_on_raise(opened, name, change, words) -> None:
    pack, z = opened.pack(0, 2, 4), np.zeros((CELLS, HEADS, DIM), np.float32)
    arguments = {
        "q": np.zeros((TOKENS, 2 * HEADS, DIM), np.float32),
        "k_rows": pack.encode(K, z),
        "v_rows": pack.encode(V, z),
        "query_positions": np.arange(TOKENS),
        "cell_positions": np.arange(CELLS),
        "exact": (z, z),
    }
    assert native.attend(pack, scale=1.0, **arguments).shape == arguments["q"].shape
    with pytest.raises(ValueError, match=words):
        native.attend(pack, scale=1.0, **{**arguments, name: change(arguments[name])})


def test_library_that_is_not_there_is_named(tmp_path) -> None:
    code = "import kvtc_gguf.native as n\ntry: n.load()\nexcept n.NativeError as e: print(e)"
    (tmp_path / "libggml-base.so").write_bytes(b"no library")
    environment = {"KVTC_LIB_DIR": str(tmp_path), "PYTHONPATH": str(Path(native.__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "the patched llama.cpp does not load" in result.stdout, result.stderr
