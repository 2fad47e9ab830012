"""The fingerprint: the text it hashes is the README's, it sees what it should and nothing else."""

from __future__ import annotations

import zlib

import gguf
import numpy as np
import pytest
import synthetic
from damage import split_model
from kvtc_gguf.fingerprint import fingerprint, fnv1a_64
from kvtc_gguf.format import FormatError
from kvtc_gguf.gguf_io import Writer


def write_model(path, tensors, **metadata):
    writer = Writer(path)
    for key, value in metadata.items():
        writer.add(key.replace("__", "."), value)
    writer.finish([(name, array, None) for name, array in tensors.items()])


def test_fnv1a_has_its_published_values():
    assert fnv1a_64(b"") == 0xCBF29CE484222325
    assert fnv1a_64(b"a") == 0xAF63DC4C8601EC8C
    assert fnv1a_64(b"foobar") == 0x85944171F73967E8


def test_text_is_the_one_of_the_readme(tmp_path):
    rng = np.random.default_rng(0)
    small = rng.standard_normal((4, 8)).astype(np.float32)
    large = rng.standard_normal((100, 333)).astype(np.float16)
    tensors = {
        "blk.10.attn_k.weight": small,
        "output_norm.weight": small,
        "blk.2.attn_v.weight": large,
        "blk.2.attn_q_norm.weight": np.ones((1, 1, 8), np.float32),
        "blk.2.attn_q.weight": small,
    }
    write_model(
        tmp_path / "a.gguf",
        tensors,
        general__architecture="llama",
        llama__rope__freq_base=np.float32(1e6 / 3),
        llama__rope__dimension_count=np.uint32(64),
    )
    raw = large.tobytes()
    assert len(raw) > 65536
    offsets = [int(np.floor(i * (len(raw) - 4096) / 15)) for i in range(16)]
    pieces = zlib.crc32(b"".join(raw[at : at + 4096] for at in offsets))
    text = (
        f"blk.2.attn_q.weight 0 8,4 {zlib.crc32(small.tobytes()):08x}\n"
        f"blk.2.attn_v.weight 1 333,100 {pieces:08x}\n"
        f"blk.2.attn_q_norm.weight 0 8 {zlib.crc32(np.ones(8, np.float32).tobytes()):08x}\n"
        f"blk.10.attn_k.weight 0 8,4 {zlib.crc32(small.tobytes()):08x}\n"
        "rope.freq_base 333333.344\nrope.dimension_count 64\n"
    )
    assert fingerprint(tmp_path / "a.gguf") == f"{fnv1a_64(text.encode()):016x}"


def test_other_weights_or_rope_change_it_and_other_metadata_does_not(tmp_path):
    synthetic.tiny_model(tmp_path / "a.gguf")
    own = fingerprint(tmp_path / "a.gguf")
    variants = {
        "weights": ({"seed": 1}, False),
        "types": ({"dtype": np.float16}, False),
        "rope": ({"n_rot": 16}, False),
        "metadata": ({"extra": {"rope.scaling.type": "yarn"}}, True),
    }
    for name, (options, same) in variants.items():
        synthetic.tiny_model(tmp_path / f"{name}.gguf", **options)
        assert (fingerprint(tmp_path / f"{name}.gguf") == own) is same, name


def test_split_model_has_the_fingerprint_of_the_whole(tmp_path):
    synthetic.tiny_model(tmp_path / "m.gguf")
    split_model(tmp_path / "m.gguf", 3)
    for i in (1, 2):
        assert fingerprint(tmp_path / f"m-{i:05d}-of-00003.gguf") == fingerprint(tmp_path / "m.gguf")
    (tmp_path / "m-00003-of-00003.gguf").rename(tmp_path / "other.gguf")
    with pytest.raises(FormatError, match="one of 3 files"):
        fingerprint(tmp_path / "other.gguf")
    with pytest.raises(FormatError, match="m-00003-of-00003.gguf: cannot be opened"):
        fingerprint(tmp_path / "m-00001-of-00003.gguf")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    write_model(tmp_path / "a.gguf", {"v.patch.weight": np.ones(3, np.float32)}, general__architecture="clip")
    with pytest.raises(FormatError, match="holds no attention"):
        fingerprint(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError, match="not a complete GGUF"):
        fingerprint(tmp_path / "b.gguf")


def test_quantised_tensors_are_hashed_as_stored(tmp_path):
    data = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer = Writer(tmp_path / "a.gguf")
    writer.finish([("blk.0.attn_k.weight", data, gguf.GGMLQuantizationType.Q8_0)])
    text = f"blk.0.attn_k.weight 8 64,4 {zlib.crc32(data.tobytes()):08x}\n"
    assert fingerprint(tmp_path / "a.gguf") == f"{fnv1a_64(text.encode()):016x}"
