"""Failures caught: a haystack of another length, a fact cut off or in the wrong place; a wrong answer counted as right;
a cache judged by questions that the model cannot answer with f16."""

from __future__ import annotations

import pytest

from bench.haystack import KEYS, Question, haystack, puzzles, right

NEEDLE = {"kind": "retrieval", "task": "needle", "depths": [512], "samples": 4}


def letters(text: str, special: bool) -> list[int]:
    return [2] * special + list(text.encode())


@pytest.mark.parametrize("task", ["needle", "multikey", "tracking"])
def test_haystack_has_the_asked_length_and_every_fact_whole(task):
    for puzzle in puzzles(task, 6):
        tokens = haystack(puzzle, list(b"abc "), 2000, letters)
        assert len(tokens) == 2000 and tokens[0] == 2
        text = bytes(tokens).decode()
        for fact in puzzle.facts:
            assert text.count(fact.text) == 1
            assert text.index(fact.text) / 2000 == pytest.approx(fact.place, abs=0.2)
        assert all(q.answer in text for q in puzzle.questions)
    assert puzzles(task, 6) == puzzles(task, 6)


def test_needles_lie_all_over_the_depth_and_keys_are_all_asked():
    assert [p.facts[0].place for p in puzzles("needle", 4)] == [0.125, 0.375, 0.625, 0.875]
    (puzzle,) = puzzles("multikey", KEYS)
    assert len(puzzle.questions) == len({q.answer for q in puzzle.questions}) == KEYS


def test_tracking_asks_for_the_end_of_the_chain_not_for_the_other_number():
    puzzle = puzzles("tracking", 1)[0]
    numbers = [fact.text for fact in puzzle.facts if "= VAR" not in fact.text]
    assert len(numbers) == 2 and puzzle.questions[0].answer in numbers[0]


def test_too_short_a_haystack_is_an_error():
    with pytest.raises(ValueError, match="no room"):
        haystack(puzzles("multikey", 1)[0], [1], 100, letters)


@pytest.mark.parametrize(("said", "is_right"), [
    (" 12345.", True), ("12345", True), (" 123456", False), (" 1234", False), (" 54321 or 12345", False), (" no", False)
])  # fmt: skip
def test_first_number_decides(said, is_right):
    assert right(Question("", "12345"), said) == is_right


def test_scores_are_told_beside_f16s(workshop):
    workshop.ours.behave(answers={"q8_0": 3})
    rows = workshop.measured(workshop.matrix(["f16", "q8_0"], [NEEDLE]))
    found = {(r["cache"], r["metric"]): r for r in rows}
    assert found["f16", "right"]["value"] == "1" and found["q8_0", "right"]["value"] == "0.75"
    assert found["q8_0", "right/f16"]["value"] == "0.75" and found["q8_0", "right"]["n"] == "4"
    prompts = [call for call in workshop.ours.calls("completion") if call[2] == "q8_0"]
    assert all(512 < call[3] < 640 for call in prompts)  # tokens: the haystack and a question


def test_model_that_fails_with_f16_has_a_row_that_says_so(workshop):
    workshop.ours.behave(answers={"f16": 1})
    matrix = workshop.matrix(["q8_0", "f16"], [NEEDLE])
    rows = workshop.measured(matrix)
    told = {r["cache"]: (r["value"], r["error"]) for r in rows}
    assert told["f16"][0] == "0.25" and "too few to judge" in told["f16"][1]
    assert told["q8_0"][0] == "" and "with f16 the model gives 25% right answers" in told["q8_0"][1]
    assert {call[2] for call in workshop.ours.calls("completion")} == {"f16"}
    workshop.ours.forget()
    assert workshop.measured(matrix) == rows  # nor is f16 asked again
    assert not workshop.ours.calls()


def test_server_that_does_not_start_is_a_row(workshop):
    workshop.ours.behave(fail={"llama-server q8_0": "error: out of memory"})
    rows = workshop.measured(workshop.matrix(["f16", "q8_0"], [NEEDLE]))
    assert "out of memory" in next(r["error"] for r in rows if r["cache"] == "q8_0")
