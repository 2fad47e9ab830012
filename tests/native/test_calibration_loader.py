"""The C loader. Failures caught: a broken file that gets through it, a message of more than one line, a file that
Python writes and C refuses."""

from __future__ import annotations

import ffi
import numpy as np
import pytest
import synthetic
from damage import DAMAGES, LAYER_BITS_DAMAGES, adaptive, rewrite, write_embedded
from kvtc_gguf import format as kvtc_format
from kvtc_gguf.format import PARTS, FormatError, metadata_arrays
from kvtc_gguf.layout import row_bytes
from kvtc_gguf.reference import encode_rows


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory):
    path = tmp_path_factory.mktemp("loader") / "a.kvtc.gguf"
    calibration = synthetic.calibration(2, 3, 32, 64, bits=(1, 2, 4))
    calibration.stats = {"blk.0.k.covariance": np.eye(4, dtype=np.float32), "tokens": np.array([3], np.int64)}
    kvtc_format.write(calibration, path)
    return path


def refused(path, *words):
    """Both the C loader and Python refuse the file, C with these words."""
    with pytest.raises(ffi.NativeError) as caught:
        ffi.Native(path)
    message = str(caught.value)
    assert message.startswith(f"calibration {path}: ") and "\n" not in message
    for word in words:
        assert word in message, message
    with pytest.raises(FormatError):
        kvtc_format.read(path)


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 32, None), (2, 3, 64, 32), (1, 2, 80, 96), (1, 1, 256, 512)])
def test_what_python_writes_is_read(tmp_path, shape, embedded):
    calibration = synthetic.calibration(*shape, bits=(2, 3, 6), seed=3)
    calibration.stats = {"blk.0.k.x": np.arange(6, dtype=np.float64).reshape(2, 3)}
    (write_embedded if embedded else kvtc_format.write)(calibration, tmp_path / "a.gguf")
    c = ffi.Native(tmp_path / "a.gguf")
    assert c.fingerprint == calibration.fingerprint and c.bits == calibration.bits
    assert [b for b in range(10) if ffi.base.ggml_kvtc_calibration_has_bits(c.handle, b)] == calibration.bits
    assert c.shape(shape[0], ffi.K) is None and c.shape(-1, ffi.V) is None
    for layer, sides in calibration.layers.items():
        for i, side in enumerate(sides[name] for name in "kv"):
            assert c.shape(layer, i) == (side.n_head, side.head_dim)
            z = synthetic.draw(np.random.default_rng(0), side, 20)
            rows = ffi.encode_rows(c.pack(layer, 3, 3), i, z, row_bytes(side.n_head, side.head_dim, 3))
            np.testing.assert_array_equal(rows, encode_rows(side, 1, z, 3))


def test_layers_without_a_cache_may_be_absent(tmp_path):
    calibration = synthetic.calibration(3, 1, 32, bits=(2,))
    calibration.layers = {n: calibration.layers[n] for n in (0, 2)}
    for write in (kvtc_format.write, write_embedded):
        write(calibration, tmp_path / "a.gguf")
        c = ffi.Native(tmp_path / "a.gguf")
        assert [c.shape(n, ffi.K) for n in range(3)] == [(1, 32), None, (1, 32)]


def test_presence_is_told_without_reading(sidecar, tmp_path):
    synthetic.tiny_model(tmp_path / "model.gguf", n_layer=1)
    write_embedded(synthetic.calibration(1, 1, 32, bits=(2,)), tmp_path / "embedded.gguf")
    files = sidecar, tmp_path / "embedded.gguf", tmp_path / "model.gguf", tmp_path / "none.gguf"
    present = [ffi.base.ggml_kvtc_calibration_present(str(file).encode()) for file in files]
    assert present == [True, True, False, False]


