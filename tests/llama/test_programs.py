"""Random programs of cache operations on a kvtc and an f16 cache side by side. Failures caught: a token at another
position, in another sequence, or gone, with any mix of operations; an exact row lost or taken for another token's.

With everything exact the two caches must agree. With a small window, a fresh kvtc cache of the same tokens at the same
positions says what is right: of a model of one layer, keys and values do not depend on what else was in the cache.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from driver import EXACT, HUGE, Context, Model, kld
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Oracle

N_SEQ, SIZE, SINK, WINDOW = 3, 256, 4, 16
LIMIT = 1e-4  # nats a token: rounding alone
# f16 rotates its keys anew with every shift and rounds them each time
LIMIT_F16 = 1e-3
PROBE = 7  # a token

SEQ = st.integers(0, N_SEQ - 1)
SMALL = st.integers(1, 12)
OPERATION = st.one_of(
    st.tuples(st.just("decode"), SEQ, st.sampled_from([20, 90])),
    st.tuples(st.just("decode"), SEQ, st.integers(1, 4)),
    st.tuples(st.just("decode_all"), SMALL),
    st.tuples(st.just("rollback"), SEQ, st.integers(1, 64)),
    st.tuples(st.just("cut"), SEQ, st.sampled_from([10, 40, 70, 100])),
    st.tuples(st.just("rm"), SEQ, st.integers(0, 100), st.integers(1, 40)),
    st.tuples(st.just("cp"), SEQ, SEQ),
    st.tuples(st.just("keep"), SEQ),
    st.tuples(st.just("shift"), SEQ, st.integers(0, 12), st.integers(1, 60)),
    st.tuples(st.just("add"), SEQ, st.integers(1, 9)),
    st.tuples(st.just("save"), SEQ),
    st.tuples(st.just("restore"), SEQ),
    st.tuples(st.just("save_all")),
    st.tuples(st.just("restore_all")),
)
# long enough that most tokens are beyond window and rollback; hypothesis alone draws short ones
FILL = st.sampled_from([150, 110, 30])


def begin(fill: tuple[int, ...], rest: list[tuple]) -> list[tuple]:
    return [("decode", seq, n) for seq, n in enumerate(fill)] + rest


PROGRAM = st.builds(begin, st.tuples(FILL, FILL, FILL), st.lists(OPERATION, min_size=3, max_size=12))


class Machine:
    """Contexts that run the same program, and the oracle that says what they hold."""

    def __init__(self, model: Model, unified: bool, window: int, sliding: bool = False) -> None:
        """sliding: upstream forgets tokens behind the sliding window when it likes; one layer is another's input."""
        self.sliding = sliding
        size = 2 * SIZE if unified else SIZE  # of a stream
        options = {
            "n_seq": N_SEQ,
            "unified": unified,
            "n_ctx": size * (1 if unified else N_SEQ),
            "sink": SINK,
            "n_ubatch": 32,
        }
        self.kvtc = Context(model, window=window, **options)
        self.f16 = Context(model, ("f16", "f16"), **options)
        self.fresh = Context(model, window=window, n_ctx=4 * SIZE, sink=SINK)
        self.codes = Context(model, window=0, n_ctx=4 * SIZE, sink=0)
        self.both = (self.kvtc, self.f16)
        self.unified, self.window, self.size = unified, window, size
        self.reset()

    def reset(self) -> None:
        for context in self.both:
            context.clear()
        self.oracle = Oracle(N_SEQ, self.unified, self.size, SINK, self.window)
        self.saved: tuple[list[bytes], list[Any]] | None = None
        self.saved_all: tuple[list[bytes], Oracle] | None = None
        self.pending = False
        self.token = 0

    def run(self, program: list[tuple]) -> None:
        self.reset()
        for name, *arguments in [*program, ("decode_all", 1)]:
            getattr(self, name)(*arguments)
            for seq in range(N_SEQ):
                expected, (kvtc, f16) = self.oracle.range(seq), (context.range(seq) for context in self.both)
                assert kvtc == f16 and kvtc[self.sliding :] == expected[self.sliding :], (name, seq)
        for seq in range(0 if self.sliding else N_SEQ):
            self.check(seq)

    def tokens(self, n: int) -> list[int]:
        self.token += n
        return [3 + (i * i * 31 + i * 7) % 256 for i in range(self.token - n, self.token)]

    def rows(self, seq: int, n: int) -> list[tuple[int, int, int]]:
        start = self.oracle.range(seq)[1] + 1
        return [(token, start + i, seq) for i, token in enumerate(self.tokens(n))]

    def decode(self, seq: int, n: int) -> None:
        self.compute(self.rows(seq, max(0, min(n, self.oracle.room(seq)))))

    def decode_all(self, n: int) -> None:
        n = min(n, *(self.oracle.room(seq) // (N_SEQ if self.unified else 1) for seq in range(N_SEQ)))
        self.compute([row for seq in range(N_SEQ) for row in self.rows(seq, max(0, n))])

    def compute(self, rows: list[tuple[int, int, int]]) -> None:
        if rows:
            self.pending = False
            logits = [context.decode_each(rows) for context in self.both]
            self.oracle.decode(rows)
            if self.window == EXACT:
                assert kld(logits[1], logits[0]) <= LIMIT_F16

    def flush(self) -> bool:
        """Makes f16 do what it put off: it shifts keys and copies streams at the next decode, but saves before."""
        free = [seq for seq in range(N_SEQ) if self.oracle.room(seq)]
        if self.pending and free:
            self.decode(free[0], 1)
        return not self.pending

    def rollback(self, seq: int, n: int) -> None:
        last = self.oracle.range(seq)[1]
        self.rm(seq, max(0, last + 1 - n), n)

    def cut(self, seq: int, p0: int) -> None:
        self.rm(seq, p0, EXACT)

    def rm(self, seq: int, p0: int, n: int) -> None:
        for context in self.both:
            assert context.rm(seq, p0, p0 + n)
        self.oracle.rm(seq, p0, p0 + n)

    def cp(self, src: int, dst: int) -> None:
        if self.unified and any(dst in cell.seqs for cell in self.oracle.of(src)):
            return  # an assertion of llama.cpp's debug builds: a cell joins a sequence once
        if src != dst and self.flush():
            for context in self.both:
                context.cp(src, dst)
            self.oracle.cp(src, dst)
            self.pending = not self.unified

    def keep(self, seq: int) -> None:
        for context in self.both:
            context.keep(seq)
        self.oracle.keep(seq)

    def shift(self, seq: int, keep: int, discard: int) -> None:
        """As llama-server does it."""
        self.rm(seq, keep, discard)
        self.move(seq, keep + discard, -discard)

    def add(self, seq: int, by: int) -> None:
        """The second half of a sequence moves away."""
        self.move(seq, sum(self.oracle.range(seq)) // 2, by)

    def move(self, seq: int, p0: int, by: int) -> None:
        if self.oracle.range(seq)[1] < 0:
            return
        for context in self.both:
            context.add(seq, p0, HUGE, by)
        self.oracle.add(seq, p0, by)
        self.pending = True

    def save(self, seq: int) -> None:
        if self.flush():
            self.saved = [context.save(seq) for context in self.both], self.oracle.save(seq)

    def restore(self, seq: int) -> None:
        if self.saved is None or not self.saved[1] or self.oracle.room(seq) < len(self.saved[1]) or not self.flush():
            return
        if self.oracle.room(seq) < len(self.saved[1]):
            return
        for context, state in zip(self.both, self.saved[0], strict=True):
            assert context.restore(state, seq)
        self.oracle.restore(self.saved[1], seq)

    def save_all(self) -> None:
        if self.flush():
            self.saved_all = [context.save() for context in self.both], copy.deepcopy(self.oracle)

    def restore_all(self) -> None:
        if self.saved_all is None or not self.flush():
            return
        for context, state in zip(self.both, self.saved_all[0], strict=True):
            assert context.restore(state)
        self.oracle = copy.deepcopy(self.saved_all[1])

    def check(self, seq: int) -> None:
        """The next token's logits are those of a fresh cache of the same tokens at the same positions."""
        cells, room = self.oracle.of(seq), self.oracle.room(seq)
        if not cells or not room or not self.oracle.unique(seq) or cells[-1].pos + 1 >= 4 * SIZE - 1:
            return
        at = {c.pos: c.token for c in cells}
        last = cells[-1].pos
        for context in (self.fresh, self.codes):
            context.clear(False)
            context.decode([at.get(pos, PROBE) for pos in range(last + 1)], 0)
            for pos in set(range(last + 1)) - set(at):
                context.rm(0, pos, pos + 1)
        runs = ((self.kvtc, seq), (self.f16, seq), (self.fresh, 0), (self.codes, 0))
        kvtc, f16, fresh, codes = (context.decode([PROBE], last + 1, s) for context, s in runs)
        self.oracle.decode([(PROBE, last + 1, seq)])
        if self.oracle.certain(seq):
            assert kld(fresh, kvtc) <= LIMIT, f"sequence {seq}"
        else:  # cut by more than a rollback: codes stand in for some exact rows, at worst for all
            assert kld(f16, kvtc) <= 2 * max(kld(f16, fresh), kld(f16, codes)) + LIMIT_F16, f"sequence {seq}"


@pytest.fixture(scope="module", params=["unified", "streams"])
def unified(request) -> bool:
    return request.param == "unified"


@pytest.fixture(scope="module")
def exact(one, unified) -> Machine:
    return Machine(one, unified, EXACT)


@pytest.fixture(scope="module")
def slides(sliding, unified) -> Machine:
    return Machine(sliding, unified, EXACT, sliding=True)


@pytest.fixture(scope="module")
def coded(one, unified) -> Machine:
    return Machine(one, unified, WINDOW)


OPTIONS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=120, **OPTIONS)
@given(program=PROGRAM)
def test_exact_cache_is_that_of_f16(exact, program):
    exact.run(program)


@settings(max_examples=20, **OPTIONS)
@given(program=PROGRAM)
def test_exact_cache_of_a_model_with_sliding_windows_is_that_of_f16(slides, program):
    slides.run(program)


@settings(max_examples=120, **OPTIONS)
@given(program=PROGRAM)
def test_coded_cache_is_that_of_a_fresh_evaluation(coded, program):
    coded.run(program)
