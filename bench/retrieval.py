"""Retrieval by depth through llama-server: how many answers are right, beside those with an f16 cache."""

from __future__ import annotations

import dataclasses
import math

from bench.harness import F16, PAD, Bench, Subject, Variant, planned
from bench.haystack import ANSWER, haystack, puzzles, right
from bench.logs import RunError
from bench.matrix import Retrieval
from bench.results import Figure
from bench.server import Server, serve

ABLE = 0.5  # of the answers with f16: below it a model's failures hide the cache's
ROOM = 128  # tokens after the haystack: question and answer
FILLER = 4 * 1024 * 1024  # characters of the text that are tokenized at most


def retrieval(bench: Bench, model: Subject, test: Retrieval) -> None:
    """Every cache is asked what f16 is asked; where f16 fails, the others' rows say so and are not run."""
    setting = bench.setting(f"{test.samples} questions in {bench.text_name}", "llama-server", test)
    for depth in test.depths:
        scores: dict[str, float | str] = {}  # of each engine's f16, or why there is none
        for variant, cell in planned(bench, bench.variants(model, test), test.name, setting, depth):
            name, plain = variant.engine.name, dataclasses.replace(variant, cache=F16)
            if name not in scores:
                scores[name] = _reference(bench, plain, test, setting, depth)
            score = scores[name]
            if variant.cache == F16:
                continue  # its row is written
            if isinstance(score, str):
                bench.fail(variant, cell, f"not run: f16 failed: {score}")
            elif score < ABLE:
                bench.fail(
                    variant, cell, f"not run: with f16 the model gives {score:.0%} right answers, too few to judge"
                )
            else:
                try:
                    bench.record(variant, cell, *_ask(bench, variant, test, depth, score))
                except (RunError, ValueError) as error:
                    bench.fail(variant, cell, error)


def _reference(bench: Bench, plain: Variant, test: Retrieval, setting: str, depth: int) -> float | str:
    """The share of right answers with f16, measured unless there is a result; as text why it could not be."""
    cell = bench.cell(plain, test.name, setting, depth)
    if not (known := _score(bench, cell)) or (bench.redo and bench.pending(cell)):
        try:
            figures, sizes = _ask(bench, plain, test, depth, None)
        except (RunError, ValueError) as error:
            bench.fail(plain, cell, error)
            return " ".join(str(error).split())
        few = f"with f16 the model gives {figures[0].value:.0%} right answers, too few to judge a cache by"
        bench.record(plain, cell, figures, sizes, few if figures[0].value < ABLE else "")
        return figures[0].value
    return known[0]


def _score(bench: Bench, cell: dict[str, str]) -> list[float]:
    return [float(row["value"]) for row in bench.results.of(cell) if row["metric"] == "right"]


def _ask(bench: Bench, variant: Variant, test: Retrieval, depth: int, base: float | None):
    """The figures of all questions at a depth, and the sizes of the cache that answered them."""
    ctx = -(-(depth + ROOM) // PAD) * PAD
    sizes = bench.known_sizes(variant, ctx)
    binary = variant.engine.tool("llama-server")
    arguments = ["-m", variant.model.path, *variant.cache.arguments, "-t", bench.threads, "-c", ctx, "-np", 1]
    arguments += [*test.arguments, *bench.more(binary.stem)]
    log = bench.log(variant, f"{test.name} {depth}")
    limit = bench.matrix.limit
    with serve(Server, binary, arguments, log, start=limit, limit=limit, more=variant.cache.environment) as server:
        answers = _answers(server, bench, test, depth)
    share, n = sum(answers) / len(answers), len(answers)
    figures = [Figure("right", share, "share", math.sqrt(share * (1 - share) / n), n)]
    if base:
        figures.append(Figure("right/f16", share / base, "ratio", None, n))
    return figures, sizes


def _answers(server: Server, bench: Bench, test: Retrieval, depth: int) -> list[bool]:
    text = bench.text.path.read_text(encoding="utf-8", errors="replace")[: min(FILLER, 8 * depth + 4096)]
    filler, found = server.tokenize(text), []
    for puzzle in puzzles(test.task, test.samples):
        prompt = haystack(puzzle, filler, depth, server.tokenize)
        for number, question in enumerate(puzzle.questions):
            # a haystack is evaluated once: the questions after the first go on from it
            told = server.complete(prompt + server.tokenize(question.text), ANSWER, keep=number > 0)
            found.append(right(question, told))
    return found