def test_absent_and_foreign_files_are_refused(tmp_path):
    refused(tmp_path / "no.gguf", "GGUF")
    refused(tmp_path, "GGUF")
    for name, content in (("empty", b""), ("text", b"hello " * 100), ("old", b"GGUF\x01" + bytes(99))):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "GGUF")
    synthetic.tiny_model(tmp_path / "model.gguf", n_layer=1)
    refused(tmp_path / "model.gguf", "kvtc.version is missing")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("kvtc.version", np.uint32(2), ["version 2", "update kvtc"]),
        ("kvtc.version", np.uint32(0), ["version 0", "calibrate again"]),
        ("kvtc.version", "1", ["kvtc.version", "type"]),
        ("kvtc.bits", np.array([4, 2, 1], np.int32), ["kvtc.bits"]),
        ("kvtc.bits", np.array([1, 2, 7], np.int32), ["kvtc.bits"]),
        ("kvtc.bits", np.array([0, 1, 2], np.int32), ["kvtc.bits"]),
        ("kvtc.bits", np.array([], np.int32), ["kvtc.bits"]),
        ("kvtc.bits", np.array([1, 2], np.int32), ["widths"]),
        ("kvtc.bits", np.array([1, 2, 4], np.int64), ["kvtc.bits"]),
        ("kvtc.block_count", np.uint32(1), ["layer 1"]),
        ("kvtc.block_count", np.uint32(0), ["block_count"]),
        ("kvtc.block_count", np.uint32(2**31), ["block_count"]),
        ("kvtc.model.fingerprint", "0123456789ABCDEF", ["fingerprint"]),
        ("kvtc.model.fingerprint", "0123456789abcde", ["fingerprint"]),
        ("kvtc.model.fingerprint", "", ["fingerprint"]),
    ],
)
def test_metadata_out_of_range_is_refused(sidecar, tmp_path, key, value, words):
    rewrite(sidecar, tmp_path / "b.gguf", meta={key: value})
    refused(tmp_path / "b.gguf", *words)
    write_embedded(kvtc_format.read(sidecar), tmp_path / "c.gguf", **{key: value})
    refused(tmp_path / "c.gguf", *(word for word in words if word != "widths"))


@pytest.mark.parametrize("key", ["kvtc.version", "kvtc.bits", "kvtc.block_count", "kvtc.model.fingerprint"])
def test_missing_metadata_is_refused(sidecar, tmp_path, key):
    rewrite(sidecar, tmp_path / "b.gguf", drop=(key,))
    refused(tmp_path / "b.gguf", key, "missing")
    write_embedded(kvtc_format.read(sidecar), tmp_path / "c.gguf", **{key: None})
    refused(tmp_path / "c.gguf", key, "missing")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    path = tmp_path_factory.mktemp("uneven") / "a.kvtc.gguf"
    calibration = synthetic.calibration(3, 2, 32, bits=(1, 2, 4))
    del calibration.layers[1]
    kvtc_format.write(adaptive(calibration), path)
    return path


def test_c_and_python_agree_on_what_each_layer_keeps(uneven, tmp_path):
    calibration = kvtc_format.read(uneven)
    write_embedded(calibration, tmp_path / "b.gguf")
    rewrite(uneven, tmp_path / "c.gguf", drop=("kvtc.layer_bits.k",))
    rewrite(uneven, tmp_path / "d.gguf", drop=("kvtc.layer_bits.k", "kvtc.layer_bits.v"))
    files = uneven, tmp_path / "b.gguf", tmp_path / "c.gguf", tmp_path / "d.gguf"
    for file in files:
        calibration, c = kvtc_format.read(file), ffi.Native(file)
        for side, name in enumerate("kv"):
            for bits in calibration.bits:
                kept = [c.layer_bits(n, side, bits) for n in range(3)]
                assert kept == [calibration.kept_bits(0, name, bits), 0, calibration.kept_bits(2, name, bits)]
            assert c.layer_bits(0, side, 3) == c.layer_bits(3, side, 2) == c.layer_bits(-1, side, 2) == 0
    hashes = [ffi.Native(file).hash for file in files]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("damage", LAYER_BITS_DAMAGES)
def test_layer_bits_out_of_range_are_refused(uneven, tmp_path, damage, side):
    key = f"kvtc.layer_bits.{side}"
    bad = LAYER_BITS_DAMAGES[damage](np.array(kvtc_format.read(uneven).layer_bits[side], np.int32).reshape(-1))
    rewrite(uneven, tmp_path / "b.gguf", meta={key: bad})
    refused(tmp_path / "b.gguf", key)
    write_embedded(kvtc_format.read(uneven), tmp_path / "c.gguf", **{key: bad})
    refused(tmp_path / "c.gguf", key)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("part", PARTS)
