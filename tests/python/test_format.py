"""Calibration files: what is written comes back, and whatever is wrong with one is a FormatError in one line."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest
import synthetic
from damage import DAMAGES, LAYER_BITS_DAMAGES, adaptive, rewrite, with_value, write_embedded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kvtc_gguf.format import PARTS, FormatError, metadata_arrays, read, write
from kvtc_gguf.layout import head_offsets, payload_bytes

FILES = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_same(a, b, stats=True):
    for field in dataclasses.fields(a):
        if field.name not in ("layers", "stats"):
            assert getattr(a, field.name) == getattr(b, field.name), field.name
    assert a.layers.keys() == b.layers.keys()
    for layer, sides in a.layers.items():
        for name, side in sides.items():
            other = b.layers[layer][name]
            assert side.transforms == other.transforms
            assert side.codebooks.keys() == other.codebooks.keys()
            for key in ("mean", "scale", "gain_base", "gain_rule", "decode", "widths"):
                first, second = getattr(side, key), getattr(other, key)
                assert first.dtype == second.dtype, key
                np.testing.assert_array_equal(first, second, key)
            for key, book in side.codebooks.items():
                np.testing.assert_array_equal(book, other.codebooks[key])
    if stats:
        assert a.stats.keys() == b.stats.keys()
        for name, array in a.stats.items():
            np.testing.assert_array_equal(array, b.stats[name])


def refused(path, *words):
    with pytest.raises(FormatError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    for word in words:
        assert word in message, message


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory):
    path = tmp_path_factory.mktemp("format") / "a.kvtc.gguf"
    calibration = synthetic.calibration(2, 3, 32, 64, bits=(1, 2, 4))
    calibration.stats = {"blk.0.k.covariance": np.eye(4, dtype=np.float32), "tokens": np.array([3], np.int64)}
    write(calibration, path)
    return path


@pytest.mark.parametrize("shape", [(1, 1, 32, None), (2, 3, 64, 32), (1, 2, 80, 96), (1, 1, 256, 512)])
def test_sidecar_comes_back_as_written(tmp_path, shape):
    calibration = synthetic.calibration(*shape, seed=3)
    calibration.stats = {"blk.0.k.x": np.arange(6, dtype=np.float64).reshape(2, 3)}
    write(calibration, tmp_path / "a.gguf")
    assert_same(calibration, read(tmp_path / "a.gguf"))


def test_embedded_comes_back_as_written_without_statistics(tmp_path):
    calibration = synthetic.calibration(3, 3, 64, 32, bits=(2, 4))
    calibration.stats = {"x": np.ones(3, np.float32)}
    write_embedded(calibration, tmp_path / "a.gguf")
    back = read(tmp_path / "a.gguf")
    assert_same(calibration, back, stats=False)
    assert back.stats == {}


def test_embedded_layer_is_laid_out_as_the_readme_says():
    calibration = synthetic.calibration(1, 1, 8, bits=(3,))
    side = calibration.layers[0]["k"]
    data = metadata_arrays(calibration)["kvtc.blk.0"]
    assert data.dtype == np.uint64
    n_codebook = sum(book.size for book in side.codebooks.values())
    assert data[:3].tolist() == [8, 1, n_codebook]
    raw = data.tobytes()[48:]
    assert raw[:32] == side.mean.tobytes() and raw[32:64] == side.scale.tobytes()
    assert raw[64:72] == np.float32([side.gain_base[0], side.gain_rule[0]]).tobytes()
    assert raw[72:200] == side.decode.tobytes()
    assert raw[200:208] == side.widths.tobytes() + bytes(7)
    assert raw[208 : 208 + 2 * n_codebook] == b"".join(b.tobytes() for b in side.codebooks.values())


def test_sidecar_opens_in_the_stock_gguf_reader(sidecar):
    reader = gguf.GGUFReader(sidecar)
    assert reader.get_field("general.type").contents() == "kvtc"
    assert reader.get_field("kvtc.bits").contents() == [1, 2, 4]
    shapes = {t.name: t.data.shape for t in reader.tensors}
    assert shapes["kvtc.blk.1.v.decode"] == (3, 64, 64)
    assert shapes["kvtc.blk.1.v.widths"] == (3, 3, 8)
    assert [name.rsplit(".", 1)[1] for name in shapes if name.startswith("kvtc.blk.0.k.")] == list(PARTS)


def test_heads_start_at_multiples_of_four():
    widths = np.array([[8, 1], [1, 0], [2, 1]], np.int8)
    assert head_offsets(widths).tolist() == [0, 12, 16]
    assert payload_bytes(widths) == 20


def test_absent_and_foreign_files_are_refused(tmp_path):
    refused(tmp_path / "no.gguf", "cannot be opened")
    refused(tmp_path, "cannot be opened")
    for name, content in (
        ("empty", b""),
        ("text", b"hello " * 100),
        ("magic", b"GGUF"),
        ("old", b"GGUF\x01" + bytes(99)),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "GGUF")
    synthetic.tiny_model(tmp_path / "model.gguf", n_layer=1)
    refused(tmp_path / "model.gguf", "holds no kvtc calibration", "kvtc_gguf.calibrate")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("kvtc.version", np.uint32(2), ["version 2", "update kvtc"]),
        ("kvtc.version", np.uint32(0), ["version 0", "calibrate the model again"]),
        ("kvtc.version", "1", ["kvtc.version is STRING"]),
        ("kvtc.bits", np.array([4, 2, 1], np.int32), ["rising"]),
        ("kvtc.bits", np.array([1, 2, 7], np.int32), ["bits"]),
        ("kvtc.bits", np.array([], np.int32), ["bits"]),
        ("kvtc.bits", np.array([1, 2], np.int32), ["widths"]),
        ("kvtc.bits", np.array([1, 2, 4], np.int64), ["INT64"]),
        ("kvtc.block_count", np.uint32(1), ["layer 1"]),
        ("kvtc.block_count", np.uint32(0), ["block count"]),
        ("kvtc.block_count", np.uint32(2**31), ["block count"]),
        ("kvtc.model.fingerprint", "0123456789ABCDEF", ["fingerprint"]),
        ("kvtc.blk.0.k.transforms", ["one"], ["transforms"]),
    ],
)
def test_metadata_out_of_range_is_refused(sidecar, tmp_path, key, value, words):
    rewrite(sidecar, tmp_path / "b.gguf", meta={key: value})
    refused(tmp_path / "b.gguf", *words)


@pytest.mark.parametrize("key", ["kvtc.bits", "kvtc.block_count", "kvtc.model.fingerprint"])
def test_missing_metadata_is_refused(sidecar, tmp_path, key):
    rewrite(sidecar, tmp_path / "b.gguf", drop=(key,))
    refused(tmp_path / "b.gguf", key, "missing")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    path = tmp_path_factory.mktemp("uneven") / "a.kvtc.gguf"
    calibration = synthetic.calibration(3, 2, 32, bits=(1, 2, 4))
    del calibration.layers[1]
    write(adaptive(calibration), path)
    return path


def test_layers_of_other_bits_come_back_as_written(uneven, tmp_path):
    calibration = read(uneven)
    assert calibration.layer_bits == {"k": [[1, 0, 4], [2, 0, 1], [4, 0, 2]], "v": [[1, 0, 2], [2, 0, 4], [4, 0, 1]]}
    assert [[calibration.kept_bits(layer, side, 2) for layer in (0, 2)] for side in "kv"] == [[2, 1], [2, 4]]
    write_embedded(calibration, tmp_path / "b.gguf")
    assert_same(calibration, read(tmp_path / "b.gguf"))
    assert gguf.GGUFReader(uneven).get_field("kvtc.layer_bits.k").contents() == [1, 0, 4, 2, 0, 1, 4, 0, 2]
    rewrite(uneven, tmp_path / "c.gguf", drop=("kvtc.layer_bits.v",))
    calibration = read(tmp_path / "c.gguf")
    assert list(calibration.layer_bits) == ["k"]
    assert [calibration.kept_bits(2, "v", b) for b in (1, 2, 4)] == [1, 2, 4]


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("damage", LAYER_BITS_DAMAGES)
def test_layer_bits_out_of_range_are_refused(uneven, tmp_path, damage, side):
    key, good = f"kvtc.layer_bits.{side}", np.array(read(uneven).layer_bits[side], np.int32).reshape(-1)
    bad = LAYER_BITS_DAMAGES[damage](good)
    rewrite(uneven, tmp_path / "b.gguf", meta={key: bad})
    refused(tmp_path / "b.gguf", f"layer_bits.{side}")
    write_embedded(read(uneven), tmp_path / "c.gguf", **{key: bad})
    refused(tmp_path / "c.gguf", f"layer_bits.{side}")


@pytest.mark.parametrize("part", PARTS)
def test_missing_and_misshapen_tensors_are_refused(sidecar, tmp_path, part):
    name = f"kvtc.blk.1.v.{part}"
    rewrite(sidecar, tmp_path / "b.gguf", drop=(name,))
    refused(tmp_path / "b.gguf", name, "missing")
    rewrite(sidecar, tmp_path / "c.gguf", {name: lambda a: a[..., :-8].copy()})
    refused(tmp_path / "c.gguf", "layer 1 v")
    rewrite(sidecar, tmp_path / "d.gguf", {name: lambda a: a.astype(np.float64)})
    refused(tmp_path / "d.gguf", "layer 1 v", "float64")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("mean is NaN", ["mean", "not finite"]),
        ("scale is infinite", ["scale", "not finite"]),
        ("scale is zero", ["scale"]),
        ("scale is negative", ["scale"]),
        ("gain base is zero", ["gain base"]),
        ("gain base is huge", ["gain base"]),
        ("gain base is NaN", ["gain"]),
        ("gain rule is 2", ["gain rule"]),
        ("gain rule is a half", ["gain rule"]),
        ("decode is NaN", ["decode", "not finite"]),
        ("decode has a row of zeros", ["decode", "inverse"]),
        ("width is 7", ["widths", "7"]),
        ("width is negative", ["widths", "-1"]),
        ("widths rise", ["rise"]),
        ("widths overflow the row", ["kvtc1 row"]),
        ("codebook is NaN", ["codebook", "not finite"]),
        ("codebook falls", ["levels fall"]),
        ("codebook is too long", ["levels where the widths ask for"]),
        ("codebook is too short", ["levels where the widths ask for"]),
    ],
)
def test_values_out_of_range_are_refused(sidecar, tmp_path, damage, words):
    part, change = DAMAGES[damage]
    rewrite(sidecar, tmp_path / "b.gguf", {f"kvtc.blk.0.k.{part}": change})
    refused(tmp_path / "b.gguf", "layer 0 k", *words)


def test_statistics_with_nan_are_refused(sidecar, tmp_path):
    rewrite(sidecar, tmp_path / "b.gguf", {"kvtc.stats.blk.0.k.covariance": with_value((0, 0), np.nan)})
    refused(tmp_path / "b.gguf", "kvtc.stats.blk.0.k.covariance")


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("value", [0, 1, 7, 2**31, 2**64 - 8])
def test_embedded_sizes_out_of_range_are_refused(tmp_path, at, value):
    calibration = synthetic.calibration(1, 2, 32, bits=(2,))
    array = metadata_arrays(calibration)["kvtc.blk.0"].copy()
    array[at] = value
    write_embedded(calibration, tmp_path / "a.gguf", **{"kvtc.blk.0": array})
    refused(tmp_path / "a.gguf")


def test_embedded_layer_of_the_wrong_length_or_type_is_refused(tmp_path):
    calibration = synthetic.calibration(1, 2, 32, bits=(2,))
    array = metadata_arrays(calibration)["kvtc.blk.0"]
    wrong = [array[:-1], array[:4], array[:0], np.append(array, array[:1]), array.view(np.int64), "text", None]
    for i, value in enumerate(wrong):
        write_embedded(calibration, tmp_path / f"{i}.gguf", **{"kvtc.blk.0": value})
        refused(tmp_path / f"{i}.gguf")


def test_an_invalid_calibration_is_not_written(tmp_path):
    calibration = synthetic.calibration(1, 1, 32, bits=(2,))
    path = tmp_path / "a.gguf"
    write(calibration, path)
    before = path.read_bytes()
    calibration.layers[0]["v"].mean[0, 0] = np.nan
    with pytest.raises(FormatError, match="layer 0 v: mean"):
        write(calibration, path)
    with pytest.raises(FormatError, match="layer 0 v: mean"):
        metadata_arrays(calibration)
    calibration.layers[0]["v"].mean[0, 0] = 0
    for calibration.layer_bits in ({"k": []}, {"v": [[2, 2]]}, {"k": [[3]]}, {"q": [[2]]}):
        with pytest.raises(FormatError, match="layer_bits"):
            write(calibration, path)
    calibration.layer_bits = {}
    del calibration.layers[0]["k"].codebooks[next(iter(calibration.layers[0]["k"].codebooks))]
    with pytest.raises(FormatError, match="missing"):
        write(calibration, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def small_files(folder):
    calibration = adaptive(synthetic.calibration(1, 1, 32, bits=(1, 2)))
    write(calibration, folder / "sidecar.gguf")
    write_embedded(calibration, folder / "embedded.gguf")
    return [(folder / name).read_bytes() for name in ("sidecar.gguf", "embedded.gguf")]


@FILES
@given(data=st.data())
def test_a_truncated_file_is_refused(tmp_path, data):
    content = data.draw(st.sampled_from(small_files(tmp_path)))
    # what follows the last byte of the last tensor or key is padding
    end = len(content.rstrip(b"\0"))
    (tmp_path / "cut.gguf").write_bytes(content[: data.draw(st.integers(0, end - 1))])
    refused(tmp_path / "cut.gguf")


@FILES
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_but_never_crashes(tmp_path, data):
    content = bytearray(data.draw(st.sampled_from(small_files(tmp_path))))
    for _ in range(data.draw(st.integers(1, 4))):
        # the front holds the sizes, types and names, where damage does most
        at = data.draw(st.integers(0, data.draw(st.sampled_from([64, 1200, len(content)])) - 1))
        content[at] = data.draw(st.sampled_from([0, 1, 127, 128, 255, content[at] ^ 1, content[at] ^ 128]))
    (tmp_path / "bad.gguf").write_bytes(content)
    try:
        read(tmp_path / "bad.gguf")
    except FormatError as error:
        assert "\n" not in str(error)
