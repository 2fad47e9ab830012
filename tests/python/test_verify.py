"""A calibration of another model or shape, or one that loses what attention sees, that is called fit: fails here.

Needs the patched libraries in build/bin (`make build`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import synthetic
from kvtc_gguf import calibrate, corpus, embed, native, verify
from kvtc_gguf.capture import LayerSample, rope_pairs
from kvtc_gguf.capture.llama_cpp import LlamaCapture
from kvtc_gguf.fingerprint import fingerprint
from kvtc_gguf.format import Calibration, read, write
from kvtc_gguf.libraries import NativeError
from kvtc_gguf.rotation import rotation, turns
from typer.testing import CliRunner, Result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    synthetic.tiny_model(path)
    (path.parent / "text.txt").write_text(corpus.prose()[:4000])
    arguments = [path, "-f", path.parent / "text.txt", "-c", "512", "--chunks", "4", "-t", "1"]
    result = CliRunner().invoke(calibrate.app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(verify.app, [str(a) for a in (*arguments, "--tokens", 512, "-t", 1)])


def test_a_calibration_beside_or_inside_its_model_fits(model: Path, tmp_path: Path) -> None:
    result = run(model)
    assert result.exit_code == 0, result.output
    assert f"{model.with_name('model.kvtc.gguf')}: fits {model}" in result.stdout
    for column in ("K @2", "V @4", "k2v4"):
        assert all(word in result.stdout for word in column.split())
    found = verify.verify(model, model.with_name("model.kvtc.gguf"), None, 512, 1)
    assert [errors.layer for errors in found] == [0, 1]
    for errors in found:
        for side in (errors.keys, errors.values):
            assert 0 < side[4] < 0.5 * side[2] < 0.5
        both = errors.both
        assert 0 < both[4, 4] < both[2, 4] < both[2, 2] < 0.5
    embed.embed(model, read(model.with_name("model.kvtc.gguf")), tmp_path / "embedded.gguf")
    result = run(tmp_path / "embedded.gguf")
    assert result.exit_code == 0 and f"{tmp_path / 'embedded.gguf'}: fits" in result.stdout


def test_errors_are_those_of_the_librarys_codes_and_of_its_twin(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (model, model.with_name("model.kvtc.gguf"), None, 512, 1)
    by_library = verify.verify(*arguments)
    assert "numpy" not in capsys.readouterr().err

    def missing() -> None:
        raise NativeError("the patched llama.cpp was not found")

    monkeypatch.setattr(native, "load", missing)
    by_twin = verify.verify(*arguments)
    assert capsys.readouterr().err.startswith("kvtc: note: codes are numpy's")
    for ours, theirs in zip(by_library, by_twin, strict=True):
        assert ours.keys == pytest.approx(theirs.keys, rel=0.01)
        assert ours.values == pytest.approx(theirs.values, rel=0.01)
        assert ours.both == pytest.approx(theirs.both, rel=0.01)


def test_attention_that_the_librarys_kernels_get_wrong_is_an_error(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes that decode well say nothing of the kernels that read them."""
    attend = native.attend
    monkeypatch.setattr(native, "attend", lambda *a, **k: -attend(*a, **k))
    result = run(model)
    assert result.exit_code == 1 and "says nothing" in result.stderr, result.stdout


ROPES = {
    "llama": {},
    "qwen2": {},
    "yarn": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 1024},
}


@pytest.mark.parametrize("name", ROPES)
def test_rotation_is_read_off_the_keys_whatever_the_rule(name: str, tmp_path: Path) -> None:
    architecture = "qwen2" if name == "yarn" else name
    synthetic.tiny_model(tmp_path / "model.gguf", architecture, extra=ROPES[name])
    samples: list[LayerSample] = []
    with LlamaCapture(tmp_path / "model.gguf", 600, 1) as capture:
        capture.run(np.random.default_rng(0).integers(0, 256, 600).astype(np.int32), samples.append)
        pairs = rope_pairs(32, 32, capture.interleaved)
    for sample in samples:
        turn = rotation(sample, pairs)
        scale = np.linalg.norm(sample.k_rope[..., pairs]) / np.linalg.norm(sample.k[..., pairs])
        assert (scale > 1.05) == (name == "yarn")
        got = turns(turn, pairs, scale).rotate(sample.k, np.arange(600))
        np.testing.assert_allclose(got, sample.k_rope, atol=2e-4 * np.abs(sample.k).max())


