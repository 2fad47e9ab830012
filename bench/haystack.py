"""Haystacks of a given number of tokens with facts hidden in them, and the questions that find them.

After Kamradt's needle in a haystack and RULER (arXiv 2404.06654): `needle`, one fact; `multikey`, eight alike under
different names, each asked for; `tracking`, a number that is found through two assignments. Questions end where the
answer begins, so that base models can answer too; an answer is right if its first number is the hidden one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

CITIES = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Tunis", "Dublin", "Lima", "Riga", "Perth", "Sofia", "Accra")
VARIABLES = ("ALPHA", "BRAVO", "DELTA", "GAMMA", "KAPPA", "OMEGA", "SIGMA", "THETA")
KEYS = 8  # of a multikey haystack
ANSWER = 12  # tokens: some tokenizers give every digit one
INTRODUCTION = "Some numbers are hidden in the following text. Remember them.\n\n"

Tokenizer = Callable[[str, bool], list[int]]


@dataclass(frozen=True)
class Fact:
    """A sentence and where in the haystack it stands, 0 to 1."""

    text: str
    place: float


@dataclass(frozen=True)
class Question:
    text: str
    answer: str


@dataclass(frozen=True)
class Puzzle:
    """One haystack's facts, and the questions to ask of it."""

    facts: tuple[Fact, ...]
    questions: tuple[Question, ...]


def puzzles(task: str, samples: int) -> list[Puzzle]:
    """So many questions of a task (rounded up to whole haystacks), the same in every run."""
    if task == "needle":
        return [_needle(sample, (sample + 0.5) / samples) for sample in range(samples)]
    if task == "multikey":
        return [_multikey(sample) for sample in range(-(-samples // KEYS))]
    return [_tracking(sample) for sample in range(samples)]


def _needle(seed: int, place: float) -> Puzzle:
    rng = random.Random(f"needle {seed}")
    city, number = rng.choice(CITIES), _number(rng)
    return Puzzle((_fact(city, number, place),), (_question(city, number),))


def _multikey(seed: int) -> Puzzle:
    rng = random.Random(f"multikey {seed}")
    pairs = [(city, _number(rng)) for city in rng.sample(CITIES, KEYS)]
    facts = tuple(_fact(city, number, (i + 0.5) / KEYS) for i, (city, number) in enumerate(pairs))
    return Puzzle(facts, tuple(_question(city, number) for city, number in pairs))


def _tracking(seed: int) -> Puzzle:
    rng = random.Random(f"tracking {seed}")
    first, second, third, other = rng.sample(VARIABLES, 4)
    number, wrong = _number(rng), _number(rng)
    chain = (f"VAR {first} = {number}.", f"VAR {other} = {wrong}.", f"VAR {second} = VAR {first}.",
             f"VAR {third} = VAR {second}.")  # fmt: skip
    facts = tuple(Fact(f"\n{text}\n", (i + 0.5) / len(chain)) for i, text in enumerate(chain))
    return Puzzle(facts, (Question(f"\n\nThe number that VAR {third} stands for is VAR {third} =", number),))


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10000, 100000))


def _fact(city: str, number: str, place: float) -> Fact:
    return Fact(f"\nThe magic number of {city} is {number}.\n", place)


def _question(city: str, number: str) -> Question:
    return Question(f"\n\nWhat is the magic number of {city}? The magic number of {city} is", number)


def haystack(puzzle: Puzzle, filler: list[int], tokens: int, tokenize: Tokenizer) -> list[int]:
    """A prompt of exactly `tokens` tokens, the question not counted: introduction and filler with the facts in it.

    Raises:
        ValueError: the facts alone are longer.
    """
    head = tokenize(INTRODUCTION, True)
    facts = [(fact.place, tokenize(fact.text, False)) for fact in puzzle.facts]
    room = tokens - len(head) - sum(len(fact) for _, fact in facts)
    if room < 0:
        raise ValueError(f"a haystack of {tokens} tokens has no room for its facts")
    text = [filler[i % len(filler)] for i in range(room)]
    found, at = list(head), 0
    for place, fact in sorted(facts, key=lambda x: x[0]):
        to = round(place * room)
        found += text[at:to] + fact
        at = to
    return found + text[at:]


def right(question: Question, continuation: str) -> bool:
    """True if the first number of the continuation is the answer."""
    found = re.search(r"\d+", continuation)
    return bool(found) and found[0] == question.answer
