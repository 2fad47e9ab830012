"""Failures caught: a result measured again, or an old one taken for that of a new build, model or calibration; a failed
cell that is lost or stops the others; repetitions that are not interleaved, ratios of runs far from each other; figures
under another cache's name; a half-written file."""

from __future__ import annotations

from pathlib import Path

import fake
import pytest

from bench import perplexity

SPEED = {"kind": "speed", "depths": [64], "prompt": 16, "generate": 4, "repetitions": 2}
QUALITY = {"kind": "quality", "ctx": 256, "chunks": 2}


def figures(rows: list[dict[str, str]], cache: str, engine: str = "ours") -> dict[str, float]:
    return {r["metric"]: float(r["value"]) for r in rows if (r["cache"], r["engine"]) == (cache, engine) and r["value"]}


def test_result_is_not_measured_again_unless_asked(workshop):
    matrix = workshop.matrix(["f16", "q8_0"], [SPEED, QUALITY])
    first = workshop.measured(matrix)
    workshop.ours.forget()
    assert workshop.measured(matrix) == first
    assert workshop.ours.calls() == []
    workshop.measured(matrix, "--redo", "--only", "ours/*/q8_0/quality/*")
    assert {call[1] for call in workshop.ours.calls()} == {"llama-perplexity"}
    assert [fake.value(call, "-ctk") for call in workshop.ours.calls()] == ["f16", "q8_0"]  # the logits, the cache
    assert [r["metric"] for r in workshop.rows()] == [r["metric"] for r in first]


@pytest.mark.parametrize(("change", "again"), [("build", ["f16", "kvtc2"]), ("model", ["f16", "kvtc2"]),
                                               ("calibration", ["kvtc2"])])  # fmt: skip
def test_old_result_is_not_taken_for_a_new_subject(workshop, change, again):
    matrix = workshop.matrix(["f16", "kvtc-k2v4"], [{"kind": "memory", "contexts": [256]}])
    workshop.measured(matrix)
    workshop.ours.forget()
    changed = {"build": "ours/llama-bench", "model": "model.gguf", "calibration": "model.kvtc.gguf"}[change]
    with (workshop.folder / changed).open("a") as file:
        file.write("# more")
    rows = workshop.measured(matrix)
    assert [fake.value(call, "-ctk") for call in workshop.ours.calls("llama-completion")] == again
    assert len(rows) == 10  # five figures each: the old rows are replaced


def test_another_text_of_the_same_name_is_measured(workshop):
    matrix = workshop.matrix(["f16"], [QUALITY])
    first = workshop.measured(matrix)
    (workshop.folder / "text.txt").write_text("Other words.\n" * 500)
    rows = workshop.measured(matrix)
    assert len(rows) == 2 * len(first) and len({r["setting"] for r in rows}) == 2


def test_failed_cell_is_a_row_and_the_others_are_measured(workshop):
    workshop.ours.behave(fail={"llama-perplexity q8_0": "error: not today"})
    matrix = workshop.matrix(["f16", "q8_0", "turbo9", "kvtc-k2v4"], [QUALITY, SPEED])
    rows = workshop.measured(matrix)
    failed = {(r["cache"], r["test"]): r["error"] for r in rows if r["error"]}
    assert set(failed) == {("q8_0", "quality"), ("turbo9", "quality"), ("turbo9", "speed")}
    assert "not today" in failed["q8_0", "quality"]
    assert "invalid parameter for argument: -ctk" in failed["turbo9", "speed"]
    assert figures(rows, "kvtc-k2v4")["kld"] == 0.04422 and figures(rows, "q8_0")["pp16"] == 50
    workshop.ours.behave(fail={})
    workshop.ours.forget()
    again = workshop.measured(matrix)  # what failed is tried again, and alone
    assert figures(again, "q8_0")["kld"] == 0.04422
    assert {fake.value(call, "-ctk") for call in workshop.ours.calls("llama-bench")} == set()
    assert [r["error"] != "" for r in again if r["cache"] == "q8_0"] == [False] * 8


def test_stopped_run_keeps_its_results_and_goes_on(workshop, monkeypatch):
    matrix = workshop.matrix(["f16", "q8_0"], [QUALITY])
    original, calls = perplexity.run_tool, iter(range(9))

    def interrupted(*arguments):
        if next(calls) == 2:  # the logits and f16 are done
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(perplexity, "run_tool", interrupted)
    result = workshop.run(matrix)
    assert result.exit_code == 130 and "the same command goes on from here" in result.output
    assert {r["cache"] for r in workshop.rows()} == {"f16"}
    assert not list((workshop.folder / "work").glob("*.kld"))
    workshop.ours.forget()
    assert {r["cache"] for r in workshop.measured(matrix)} == {"f16", "q8_0"}
    kinds = [fake.value(call, "-ctk") for call in workshop.ours.calls("llama-perplexity")]
    assert kinds == ["f16", "q8_0"]  # the logits again


