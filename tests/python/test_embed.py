"""Embedding: the model's own bytes are untouched, foreign calibrations are refused, nothing is half-written."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import synthetic
from damage import adaptive
from kvtc_gguf import embed as embed_module
from kvtc_gguf import extract
from kvtc_gguf.embed import embed
from kvtc_gguf.fingerprint import fingerprint
from kvtc_gguf.format import FormatError, read, write
from kvtc_gguf.gguf_io import Reader, Writer
from test_format import assert_same
from typer.testing import CliRunner


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.gguf"
    synthetic.tiny_model(path, dtype=np.float16)
    return path


def calibration_of(model, seed=0):
    return synthetic.calibration(2, 2, 32, bits=(2, 4), seed=seed, fingerprint=fingerprint(model))


def test_tensors_and_metadata_of_the_model_are_copied_exactly(model, tmp_path):
    calibration = calibration_of(model)
    embed(model, calibration, tmp_path / "out.gguf")
    before, after = gguf.GGUFReader(model), gguf.GGUFReader(tmp_path / "out.gguf")
    own = [key for key in before.fields if not key.startswith("GGUF.")]
    assert [key for key in after.fields if not key.startswith(("GGUF.", "kvtc."))] == own
    for key in own:
        assert before.fields[key].types == after.fields[key].types
        assert before.fields[key].contents() == after.fields[key].contents()
    assert [t.name for t in before.tensors] == [t.name for t in after.tensors]
    for a, b in zip(before.tensors, after.tensors, strict=True):
        assert a.tensor_type == b.tensor_type and a.shape.tolist() == b.shape.tolist()
        assert a.data.tobytes() == b.data.tobytes()
    assert after.fields["kvtc.blk.0"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT64]
    assert_same(calibration, read(tmp_path / "out.gguf"))
    assert fingerprint(tmp_path / "out.gguf") == fingerprint(model)


def test_unusual_alignment_and_empty_values_survive(tmp_path):
    synthetic.tiny_model(tmp_path / "plain.gguf", n_layer=1)
    reader = Reader(tmp_path / "plain.gguf")
    writer = Writer(tmp_path / "model.gguf", alignment=128)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            writer.add_key_value(key, reader.raw(key), field.types[0])
    odd = {"general.alignment": np.uint32(128), "x.empty": "", "x.none": np.zeros(0, np.int16), "x.yes": np.bool_(True)}
    for key, value in odd.items():
        writer.add(key, value)
    writer.finish([(t.name, t.data, t.tensor_type) for t in reader.tensors])
    model = tmp_path / "model.gguf"
    calibration = synthetic.calibration(1, 2, 32, bits=(2,), fingerprint=fingerprint(model))
    embed(model, calibration, tmp_path / "out.gguf")
    after = Reader(tmp_path / "out.gguf")
    assert after.alignment == 128 and all(t.data_offset % 128 == 0 for t in after.tensors)
    assert [t.data.tobytes() for t in after.tensors] == [t.data.tobytes() for t in reader.tensors]
    assert after.raw("x.empty") == b"" and after.raw("x.none").count == 0 and after.raw("x.yes")


def test_an_older_calibration_is_replaced(model, tmp_path):
    embed(model, adaptive(calibration_of(model)), tmp_path / "a.gguf")
    small = calibration_of(model, seed=5)  # and one whose layers keep what was asked
    del small.layers[1]
    embed(tmp_path / "a.gguf", small, tmp_path / "b.gguf")
    assert_same(small, read(tmp_path / "b.gguf"))


def test_a_foreign_calibration_is_refused(model, tmp_path):
    with pytest.raises(FormatError, match="has fingerprint .* but the calibration is of 0123456789abcdef"):
        embed(model, synthetic.calibration(2, 2, 32), tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == [model]


def test_the_model_is_changed_in_place_only_when_forced(model):
    calibration = calibration_of(model)
    before = model.read_bytes()
    with pytest.raises(FormatError, match="--force"):
        embed(model, calibration, model)
    assert model.read_bytes() == before
    embed(model, calibration, model, force=True)
    assert_same(calibration, read(model))


def test_nothing_is_left_when_writing_fails(model, tmp_path, monkeypatch):
    def fail(self, tensors):
        self.path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(self.path))

    calibration = calibration_of(model)
    monkeypatch.setattr(Writer, "finish", fail)
    (tmp_path / "out.gguf").write_bytes(b"older")
    with pytest.raises(OSError):
        embed(model, calibration, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == b"older"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "out.gguf"]


def test_a_split_model_is_refused(model, tmp_path):
    reader = Reader(model)
    for i in (1, 2):
        writer = Writer(tmp_path / f"m-0000{i}-of-00002.gguf")
        writer.add("split.count", np.uint16(2))
        writer.finish([(t.name, t.data, t.tensor_type) for t in reader.tensors[i::2]])
    with pytest.raises(FormatError, match="split model; merge it"):
        embed(tmp_path / "m-00001-of-00002.gguf", synthetic.calibration(2, 2, 32), tmp_path / "out.gguf")


def test_command_lines_embed_and_extract(model, tmp_path):
    run, sidecar, out = CliRunner().invoke, tmp_path / "c.kvtc.gguf", tmp_path / "out.gguf"
    calibration = adaptive(calibration_of(model))
    calibration.stats = {"x": np.ones(2, np.float32)}
    write(calibration, sidecar)
    result = run(embed_module.app, [str(model), str(sidecar), "-o", str(out)])
    assert result.exit_code == 0, result.output
    result = run(extract.app, [str(out)])
    assert result.exit_code == 0, result.output
    assert_same(calibration, read(tmp_path / "out.kvtc.gguf"), stats=False)
    result = run(extract.app, [str(out)])
    assert result.exit_code == 1 and "exists already" in result.stderr
    result = run(embed_module.app, [str(model), str(sidecar), "-o", str(out)])
    assert result.exit_code == 1 and "exists already" in result.stderr
    result = run(embed_module.app, [str(model), str(sidecar), "-o", str(out), "--force"])
    assert result.exit_code == 0, result.output
    result = run(embed_module.app, [str(model), str(model), "-o", str(tmp_path / "new.gguf")])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    result = run(embed_module.app, [str(model), str(sidecar), "-o", str(tmp_path / "no" / "out.gguf")])
    assert result.exit_code == 1 and "No such file" in result.stderr and result.stderr.count("\n") == 1
