"""The C++ fingerprint. Failure caught: one that differs from Python's, so that no calibration fits its model."""

from __future__ import annotations

import ffi
import gguf
import numpy as np
import pytest
import synthetic
from damage import split_model
from kvtc_gguf.embed import embed
from kvtc_gguf.fingerprint import fingerprint
from kvtc_gguf.gguf_io import Reader, Writer
from test_fingerprint import write_model


@pytest.mark.parametrize(
    "options",
    [{}, {"architecture": "qwen2"}, {"n_layer": 12}, {"dtype": np.float16, "n_embd": 512, "n_head_kv": 4}],
    ids=str,
)
def test_fingerprint_is_that_of_python(tmp_path, options):
    options = {"n_embd": 128, **options}
    synthetic.tiny_model(tmp_path / "a.gguf", n_head=options["n_embd"] // 32, **options)
    assert ffi.fingerprint(tmp_path / "a.gguf") == fingerprint(tmp_path / "a.gguf")
    calibration = synthetic.calibration(1, 2, 32, bits=(2,), fingerprint=fingerprint(tmp_path / "a.gguf"))
    embed(tmp_path / "a.gguf", calibration, tmp_path / "b.gguf")
    assert ffi.fingerprint(tmp_path / "b.gguf") == ffi.Native(tmp_path / "b.gguf").fingerprint


def test_fingerprint_of_odd_models_is_that_of_python(tmp_path):
    """Layers come from the tensors, in the order of their numbers; large ones are sampled; odd names do not count."""
    rng = np.random.default_rng(0)
    small, large = rng.standard_normal((4, 8)).astype(np.float32), rng.standard_normal((100, 333)).astype(np.float16)
    tensors = {
        "blk.10.attn_k.weight": small,
        "blk.2.attn_v.weight": large,
        "blk.2.attn_q_norm.weight": np.ones((1, 1, 8), np.float32),
        "blk.2.attn_q.weight": small,
        "blk.002.attn_k.weight": small,
        "blk.+3.attn_k.weight": small,
        "blk.2.cross.attn_k.weight": small,
        "v.blk.2.attn_k.weight": small,
        "blk.2.attn_k.weight.x": small,
    }
    rope = {"llama__rope__freq_base": np.float32(1e6 / 3), "llama__rope__dimension_count": np.uint32(64)}
    for name, metadata in (
        ("a", {}),
        ("b", {"general__architecture": "llama", "llama__block_count": np.uint32(1), **rope}),
    ):
        write_model(tmp_path / name, tensors, **metadata)
        assert ffi.fingerprint(tmp_path / name) == fingerprint(tmp_path / name)
    data = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    Writer(tmp_path / "q").finish([("blk.0.attn_k.weight", data, gguf.GGMLQuantizationType.Q8_0)])
    assert ffi.fingerprint(tmp_path / "q") == fingerprint(tmp_path / "q")


def test_fingerprint_of_a_split_model_is_that_of_the_whole(tmp_path):
    synthetic.tiny_model(tmp_path / "m.gguf")
    split_model(tmp_path / "m.gguf", 3)
    assert ffi.fingerprint(tmp_path / "m-00001-of-00003.gguf") == fingerprint(tmp_path / "m.gguf")
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(ffi.NativeError, match="model .*: not a readable GGUF"):
        ffi.fingerprint(tmp_path / "m-00001-of-00003.gguf")


def test_fingerprint_of_no_model_is_an_error(tmp_path):
    write_model(tmp_path / "a.gguf", {"v.patch.weight": np.ones(3, np.float32)}, general__architecture="clip")
    with pytest.raises(ffi.NativeError, match="holds no attention tensors"):
        ffi.fingerprint(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    for name in ("b.gguf", "none.gguf"):
        with pytest.raises(ffi.NativeError, match="not a readable GGUF"):
            ffi.fingerprint(tmp_path / name)
    synthetic.tiny_model(tmp_path / "c.gguf")
    content = (tmp_path / "c.gguf").read_bytes()
    (tmp_path / "d.gguf").write_bytes(content[: Reader(tmp_path / "c.gguf").tensors[3].data_offset])
    with pytest.raises(ffi.NativeError, match="truncated"):
        ffi.fingerprint(tmp_path / "d.gguf")
