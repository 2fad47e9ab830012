"""Statistics that do not come back as written, merge into something else than one run over all texts, or that a resumed
run does not go on from: fails here. The runs need the patched libraries in build/bin (`make build`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import synthetic
from kvtc_gguf import calibrate, statistics_file
from kvtc_gguf.fingerprint import fingerprint
from kvtc_gguf.format import read
from kvtc_gguf.gguf_io import Reader, Writer
from kvtc_gguf.layout import FormatError
from kvtc_gguf.run import Run
from kvtc_gguf.statistics import Moments
from kvtc_gguf.statistics_file import STREAMS, Statistics, Text
from test_format import assert_same
from typer.testing import CliRunner, Result

H, D = 2, 16


def statistics(seed: int, mark: str = "0123456789abcdef") -> Statistics:
    rng = np.random.default_rng(seed)
    result = Statistics(mark, "llama", [Text(f"text {seed}", rng.integers(0, 99, (3, 32)).astype(np.int32), 2)])
    for layer in (0, 3):
        for stream in STREAMS:
            moments = result.of(layer, stream, H, D)
            moments.add(rng.standard_normal((50, H, D)).astype(np.float32), rng.random((50, H)).astype(np.float32))
            moments.add_queries(rng.random((H, D)))
    return result


def assert_equal(a: Statistics, b: Statistics, exact: bool = True) -> None:
    assert (a.fingerprint, a.architecture) == (b.fingerprint, b.architecture)
    assert [(t.name, t.done, t.chunks.tolist()) for t in a.texts] == [
        (t.name, t.done, t.chunks.tolist()) for t in b.texts
    ]
    assert {n: sorted(s) for n, s in a.moments.items()} == {n: sorted(s) for n, s in b.moments.items()}
    for layer, streams in a.moments.items():
        for name, moments in streams.items():
            for part in Moments.SUMS:
                x, y = getattr(moments, part), getattr(b.moments[layer][name], part)
                np.testing.assert_allclose(x, y, rtol=0 if exact else 1e-9, atol=0 if exact else 1e-9)


def test_a_file_comes_back_as_written(tmp_path: Path) -> None:
    statistics_file.write(statistics(0), tmp_path / "a.gguf")
    assert_equal(statistics_file.read(tmp_path / "a.gguf"), statistics(0))
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_sums_of_two_runs_are_those_of_both_texts(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    parts = [rng.standard_normal((40, H, D)).astype(np.float32) for _ in range(2)]
    weights = [rng.random((40, H)).astype(np.float32) for _ in range(2)]
    single, whole = [Moments(H, D) for _ in parts], Moments(H, D)
    for moments, x, w in zip(single, parts, weights, strict=True):
        moments.add(x, w)
        whole.add(x, w)
    single[0].merge(single[1])
    for part in Moments.SUMS:
        np.testing.assert_allclose(getattr(single[0], part), getattr(whole, part), rtol=1e-12)
    merged = statistics(0)
    merged.merge(statistics(1))
    assert [t.name for t in merged.texts] == ["text 0", "text 1"]


def test_another_model_or_shape_is_not_merged() -> None:
    with pytest.raises(FormatError, match="statistics of model ffffffffffffffff"):
        statistics(0).merge(statistics(1, "f" * 16))
    other = statistics(1)
    other.moments[3]["v"] = Moments(H, 2 * D)
    with pytest.raises(FormatError, match="layer 3 v: .* not"):
        statistics(0).merge(other)


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("text.0", lambda a: a[:1], "text.0"),
        ("text.0", lambda a: a - 99, "text.0"),
        ("text.0", None, "text.0"),
        ("blk.3.v.outer", lambda a: a * np.nan, "blk.3.v.outer"),
        ("blk.3.v.outer", lambda a: a[:1], "blk.3.v.outer"),
        ("blk.0.k.total", lambda a: a[0], "blk.0.k.total"),
        ("blk.0.k.total", lambda a: a[:, :3], "head_dim 3"),
        ("blk.0.k_rope.count", None, "layer 0: not all"),
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: Path, name: str, change: Callable[[np.ndarray], np.ndarray] | None, words: str
) -> None:
    statistics_file.write(statistics(0), tmp_path / "a.gguf")
    reader, writer = Reader(tmp_path / "a.gguf"), Writer(tmp_path / "b.gguf")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            writer.add_key_value(key, reader.raw(key), field.types[0])
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    array = tensors.pop(name)
    if change:
        tensors[name] = np.ascontiguousarray(change(array))
    writer.finish([(n, a, None) for n, a in tensors.items()])
    with pytest.raises(FormatError, match=words):
        statistics_file.read(tmp_path / "b.gguf")


def test_other_files_are_no_statistics(tmp_path: Path) -> None:
    synthetic.tiny_model(tmp_path / "model.gguf")
    with pytest.raises(FormatError, match="holds no calibration statistics"):
        statistics_file.read(tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    synthetic.tiny_model(path)
    for name, words in (("a.txt", "The quick brown fox jumps over the lazy dog. "), ("b.txt", "return x ** 2 + 1\n")):
        (path.parent / name).write_text(words * 60)
    return path


def run(model: Path, *arguments: object) -> Result:
    return CliRunner().invoke(calibrate.app, [str(a) for a in (model, "-c", 256, "-t", 1, *arguments)])


def gathered(model: Path, out: Path, *texts: str) -> Path:
    """Statistics of a run over the texts, one after the other, each going on from the last."""
    before: list[object] = []
    for text in texts:
        path = out / f"{text}.gguf"
        result = run(model, "-f", model.parent / text, "--chunks", 4, "-o", out / "c.gguf", "--force", *before,
                     "--statistics", path)  # fmt: skip
        assert result.exit_code == 0, result.output
        before = ["--in-file", path]
    return path


def test_merged_runs_calibrate_like_one_over_both_texts(model: Path, tmp_path: Path) -> None:
    apart = [gathered(model, tmp_path, "a.txt"), gathered(model, tmp_path, "b.txt")]
    result = run(model, *(a for f in apart for a in ("--in-file", f)), "-o", tmp_path / "merged.gguf",
                 "--statistics", tmp_path / "merged-statistics.gguf")  # fmt: skip
    assert result.exit_code == 0, result.output
    once = gathered(model, tmp_path, "a.txt", "b.txt")
    assert_equal(statistics_file.read(tmp_path / "merged-statistics.gguf"), statistics_file.read(once), exact=False)
    one, other = read(tmp_path / "merged.gguf"), read(tmp_path / "c.gguf")
    assert one.corpus == "a.txt + b.txt" and one.tokens == 8 * 256
    for layer in (0, 1):
        for side in "kv":
            np.testing.assert_array_equal(one.layers[layer][side].widths, other.layers[layer][side].widths)
            np.testing.assert_allclose(one.layers[layer][side].mean, other.layers[layer][side].mean, atol=1e-6)


@pytest.mark.parametrize("after", [2, 5])
def test_an_interrupted_run_goes_on_to_the_same_calibration(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    arguments = ("-f", model.parent / "a.txt", "--chunks", 4)
    assert run(model, *arguments, "-o", tmp_path / "whole.gguf").exit_code == 0
    consume, seen = Run._check, []

    def interrupt(self: Run, sample: object) -> None:
        seen.append(sample)
        if len(seen) == 2 * after + 1:  # in the first of the two layers of a chunk, after those of the probe
            os.kill(os.getpid(), signal.SIGINT)
        consume(self, sample)

    monkeypatch.setattr(Run, "_check", interrupt)
    result = run(model, *arguments, "-o", tmp_path / "out.gguf")
    kept = tmp_path / "model.kvtc-statistics.gguf"
    assert result.exit_code == 130 and f"go on with --in-file {kept}" in result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"whole.gguf", kept.name}
    assert statistics_file.read(kept).texts[0].done == min(after, 4)
    monkeypatch.undo()
    result = run(model, "--in-file", kept, "-o", tmp_path / "out.gguf")
    assert result.exit_code == 0, result.output
    whole, resumed = read(tmp_path / "whole.gguf"), read(tmp_path / "out.gguf")
    whole.date = resumed.date = ""
    assert_same(whole, resumed)


def test_statistics_of_another_model_are_refused_before_running(model: Path, tmp_path: Path) -> None:
    statistics_file.write(statistics(0), tmp_path / "foreign.gguf")
    result = run(model, "--in-file", tmp_path / "foreign.gguf", "-o", tmp_path / "out.gguf")
    assert result.exit_code == 1 and f"statistics of model {'0123456789abcdef'}" in result.stderr
    assert fingerprint(model) in result.stderr and result.stderr.count("\n") == 1
    result = run(model, "--statistics", tmp_path / "foreign.gguf", "-o", tmp_path / "out.gguf")
    assert result.exit_code == 1 and "exists already" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["foreign.gguf"]


def test_memory_does_not_grow_with_the_tokens(model: Path, tmp_path: Path) -> None:
    def peak(chunks: int) -> int:
        out = tmp_path / f"{chunks}.gguf"
        code = "import resource; from kvtc_gguf.calibrate import app; app(standalone_mode=False);"
        code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        command = [sys.executable, "-c", code, str(model), "-c", "256", "--chunks", str(chunks), "-t", "1", "-o", out]
        run = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}
        )
        assert run.returncode == 0, run.stderr
        return int(run.stdout.split()[-1])

    small, large = peak(8), peak(64)
    # 56 chunks of q, q_rope, k, k_rope and v in f32 would be 50 MiB
    assert large < 1.05 * small, (small, large)
