"""Bad input to the command line tools. Failures caught: a crash or a hang where a message belongs, a run that goes on
with another cache than asked for, a message that is missing, comes in several lines or does not say what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import synthetic
import tools
from damage import full_row, rewrite, with_value, with_widths
from kvtc_gguf.format import write

TOOLS = ("llama-completion", "llama-perplexity", "llama-bench", "llama-server")
TYPE = ("-ct", "kvtc-k2v4")


def arguments_of(tool: str, text: Path) -> tuple[object, ...]:
    return {
        "llama-completion": ("-no-cnv", "-p", "x", "-n", 1, "-c", 256, "-t", 1),
        "llama-perplexity": ("-f", text, "-c", 256, "-b", 256, "--chunks", 1, "-t", 1),
        "llama-bench": ("-p", 8, "-n", 0, "-r", 1, "-t", 1),
        "llama-server": ("--host", "127.0.0.1", "--port", 0, "-c", 256, "-t", 1),
    }[tool]


def refused(text: Path, model: Path, *arguments: object, words: tuple[str, ...], which=TOOLS) -> None:
    """Every tool exits with a status of its own and names the problem in one line, which holds all the words."""
    for tool in which:
        result = tools.run(tool, "-m", model, *arguments_of(tool, text), *arguments)
        assert result.code == 1, (tool, result)
        lines = tools.problems(result.err)
        # llama.cpp tries a context twice, to fit it to memory and to use it: the same line may come twice
        assert len(lines) == 1, (tool, result.err)
        for word in words:
            assert all(word in line for line in lines), (tool, result.err)


@pytest.fixture
def model(folder, tmp_path):
    """A model alone in a folder."""
    if not (folder / "plain.gguf").exists():
        synthetic.tiny_model(folder / "plain.gguf")
    return Path(shutil.copy(folder / "plain.gguf", tmp_path / "m.gguf"))


@pytest.fixture
def sidecar(model):
    """The model's calibration beside it, for kvtc1 to kvtc4."""
    path = model.with_suffix(".kvtc.gguf")
    write(tools.calibration_of(model, bits=(1, 2, 3, 4)), path)
    return path


def test_no_calibration(text, model):
    words = (f"no calibration for {model}", "python -m kvtc_gguf.calibrate", "--kvtc-file")
    refused(text, model, *TYPE, words=words)


def test_calibration_of_another_model(text, model, sidecar, tmp_path):
    synthetic.tiny_model(tmp_path / "other.gguf", seed=5)
    write(tools.calibration_of(tmp_path / "other.gguf"), sidecar)
    words = (f"{sidecar} belongs to another model", "python -m kvtc_gguf.calibrate")
    refused(text, model, *TYPE, words=words)


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_truncated_calibration(text, model, sidecar, keep):
    content = sidecar.read_bytes()
    sidecar.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    refused(text, model, *TYPE, words=(f"calibration {sidecar}: ",), which=TOOLS if keep == 0.5 else TOOLS[:1])


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("mean", with_value((0, 3), np.nan), ("kvtc.blk.0.k.mean", "NaN")),
        ("codebook", with_value(0, np.nan), ("kvtc.blk.0.k.codebook", "NaN")),
        ("widths", with_value((0, 0, 0), 7), ("kvtc.blk.0.k.widths", "7")),
        ("widths", with_value((0, 0, 0), -1), ("kvtc.blk.0.k.widths", "-1")),
        ("widths", with_widths(full_row), ("widths need",)),  # heads would start beyond their row
        ("codebook", lambda a: a[:-1].copy(), ("codebook", "too short")),
    ],
    ids=["nan-mean", "nan-codebook", "width-7", "width-negative", "offset-beyond-row", "codebook-short"],
)
def test_calibration_out_of_range(text, model, sidecar, tmp_path, part, change, words):
    rewrite(sidecar, tmp_path / "b.gguf", {f"kvtc.blk.0.k.{part}": change})
    refused(text, model, *TYPE, "--kvtc-file", tmp_path / "b.gguf", words=words, which=TOOLS[:2])