def test_missing_and_misshapen_tensors_are_refused(sidecar, tmp_path, part, side):
    name = f"kvtc.blk.1.{side}.{part}"
    rewrite(sidecar, tmp_path / "b.gguf", drop=(name,))
    refused(tmp_path / "b.gguf", name, "missing")
    rewrite(sidecar, tmp_path / "c.gguf", {name: lambda a: a[..., :-8].copy()})
    refused(tmp_path / "c.gguf", f"kvtc.blk.1.{side}")
    rewrite(sidecar, tmp_path / "d.gguf", {name: lambda a: a.astype(np.float64)})
    refused(tmp_path / "d.gguf", name, "f64")


def test_a_layer_with_one_side_only_and_a_file_without_layers_are_refused(sidecar, tmp_path):
    rewrite(sidecar, tmp_path / "a.gguf", drop=[f"kvtc.blk.1.k.{part}" for part in PARTS])
    refused(tmp_path / "a.gguf", "kvtc.blk.1.k.mean is missing")
    rewrite(
        sidecar, tmp_path / "b.gguf", drop=[f"kvtc.blk.{n}.{s}.{part}" for part in PARTS for n in (0, 1) for s in "kv"]
    )
    refused(tmp_path / "b.gguf", "no layer")
    write_embedded(kvtc_format.read(sidecar), tmp_path / "c.gguf", **{"kvtc.blk.0": None, "kvtc.blk.1": None})
    refused(tmp_path / "c.gguf", "no layer")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("mean is NaN", ["mean", "NaN"]),
        ("scale is infinite", ["scale", "infinity"]),
        ("scale is zero", ["scale"]),
        ("scale is negative", ["scale"]),
        ("gain base is zero", ["gain"]),
        ("gain base is huge", ["gain"]),
        ("gain base is NaN", ["gain"]),
        ("gain rule is 2", ["gain"]),
        ("gain rule is a half", ["gain"]),
        ("decode is NaN", ["decode", "NaN"]),
        ("decode has a row of zeros", ["decode", "inverse"]),
        ("decode is nearly singular", ["decode", "inverse"]),
        ("width is 7", ["widths", "7"]),
        ("width is negative", ["widths", "-1"]),
        ("widths rise", ["rise"]),
        ("widths overflow the row", ["widths need"]),
        ("codebook is NaN", ["codebook", "NaN"]),
        ("codebook falls", ["levels do not rise"]),
        ("codebook is too long", ["too long"]),
        ("codebook is too short", ["too short"]),
    ],
)
def test_values_out_of_range_are_refused(sidecar, tmp_path, damage, words):
    part, change = DAMAGES[damage]
    rewrite(sidecar, tmp_path / "b.gguf", {f"kvtc.blk.0.k.{part}": change})
    refused(tmp_path / "b.gguf", "kvtc.blk.0.k", *words)


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("value", [0, 1, 7, 2**31, 2**62, 2**64 - 8])
def test_embedded_sizes_out_of_range_are_refused(tmp_path, at, value):
    calibration = synthetic.calibration(1, 2, 32, bits=(2,))
    array = metadata_arrays(calibration)["kvtc.blk.0"].copy()
    array[at] = value
    write_embedded(calibration, tmp_path / "a.gguf", **{"kvtc.blk.0": array})
    refused(tmp_path / "a.gguf", "kvtc.blk.0")


def test_embedded_layer_of_the_wrong_length_or_type_is_refused(tmp_path):
    calibration = synthetic.calibration(1, 2, 32, bits=(2,))
    array = metadata_arrays(calibration)["kvtc.blk.0"]
    wrong = [array[:-1], array[:4], array[:0], np.append(array, array[:1]), array.view(np.int64), "text", None]
    for i, value in enumerate(wrong):
        write_embedded(calibration, tmp_path / f"{i}.gguf", **{"kvtc.blk.0": value})
        refused(tmp_path / f"{i}.gguf")


def test_a_tensor_larger_than_the_file_is_refused(sidecar, tmp_path):
    """ggml asks for all its memory before it reads, and aborts when there is none."""
    content = sidecar.read_bytes()
    info = content.index(b"kvtc.stats.tokens") + len(b"kvtc.stats.tokens") + 4
    for size in (2**10, 2**20, 2**40, 2**56, 2**59):
        (tmp_path / "a.gguf").write_bytes(content[:info] + np.uint64(size).tobytes() + content[info + 8 :])
        refused(tmp_path / "a.gguf", "truncated")
