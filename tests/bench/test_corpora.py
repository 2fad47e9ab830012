"""A held-out text that the calibration text shares a source with, or that changes from run to run, fails here."""

from __future__ import annotations

import pytest

from bench import corpora


@pytest.mark.parametrize("kind", ["code", "chat"])  # of the others nothing need be installed
def test_parts_share_nothing_and_are_the_same_every_time(kind: str) -> None:
    seen, held = (corpora.text(kind, held_out) for held_out in (False, True))
    assert min(len(seen), len(held)) > 100_000
    lines = [{line for line in part.splitlines() if len(line) > 60} for part in (seen, held)]
    assert len(lines[0] & lines[1]) < 0.02 * len(lines[1])
    assert corpora.text(kind, True) == held


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="must be one of prose, code, chat, foreign"):
        corpora.text("poems", False)