def test_newer_version(text, model, sidecar, tmp_path):
    rewrite(sidecar, tmp_path / "b.gguf", meta={"kvtc.version": np.uint32(2)})
    refused(text, model, *TYPE, "--kvtc-file", tmp_path / "b.gguf", words=("version 2", "update kvtc"))


@pytest.mark.parametrize("cache", ["kvtc-k5v2", "kvtc-k2v5", "kvtc6"])
def test_width_that_the_file_lacks(text, model, sidecar, cache):
    words = ("serves kvtc{1,2,3,4}", f"not {'kvtc6' if cache == 'kvtc6' else 'kvtc5'}", "calibrate again")
    refused(text, model, "-ct", cache, words=words, which=TOOLS if cache == "kvtc-k5v2" else TOOLS[:1])


@pytest.mark.parametrize("flag", ["--cache-type-k", "--cache-type-v"])
def test_type_that_does_not_exist(text, model, sidecar, flag):
    refused(text, model, flag, "kvtc7", words=("Unsupported cache type: kvtc7",), which=("llama-completion",))
    result = tools.run("llama-bench", "-m", model, flag, "kvtc7")
    assert result.code == 1 and f"invalid parameter for argument: {flag}" in result.err and not result.err.count("ggml")


@pytest.mark.parametrize("name", ["kvtc-k2v9", "kvtc-k0v2", "kvtc-k2", "kvtc-k2v4x", "kvtc7", "q8_0", ""])
def test_pair_of_types_that_does_not_exist(text, model, sidecar, name):
    words = ("--cache-type takes kvtc-k<a>v<b>", "from 1 to 6", f"not '{name}'")
    refused(text, model, "--cache-type", name, words=words, which=TOOLS if name == "kvtc-k2v9" else TOOLS[:1])


def test_flash_attention_off(text, model, sidecar):
    words = ("need flash attention", "drop '-fa off' or use '-fa on'")
    refused(text, model, *TYPE, "-fa", "off", words=words)


def test_named_file_that_does_not_exist(text, model, sidecar, tmp_path):
    words = (f"cannot open calibration {tmp_path / 'none.gguf'}",)
    refused(text, model, *TYPE, "--kvtc-file", tmp_path / "none.gguf", words=words)


@pytest.mark.parametrize("flag", ["--kvtc-window", "--kvtc-sink"])
@pytest.mark.parametrize("value", ["-1", "many", "", "1.5", "99999999999"])
def test_number_of_exact_tokens_that_is_none(text, model, sidecar, flag, value):
    which = ("llama-completion", "llama-bench")
    refused(text, model, *TYPE, flag, value, words=(f"{flag} takes a number of tokens", f"not '{value}'"), which=which)


def test_head_dim_that_is_no_multiple_of_the_group(text, tmp_path):
    """ggml's blocks of 8 values do not cut a head of 20 evenly; two heads' 40 values they would."""
    path = tmp_path / "m.gguf"
    synthetic.tiny_model(path, n_embd=80, head_dim=20)
    write(tools.calibration_of(path, head_dim=24), path.with_suffix(".kvtc.gguf"))
    refused(text, path, *TYPE, words=("head", "20"))


def test_calibration_of_another_shape(text, model, sidecar):
    """A file that claims the model's fingerprint."""
    write(tools.calibration_of(model, n_head=1), sidecar)
    words = (f"{sidecar} (sidecar) has 1 heads of dimension 32 for K of layer 0", "the model 2 of 32")
    refused(text, model, *TYPE, words=words, which=TOOLS[:2])
    write(tools.calibration_of(model, n_layer=1), sidecar)
    refused(text, model, *TYPE, words=(f"{sidecar} (sidecar) lacks K of layer 1", "calibrate again"), which=TOOLS[:2])


def test_attention_that_kvtc_cannot_serve(text, tmp_path):
    """deepseek2 with compressed keys (MLA) keeps no keys and values by head."""
    tools.mla_model(tmp_path / "m.gguf")
    words = ("cannot serve deepseek2 models", "use f16 or q8_0")
    refused(text, tmp_path / "m.gguf", "-ct", "kvtc4", words=words)