def test_models_that_the_pattern_leaves_out_need_not_be_there(workshop):
    matrix = workshop.matrix(["f16"], [QUALITY], models=["model.gguf", "absent.gguf"])
    assert workshop.run(matrix).exit_code == 1
    assert {row["model"] for row in workshop.measured(matrix, "--only", "*/model*")} == {"model"}


def test_hanging_tool_is_ended_and_is_a_row(workshop):
    workshop.ours.behave(hang=["llama-perplexity"])
    matrix = workshop.matrix(["f16"], [QUALITY, {"kind": "memory", "contexts": [256]}], limit=1)
    rows = workshop.measured(matrix)
    assert "ran longer than 1 s" in next(r["error"] for r in rows if r["test"] == "quality")
    assert figures(rows, "f16")["total"] == 5.62


def test_nothing_measured_is_a_failure(workshop):
    result = workshop.run(workshop.matrix(["turbo9"], [QUALITY]))
    assert result.exit_code == 1 and "no cell has a result" in result.output
    assert [r["error"] != "" for r in workshop.rows()] == [True]


def test_repetitions_alternate_and_ratios_are_of_neighbours(workshop):
    workshop.ours.behave(drift=0.05)
    workshop.stock.behave(drift=0.05)
    matrix = workshop.matrix(["f16", "q8_0"], [SPEED])
    rows = workshop.measured(matrix, engines=("ours", "stock"))
    order = [(call[0], fake.value(call, "-ctk")) for call in workshop.ours.calls("llama-bench")]
    once = [("ours", "f16"), ("stock", "f16"), ("ours", "q8_0"), ("stock", "q8_0")]
    assert order == once * 2
    assert all(fake.value(call, "-r") == "1" for call in workshop.ours.calls("llama-bench"))
    # the machine slows down by a fifth from one round to the next, which is no part of the ratios
    drifted = next(r for r in rows if (r["engine"], r["cache"], r["metric"]) == ("ours", "f16", "pp16"))
    a, b = map(float, drifted["samples"].split())
    assert a / b > 1.1 and float(drifted["spread"]) > 5 and drifted["n"] == "2"
    over = next(r for r in rows if (r["engine"], r["cache"], r["metric"]) == ("stock", "q8_0", "tg4/ours"))
    assert float(over["value"]) == pytest.approx(1, abs=0.05) and float(over["spread"]) < 0.01
    assert "tg4/ours" not in figures(rows, "q8_0") and "pp16/f16" not in figures(rows, "f16")


def test_new_cache_is_paired_with_a_fresh_run_of_its_reference(workshop):
    before = workshop.measured(workshop.matrix(["f16"], [SPEED]))
    workshop.ours.forget()
    workshop.ours.behave(speeds=fake.SPEEDS | {"f16": 25.0})  # as if the machine were four times as slow today
    rows = workshop.measured(workshop.matrix(["f16", "q8_0"], [SPEED]))
    kinds = [fake.value(call, "-ctk") for call in workshop.ours.calls("llama-bench")]
    assert kinds == ["f16", "q8_0"] * 2
    assert figures(rows, "q8_0")["pp16/f16"] == 2  # over today's f16
    assert [r for r in rows if r["cache"] == "f16"] == before


def test_rows_say_what_the_run_did(workshop):
    caches = [{"type": "q8_0", "rotation": False}, "q8_0", {"type": "kvtc-k2v4", "window": 0}]
    rows = workshop.measured(workshop.matrix(caches, [QUALITY], arguments={"llama-perplexity": ["--no-repack"]}))
    plain, turned, kvtc = (
        next(r for r in rows if r["cache"] == x) for x in ("q8_0 unrotated", "q8_0", "kvtc-k2v4 4+0")
    )
    assert (plain["rotation"], turned["rotation"], kvtc["rotation"]) == ("none", "k+v", "none")
    assert (kvtc["type_k"], kvtc["type_v"], kvtc["sinks"], kvtc["window"], kvtc["bpv"]) == (
        "kvtc2",
        "kvtc4",
        "4",
        "0",
        "3",
    )
    assert int(kvtc["bytes"]) == pytest.approx((4.22 / 4 + 2.90 + 5.12) * 2**20, rel=1e-3)  # codes, exact rows, bases
    assert (turned["bpv"], turned["upstream"], turned["threads"]) == ("8.5", "abc1234", "1")
    assert "--no-repack" in turned["setting"] and "--no-repack" in workshop.ours.calls("llama-perplexity")[0]


