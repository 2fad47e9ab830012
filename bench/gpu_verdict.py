"""What a GPU's llama-bench figures say of the targets; pure functions, see `bench.gpu_check`."""

from __future__ import annotations

from bench.speed import Speed

DEEP, DEEPEST = 16384, 131072


def ratios(rows: list[Speed], base: str = "f16") -> dict[Speed, float]:
    """Tokens a second over those of the base type, for each row whose base was measured."""
    known = {(r.model, r.test, r.depth): r.tokens_per_second for r in rows if r.kind == base}
    keys = {row: known.get((row.model, row.test, row.depth)) for row in rows}
    return {row: row.tokens_per_second / value for row, value in keys.items() if value}


def verdicts(rows: list[Speed]) -> list[tuple[str, bool]]:
    """Each target that the rows can answer and whether it is met: decoding at least f16's speed from 16k on and 1.3 of
    it at 128k, at least q8_0's and q4_0's everywhere; prompts at least 0.95 of f16's."""
    found = []
    for base, test, lowest, wanted in (
        ("f16", "tg", DEEP, 1.0),
        ("f16", "tg", DEEPEST, 1.3),
        ("q8_0", "tg", 0, 1.0),
        ("q4_0", "tg", 0, 1.0),
        ("f16", "pp", 0, 0.95),
    ):
        at = {r: x for r, x in ratios(rows, base).items() if r.test.startswith(test) and r.depth >= lowest}
        for model, kind in dict.fromkeys((r.model, r.kind) for r in at if r.kind.startswith("kvtc")):
            least, row = min(((x, r) for r, x in at.items() if (r.model, r.kind) == (model, kind)), key=lambda y: y[0])
            text = f"{model} {kind} {row.test} from {lowest} on: {least:.2f} x {base} at {row.depth} (wanted {wanted})"
            found.append((text, least >= wanted))
    return found
