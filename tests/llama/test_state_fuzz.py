"""A short run of what `tests/python/fuzz_state.py` does for ten minutes. Failures caught: a reader of saved states that
crashes on damage, allocates what a file only claims, or takes what the other reader refuses."""

from __future__ import annotations

import random

import fuzz_state
import states
from kvtc_gguf.state_file import container_bytes

N = 400


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, a piece cut out, or one put elsewhere."""
    out = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(out)), rng.randint(1, 40)
        piece = out[at : at + size]
        match rng.randrange(4):
            case 0:
                out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 1:
                del out[at : at + size]
            case 2:
                out[at:at] = piece
            case 3:
                out[at : at + len(piece)] = bytes(rng.randrange(256) for _ in piece)
        if not out:
            break
    return bytes(out)


def test_damaged_containers_are_judged_alike_and_cost_little():
    lib = fuzz_state.library()
    assert lib is not None
    rng = random.Random(0)
    for whole in (container_bytes([states.section(3, block=2), states.stored(2, 3)]), container_bytes(states.items())):
        assert fuzz_state.python_takes(whole) and fuzz_state.refit(whole) == whole
        fuzz_state.check(whole, lib)
        for _ in range(N // 2):
            fuzz_state.check(damaged(whole, rng), lib)