def test_unknown_type_of_an_engine_has_the_bits_that_it_takes(workshop):
    workshop.ours.behave(speeds=fake.SPEEDS | {"somebody3": 1.0})
    rows = workshop.measured(workshop.matrix(["somebody3"], [{"kind": "memory", "contexts": [1024]}]))
    assert float(rows[0]["bpv"]) == pytest.approx(16 * 4.22 / 22.5, rel=0.01)


def test_both_engines_are_compared_with_the_first_ones_logits(workshop):
    matrix = workshop.matrix(["q8_0"], [QUALITY])
    workshop.measured(matrix, engines=("ours", "stock"))
    bases = [c[0] for c in workshop.ours.calls("llama-perplexity") if "--kl-divergence" not in c]
    assert bases == ["ours"]
    assert not list((workshop.folder / "work").glob("*.kld"))  # gigabytes with a real model
    workshop.ours.forget()
    workshop.measured(workshop.matrix(["q8_0"], [QUALITY | {"base": "own"}]), engines=("ours", "stock"))
    bases = [c[0] for c in workshop.ours.calls("llama-perplexity") if "--kl-divergence" not in c]
    assert bases == ["ours", "stock"]


def test_calibrations_of_one_file_are_compared_with_the_same_logits(workshop):
    for name, content in (("same.gguf", b"weights"), ("other.gguf", b"others")):
        (workshop.folder / name).write_bytes(content)
    matrix = workshop.matrix(["q8_0"], [QUALITY], models=["model.gguf", "same.gguf", "other.gguf"])
    assert len({r["model"] for r in workshop.measured(matrix)}) == 3
    bases = [c for c in workshop.ours.calls("llama-perplexity") if "--kl-divergence" not in c]
    assert [Path(fake.value(c, "-m")).name for c in bases] == ["model.gguf", "other.gguf"]


def test_cache_that_no_engine_is_for_is_told(workshop):
    caches = ["f16", {"type": "q8_0", "engines": "mine"}]
    result = workshop.run(workshop.matrix(caches, [QUALITY]))
    assert result.exit_code == 0 and "q8_0 is left out: it is for engines like mine" in result.output
    assert {r["cache"] for r in workshop.rows()} == {"f16"}


def test_decode_path_is_asked_for_one_token_at_a_time(workshop):
    rows = workshop.measured(workshop.matrix(["f16"], [QUALITY | {"ubatch": 1}]))
    assert {r["test"] for r in rows} == {"decode"}
    assert {fake.value(call, "-ub") for call in workshop.ours.calls("llama-perplexity")} == {"1"}


@pytest.mark.parametrize(("text", "told"), [
    ("models: [m.gguf]\ncaches: [f16]\ntests: [{kind: speeed}]", "'kind' is one of"),
    ("models: [m.gguf]\ncaches: [f16]\ntests: [{kind: speed, depth: 3}]", "has no 'depth'"),
    ("models: [m.gguf]\ncaches: [f16, f16]\ntests: [{kind: speed}]", "listed twice"),
    ("models: [m.gguf]\ncaches: [f16]\ntests: [{kind: speed, caches: q8_0}]", "no cache of the matrix is like 'q8_0'"),
    ("models: [m.gguf]\ncaches: [f16]\ntests: [{kind: quality, chunks: 0}]", "counts start at 1"),
    ("models: []\ncaches: [f16]\ntests: [{kind: speed}]", "'models' must be a list"),
    ("models: [m.gguf\n", "matrix.yaml"),
    ("models: [m.gguf]\ncaches: [f16]\ntests: [{kind: speed}]", "make models"),
])  # fmt: skip
def test_bad_matrix_is_one_line_and_nothing_written(workshop, text, told):
    path = workshop.folder / "matrix.yaml"
    path.write_text(text)
    result = workshop.run(path)
    assert result.exit_code == 1
    lines = [line for line in result.output.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("kvtc: ") and told in lines[0]
    assert not workshop.csv.exists() and not workshop.ours.calls()


def test_foreign_csv_is_not_overwritten(workshop):
    workshop.csv.write_text("a,b\n1,2\n")
    result = workshop.run(workshop.matrix(["f16"], [QUALITY]))
    assert result.exit_code == 1 and "no column 'date'" in result.output
    assert workshop.csv.read_text() == "a,b\n1,2\n"


def test_engine_that_is_no_folder_of_tools_is_refused(workshop):
    result = workshop.run(workshop.matrix(["f16"], [QUALITY]), engines=("absent",))
    assert result.exit_code == 1 and "holds none of llama-bench" in result.output
