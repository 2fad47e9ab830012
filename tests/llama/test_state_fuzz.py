"""A short run of what `tests/python/fuzz_state.py` does for ten minutes. Failures caught: a reader of saved states that
crashes on damage, allocates what a file only claims, or takes what the other reader refuses. `tests/fuzz` has the C++
reader alone."""

from __future__ import annotations

import random

import fuzz_state
import states
from kvtc_gguf.state_file import container_bytes

N = 400


def test_damaged_containers_are_judged_alike_and_cost_little():
    lib = fuzz_state.library()
    assert lib is not None
    rng = random.Random(0)
    for whole in (container_bytes([states.section(3, block=2), states.stored(2, 3)]), container_bytes(states.items())):
        assert fuzz_state.python_takes(whole) and fuzz_state.refit(whole) == whole
        fuzz_state.check(whole, lib)
        for _ in range(N // 2):
            fuzz_state.check(states.damaged(whole, rng), lib)
