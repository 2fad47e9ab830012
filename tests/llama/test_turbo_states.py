"""libllama with the turbo types. Failures caught: a saved state whose rows lack their norms, one taken by another type,
sequences whose rows do not follow, keys that are shifted though they carry their rotation.
"""

from __future__ import annotations

import driver
import pytest
from driver import Context, api, kld, text
from kvtc_gguf.state_file import parse

LIMIT = 1e-4  # nats a token: the order of sums
PROMPT, MORE = text(150), text(24, seed=1)
CACHES = [("turbo3", "turbo3"), ("turbo4", "turbo2"), ("kvtc2", "turbo3"), ("turbo3", "q8_0")]


@pytest.fixture
def make(request):
    """Contexts of a model of conftest.py, with PROMPT in sequence 0; freed after the test."""
    made: list[Context] = []

    def context(cache: tuple[str, str], name: str = "two", filled: bool = True, **options) -> Context:
        options = {"n_seq": 2, "n_ctx": 1024, "sink": 0, "window": 0, **options}
        made.append(Context(request.getfixturevalue(name), cache, **options))
        if filled:
            made[-1].decode(PROMPT, 0)
        return made[-1]

    yield context
    for each in made:
        each.close()


@pytest.mark.parametrize("exact", [(0, 0), (4, 16)], ids=["none", "exact"])
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("cache", CACHES, ids="-".join)
def test_restored_and_copied_sequences_go_on_as_before(make, cache, unified, exact):
    options = {"unified": unified, "sink": exact[0], "window": exact[1]}
    saved, restored = make(cache, **options), make(cache, filled=False, **options)
    state = saved.save(0)
    assert restored.restore(state, 0) and restored.save(0) == state
    assert restored.restore(state, 1)
    saved.cp(0, 1)
    expected = saved.decode(MORE, 150)
    assert kld(expected, restored.decode(MORE, 150, seq=1)) <= LIMIT
    assert kld(expected, saved.decode(MORE, 150, seq=1)) <= LIMIT


def test_state_holds_whole_rows(make):
    """Two heads of 32 in two layers: what norms take is there, too."""
    sizes = {}
    for cache in (("turbo4", "turbo4"), ("kvtc4", "kvtc4")):
        context = make(cache, filled=False)
        context.decode(PROMPT[:10], 0)
        sections = parse(context.save(0)).sections
        assert [(s.n_rows, s.model.what) for s in sections] == [(10, 0), (10, 0), (10, 1), (10, 1)]
        sizes[cache[0]] = {s.row_bytes() for s in sections}
    assert sizes == {"turbo4": {2 * (16 + 2)}, "kvtc4": {2 * 16}}


def test_state_of_another_type_is_refused(make):
    state = make(("turbo3", "turbo3")).save(0)
    for cache in (("turbo3", "turbo4"), ("turbo2", "turbo3"), ("kvtc3", "kvtc3")):
        driver.log.clear()
        assert not make(cache, filled=False).restore(state, 0)
        assert "kvtc: the state" in "".join(driver.log)


def test_only_keys_that_carry_no_rotation_can_shift(make):
    for cache, expected in (
        (("turbo3", "f16"), False),
        (("turbo3", "kvtc2"), False),
        (("kvtc2", "turbo3"), True),
        (("f16", "turbo3"), True),
    ):
        assert api.llama_memory_can_shift(make(cache, filled=False).memory) == expected, cache


def test_turbo_values_shift(make):
    """The keys are f16: as with f16 values, but for what codes cost anyway."""
    context = make(("kvtc6", "turbo4"), "one", window=driver.EXACT)
    context.shift(4, 61)
    fresh = make(("kvtc6", "turbo4"), "one", filled=False, window=driver.EXACT)
    fresh.decode(PROMPT[:4] + PROMPT[65:], 0)
    assert kld(fresh.decode(MORE, 89), context.decode(MORE, 89)) <= LIMIT
