"""llama-server with a kvtc cache, asked as clients ask it. Failures caught: an answer that is not that of f16 where all
is exact, slots that mix, a stream that is not the answer, a cancelled or impossible request that leaves traces, a
context shift or a speculation after which text goes on otherwise than from a fresh evaluation.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import synthetic
from http_server import CONTEXT, EXACT, PROMPTS, SMALL, N, Server, greedy, serve, tokens

MESSAGES = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": "Which animal jumps over the lazy dog, and which colour has it? " * 3},
]
UNIFIED = pytest.mark.parametrize("unified", ["-kvu", "-no-kvu"], ids=["unified", "streams"])


@pytest.fixture(scope="module")
def exact(folder, llama):
    with serve(folder / "exact", llama, *EXACT) as server:
        yield server


def chat(server: Server, n: int = N) -> str:
    answer = server.client.chat.completions.create(model="", messages=MESSAGES, max_tokens=n, **greedy())
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == n
    return answer.choices[0].message.content


def test_completion_of_an_exact_cache_is_that_of_f16(exact, f16, alone):
    texts = [exact.text(prompt) for prompt in PROMPTS]
    assert texts == [f16.fresh(prompt) for prompt in PROMPTS]
    assert texts != [alone.fresh(prompt) for prompt in PROMPTS]  # so codes would have changed them
    assert len(set(texts)) == len(texts) and {len(text) for text in texts} == {N}


def test_chat_of_an_exact_cache_is_that_of_f16(exact, f16):
    assert chat(exact) == chat(f16)


def test_chat_with_a_longer_history_reuses_the_cache_and_answers_as_fresh(folder, llama, alone):
    with serve(folder / "chat", llama, *SMALL, parallel=1) as server:
        messages = [*MESSAGES]
        for turn in range(3):
            arguments = {"model": "", "messages": messages, "max_tokens": N}
            answer = server.client.chat.completions.create(**arguments, **greedy())
            expected = alone.client.chat.completions.create(**arguments, **greedy(cache_prompt=False))
            text = answer.choices[0].message.content
            assert text == expected.choices[0].message.content
            assert turn == 0 or answer.model_dump()["timings"]["cache_n"] > 100
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"And then? ({turn})"}]


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_stream_is_the_answer(alone, prompt):
    stream = alone.client.completions.create(
        model="", prompt=prompt, max_tokens=N, stream=True, **greedy(cache_prompt=False)
    )
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len([piece for piece in pieces if piece]) >= N // 2
    assert "".join(pieces) == alone.fresh(prompt)


def test_stream_of_a_chat_is_the_answer(alone):
    stream = alone.client.chat.completions.create(
        model="", messages=MESSAGES, max_tokens=N, stream=True, **greedy(cache_prompt=False)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == chat(alone)


@UNIFIED
@pytest.mark.parametrize("window", ["exact", "small"])
def test_parallel_slots_answer_as_each_alone(folder, llama, alone, f16, window, unified):
    """New prompts, prompts still in their slots, and prompts that land in the slot of another one."""
    reference, arguments = (f16, EXACT) if window == "exact" else (alone, SMALL)
    expected = [reference.fresh(prompt) for prompt in PROMPTS]
    with serve(folder / "parallel", llama, *arguments, unified, parallel=4) as server:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                assert list(pool.map(server.text, PROMPTS)) == expected
            moved = [1, 2, 3, 0]
            assert list(pool.map(lambda n: server.text(PROMPTS[n], slot=moved[n]), range(4))) == expected
        assert [server.text(prompt) for prompt in PROMPTS] == expected


@UNIFIED
def test_cancelled_stream_frees_its_slot_and_changes_no_answer(folder, llama, alone, unified):
    """The client goes away in mid-stream, while another slot answers."""
    with serve(folder / "cancel", llama, *SMALL, unified) as server, ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            other = pool.submit(server.text, PROMPTS[1], 100, 1)
            stream = server.client.completions.create(
                model="", prompt=PROMPTS[0], max_tokens=300, stream=True, **greedy(0)
            )
            for _, _chunk in zip(range(5), stream, strict=False):
                pass
            stream.close()
            assert other.result() == alone.fresh(PROMPTS[1], 100)
            server.wait_until_idle()
            assert server.text(PROMPTS[0], slot=0) == alone.fresh(PROMPTS[0])
            assert server.text(PROMPTS[1], slot=0) == alone.fresh(PROMPTS[1])


@pytest.mark.parametrize("shift", [(), ("--context-shift",)], ids=["", "shift"])
def test_prompt_beyond_the_context_is_refused_and_changes_no_answer(folder, llama, alone, shift):
    with serve(folder / "long", llama, *SMALL, *shift) as server:
        assert server.text(PROMPTS[0], slot=0) == alone.fresh(PROMPTS[0])
        for _ in range(2):
            with pytest.raises(openai.BadRequestError, match="exceeds the available context size") as refused:
                server.text("x" * 5 * CONTEXT, slot=0)
            assert refused.value.status_code == 400
            assert server.text(PROMPTS[0], slot=0) == alone.fresh(PROMPTS[0])
            assert server.text(PROMPTS[1], slot=1) == alone.fresh(PROMPTS[1])


def shifted(prompt: str, answer: str, n_keep: int) -> list[tuple[list[int], int]]:
    """What is in the context after each shift, and how many tokens of the answer had been delivered before it."""
    context, moments = tokens(prompt, prompt=True), []
    for done, token in enumerate(tokens(answer), start=1):
        context.append(token)
        if len(context) > CONTEXT - 1:  # all but the newest are in the cache, which has room for one more
            n_discard = (len(context) - 1 - n_keep) // 2
            context = context[:n_keep] + context[n_keep + n_discard :]
            moments.append((context[:], done))
    return moments


@UNIFIED
def test_text_goes_on_after_many_context_shifts_as_from_a_fresh_evaluation(folder, one, alone_one, unified):
    """Keys move with their positions, as often as it takes. The tokens kept are the sinks, else a fresh evaluation
    would have others."""
    n, n_keep = 2600, 4
    with serve(folder / "shift", one, *SMALL, unified, "--context-shift") as server:
        answer = server.text(PROMPTS[0], n, 0, n_keep=n_keep - 1)  # the server adds one for BOS
        assert len(answer) == n
        assert server.log.read_text().count("slot context shift") == len(shifted(PROMPTS[0], answer, n_keep)) >= 9
        for context, done in shifted(PROMPTS[0], answer, n_keep):
            rest = answer[done : done + 2 * N]
            assert alone_one.fresh(context, len(rest)) == rest, done
        assert server.text(PROMPTS[1], slot=0) == alone_one.fresh(PROMPTS[1])


def test_context_without_shift_ends_the_answer(folder, llama):
    with serve(folder / "full", llama, *SMALL) as server:
        answer = server.ask(PROMPTS[0], 2 * CONTEXT)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] <= CONTEXT + 1


@pytest.mark.parametrize("cache", [EXACT, SMALL], ids=["exact", "small"])
@pytest.mark.parametrize("draft", ["same", "other"])
@UNIFIED
def test_speculation_does_not_change_the_text(folder, llama, alone, exact, cache, draft, unified):
    """Rejected drafts are rolled back. Another model as draft has most of its tokens rejected; the same has some, since
    the server alone keeps to letters."""
    path = llama
    if draft == "other":
        path = folder / "draft.gguf"
        synthetic.tiny_model(path, seed=5)
    more = ("--spec-type", "draft-simple", "-md", path, "--spec-draft-n-max", 8, "-td", 1, unified)
    with serve(folder / "draft", llama, *cache, *more) as server:
        drafted = accepted = 0
        for prompt in PROMPTS:
            answer = server.ask(prompt, 96)
            assert answer["choices"][0]["text"] == (exact if cache == EXACT else alone).fresh(prompt, 96)
            drafted += answer["timings"]["draft_n"]
            accepted += answer["timings"]["draft_n_accepted"]
        assert accepted < drafted
        assert draft == "other" or accepted > 0


def test_draft_with_a_kvtc_cache_is_a_draft(folder, llama, alone):
    more = ("--spec-type", "draft-simple", "-md", llama, "--spec-draft-n-max", 8, "-td", 1)
    types = ("-ctkd", "kvtc2", "-ctvd", "kvtc4")
    with serve(folder / "draft", llama, *SMALL, *more, *types) as server:
        for prompt in PROMPTS:
            answer = server.ask(prompt, 96)
            assert answer["choices"][0]["text"] == alone.fresh(prompt, 96)
            assert answer["timings"]["draft_n_accepted"] > 0
