"""A calibrate command that leaves half a file, hides its reason, or misreads the model's activations fails here.

The tests that run a model need the patched libraries in build/bin (`make build`).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import synthetic
from kvtc_gguf import calibrate, libraries
from kvtc_gguf.capture import LayerSample, library
from kvtc_gguf.capture.llama_cpp import LlamaCapture
from kvtc_gguf.corpus import parse_mix
from kvtc_gguf.fingerprint import fingerprint
from kvtc_gguf.format import read
from kvtc_gguf.model_info import ModelInfo
from typer.testing import CliRunner, Result


@pytest.fixture(params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    synthetic.tiny_model(path, request.param)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(calibrate.app, [str(a) for a in arguments])


def assert_one_line_error(result: Result, words: str, folder: Path, files: set[str]) -> None:
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], result.stderr
    assert {p.name for p in folder.iterdir()} == files


def test_bad_input_is_one_line_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    files = {"model.gguf", "text.txt", "old.gguf"}
    (tmp_path / "text.txt").write_text("not a model")
    (tmp_path / "old.gguf").write_text("keep me")
    for words, *arguments in (
        ("name one model",),
        ("name one model", model, "-m", model),
        ("no such model file", tmp_path / "absent.gguf"),
        ("not a complete GGUF", tmp_path / "text.txt", "-o", tmp_path / "out.gguf"),
        ("exists already", model, "-o", tmp_path / "old.gguf"),
        ("the model itself", model, "--embed", model, "--force"),
        ("cannot be written", model, "-o", tmp_path / "no" / "out.gguf"),
        ("no such text file", model, "-f", tmp_path / "absent.txt"),
        ("no such statistics file", model, "--tokens-of", tmp_path / "absent.gguf"),
        ("give one of", model, "--corpus", "docs=1", "-f", tmp_path / "text.txt"),
        ("poems=1 is no share", model, "--corpus", "poems=1"),
        ("no chat format", model, "--corpus", "chat=1", "-c", 256, "--chunks", 2),
        ("must be 1 to 6", model, "--bpv", 7),
        ("give --bpv, or --kv-size and --ctx together", model, "--kv-size", "1GiB"),
        ("much: no size", model, "--kv-size", "much", "--ctx", 1024),
    ):
        assert_one_line_error(run(*arguments), words, tmp_path, files)
    assert (tmp_path / "old.gguf").read_text() == "keep me"


def test_missing_library_names_make_build(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.load.cache_clear()
    monkeypatch.setattr(libraries, "ROOT", tmp_path / "empty")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("KVTC_LIB_DIR", raising=False)
    monkeypatch.delenv("KVTC_UPSTREAM_DIR", raising=False)
    assert_one_line_error(run(model), "make build", tmp_path, {"model.gguf"})


def test_text_too_short_is_one_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("short")
    result = run(model, "-f", tmp_path / "text.txt", "-c", 256)
    assert_one_line_error(result, "text too short", tmp_path, {"model.gguf", "text.txt"})


def test_broken_weights_are_one_line(tmp_path: Path) -> None:
    synthetic.tiny_model(tmp_path / "model.gguf")
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    data[-400000:-300000] = b"\xff" * 100000  # f32 NaN
    (tmp_path / "model.gguf").write_bytes(data)
    result = run(tmp_path / "model.gguf", "-c", 256, "--chunks", 2)
    assert_one_line_error(result, "NaN", tmp_path, {"model.gguf"})


@pytest.mark.parametrize("own_text", [True, False])
def test_calibration_of_a_tiny_model_is_valid_and_complete(model: Path, tmp_path: Path, own_text: bool) -> None:
    arguments = [model, "-c", 256, "--chunks", 4, "-t", 2, "--embed", tmp_path / "embedded.gguf"]
    if own_text:
        arguments += ["-o", tmp_path / "out.gguf", "--bpv", 2.5]
    else:
        (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
        arguments += ["-f", tmp_path / "text.txt", "-o", tmp_path / "out.gguf"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "_pca" in result.stdout
    calibration = read(tmp_path / "out.gguf")
    assert calibration.fingerprint == fingerprint(model)
    assert calibration.tokens == 4 * 256
    if own_text:
        assert re.search(r"2\.500 bits per value, .+: KLD predicted", result.stderr)
        k, v = map(int, re.findall(r"--cache-type kvtc-k(\d)v(\d)", result.stderr)[0])
        assert sum(calibration.kept_bits(n, "k", k) + calibration.kept_bits(n, "v", v) for n in (0, 1)) == 10
    assert sorted(calibration.layers) == [0, 1]
    assert calibration.layers[0]["k"].mean.shape == (2, 32)
    assert read(tmp_path / "embedded.gguf").layers[1]["v"].transforms == calibration.layers[1]["v"].transforms


def test_captured_keys_are_the_rotated_ones_before_rope(model: Path) -> None:
    samples: dict[int, LayerSample] = {}
    with LlamaCapture(model, 256, 2) as capture:
        tokens = capture.tokenize("All work and no play makes Jack a dull boy. " * 6)[:256]
        capture.run(tokens, lambda sample: samples.update({sample.layer: sample}))
        pairs = ModelInfo(model).pairs(32, capture.interleaved)
    assert sorted(samples) == [0, 1]
    for sample in samples.values():
        assert sample.q.shape == (256, 4, 32) and sample.k.shape == sample.v.shape == (256, 2, 32)
        for plain, rotated, scale in ((sample.k, sample.k_rope, 1), (sample.q, sample.q_rope, 32**-0.5)):
            length = np.linalg.norm(plain[:, :, pairs], axis=3) * scale
            np.testing.assert_allclose(np.linalg.norm(rotated[:, :, pairs], axis=3), length, rtol=1e-3, atol=1e-4)
        assert np.abs(sample.k[1:] - sample.k_rope[1:]).max() > 0.1
        np.testing.assert_allclose(sample.k[0], sample.k_rope[0], rtol=1e-5)


def test_an_output_projection_of_unknown_type_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(data: np.ndarray, kind: object) -> np.ndarray:
        raise NotImplementedError(kind)

    monkeypatch.setattr("kvtc_gguf.model_info.quants.dequantize", refuse)
    result = run(model, "--chunks", 2, "--ctx-size", 256)
    assert result.exit_code == 0
    assert result.output.count("warning: the gguf package cannot decode F") == 1
    assert (ModelInfo(model).gram(0, 4, 32) == np.eye(32)).all()


def test_sampled_text_is_the_same_every_time(model: Path) -> None:
    with LlamaCapture(model, 256, 2) as capture:
        first, second = capture.sample(3, 64, seed=1), capture.sample(3, 64, seed=1)
    np.testing.assert_array_equal(first, second)
    assert len({row.tobytes() for row in first}) == 3


def test_tokens_of_another_run_are_read_as_they_are(model: Path, tmp_path: Path) -> None:
    first, second, kept = tmp_path / "a.kvtc.gguf", tmp_path / "b.kvtc.gguf", tmp_path / "a.statistics.gguf"
    size = ["-c", 256, "-t", 2]
    result = run(model, "-o", first, "--statistics", kept, *size, "--chunks", 3, "--corpus", "own=2,docs=1,seed=5")
    assert result.exit_code == 0, result.output
    result = run(model, "-o", second, "--tokens-of", kept, *size)
    assert result.exit_code == 0, result.output
    mine, other = read(first), read(second)
    assert (mine.tokens, mine.corpus) == (other.tokens, other.corpus)
    for layer, sides in mine.layers.items():
        for name, side in sides.items():
            for part in ("mean", "decode", "widths"):
                np.testing.assert_array_equal(getattr(side, part), getattr(other.layers[layer][name], part))


def test_a_model_without_chats_says_that_its_text_has_none(model: Path, tmp_path: Path) -> None:
    result = run(model, "-c", 256, "--chunks", 2, "--corpus", "docs=1,chat=1")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("note: the model has no chat format") == 1
    assert read(tmp_path / "model.kvtc.gguf").corpus == parse_mix("docs=1").name