def test_a_calibration_without_the_usual_bits_is_tried_with_those_it_has(model: Path, tmp_path: Path) -> None:
    calibration = read(model.with_name("model.kvtc.gguf"))
    for sides in calibration.layers.values():
        for side in sides.values():
            side.widths = side.widths[:, [calibration.bits.index(3)]]
            used = {(h, g, int(w)) for h, rows in enumerate(side.widths) for g, w in enumerate(rows[0])}
            side.codebooks = {key: book for key, book in side.codebooks.items() if key in used}
    calibration.bits, calibration.layer_bits = [3], {}
    write(calibration, tmp_path / "c.gguf")
    (errors, _) = verify.verify(model, tmp_path / "c.gguf", None, 512, 1)
    assert list(errors.keys) == list(errors.values) == [3] and 0 < errors.both[3, 3] < 0.5


def no_layer(c: Calibration) -> None:
    del c.layers[1]


def one_head(c: Calibration) -> None:
    c.layers[1] = synthetic.calibration(2, 1, 32).layers[1]


def foreign(c: Calibration) -> None:
    c.fingerprint = "0" * 16


def another_mean(c: Calibration) -> None:
    c.layers[1]["v"].mean = c.layers[1]["v"].mean + np.float32(30)


@pytest.mark.parametrize(
    "change, words",
    [
        (no_layer, "lacks layer 1"),
        (one_head, "layer 1 k has 1 heads of 32, the model (2, 32)"),
        (foreign, "is a calibration of model 0000000000000000"),
        (another_mean, "says nothing of keys or values"),
    ],
)
def test_what_does_not_fit_is_one_line(
    model: Path, tmp_path: Path, change: Callable[[Calibration], None], words: str
) -> None:
    calibration = read(model.with_name("model.kvtc.gguf"))
    change(calibration)
    write(calibration, tmp_path / "c.gguf")
    result = run(model, tmp_path / "c.gguf")
    assert result.exit_code == 1 and words in result.stderr, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_missing_calibration_says_how_to_make_one(tmp_path: Path) -> None:
    synthetic.tiny_model(tmp_path / "model.gguf")
    assert fingerprint(tmp_path / "model.gguf")
    result = run(tmp_path / "model.gguf")
    assert result.exit_code == 1 and "kvtc_gguf.calibrate" in result.stderr


def test_errors_of_logits_and_output_are_measured_where_attention_looks() -> None:
    rng, tokens, d = np.random.default_rng(0), 200, 8
    pairs = rope_pairs(d, d, interleaved=False)
    turn = np.exp(1j * np.arange(tokens)[:, None] * 0.1 ** np.arange(d // 2))
    q, k, v = (rng.standard_normal((tokens, h, d)).astype(np.float32) for h in (4, 2, 2))
    k_rope, q_rope = (verify.rotate(x, turn[:, None], pairs) for x in (k, q))
    sample = LayerSample(0, q, k, v, q_rope, k_rope)
    attention = verify.score.far_attention(sample)
    error = 0.1 * k_rope
    assert verify.logit_error(sample, attention, error) == pytest.approx(0.1, rel=1e-5)
    constant = np.broadcast_to(rng.standard_normal((1, 2, d)), k.shape).astype(np.float32)
    assert verify.logit_error(sample, attention, constant) < 1e-6  # the same for all keys
    seen = attention.sum(axis=(0, 1)) > 0
    unseen = np.where(seen[:, None, None], 0, 1).astype(np.float32) * k_rope
    assert verify.logit_error(sample, attention, unseen) == 0
    gram = np.stack([np.eye(d, dtype=np.float32)] * 4)
    assert verify.output_error(sample, attention, 0.1 * v, gram) == pytest.approx(0.1, rel=1e-5)
