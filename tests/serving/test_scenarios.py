"""llama-server as the `openai` client sees it. Failures caught: an answer other than f16's, a stream that differs from
the whole, a context that does not shift, a cancelled or too long request that takes the server with it."""

from __future__ import annotations

import openai
import pytest
import tools

from tests.serving.process import CODED, EXACT, PROMPTS, serve

GREEDY = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
MESSAGES = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture(scope="module")
def server(llama, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("scenarios"), llama, *EXACT) as running:
        yield running


def test_completion_is_that_of_f16(server, exact):
    answer = server.client.completions.create(model="any", prompt=PROMPTS[0], **GREEDY)
    assert answer.choices[0].text == exact[0] and answer.usage.completion_tokens == 24


def test_chat_is_that_of_f16(server, llama, tmp_path):
    with serve(tmp_path, llama, "-fa", "on") as plain:
        expected = plain.client.chat.completions.create(model="any", messages=MESSAGES, **GREEDY)
    answer = server.client.chat.completions.create(model="any", messages=MESSAGES, **GREEDY)
    assert answer.choices[0].message.content == expected.choices[0].message.content


def test_stream_is_the_whole_answer_in_pieces(server):
    """Of letters: how other bytes reach a client depends on where the pieces were cut."""
    letters = GREEDY | {"extra_body": {"grammar": "root ::= [a-z ]+"}}
    completion = {"model": "any", "prompt": PROMPTS[0], **letters}
    whole = server.client.completions.create(**completion).choices[0].text
    stream = server.client.completions.create(stream=True, **completion)
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(pieces) > 10 and "".join(pieces) == whole
    chat = {"model": "any", "messages": MESSAGES, **letters}
    whole = server.client.chat.completions.create(**chat).choices[0].message.content
    stream = server.client.chat.completions.create(stream=True, **chat)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == whole


def test_cancelled_stream_frees_its_slot(server, exact):
    for _ in range(4):
        endless = GREEDY | {"max_tokens": 300}
        stream = server.client.completions.create(model="any", prompt=PROMPTS[1], stream=True, **endless)
        next(iter(stream))
        stream.close()
    for prompt, expected in zip(PROMPTS, exact, strict=True):
        assert server.client.completions.create(model="any", prompt=prompt, **GREEDY).choices[0].text == expected


def test_prompt_too_long_is_refused_and_the_server_goes_on(server, exact):
    with pytest.raises(openai.BadRequestError, match="exceeds the available context size"):
        server.client.completions.create(model="any", prompt=PROMPTS[0] * 10, **GREEDY)
    assert server.text(PROMPTS[0]) == exact[0]


def test_context_shifts_again_and_again(llama, tmp_path):
    """A slot of 256 tokens generates 1500: kvtc as f16, as long as rounding leaves the tokens alone, and to the end."""
    answers = {}
    for name, arguments in (("f16", ("-fa", "on")), ("exact", EXACT), ("coded", CODED)):
        with serve(tmp_path, llama, *arguments, "-c", 512, "--context-shift", "--cache-ram", 0) as server:
            answers[name] = server.complete(PROMPTS[0], 0, 1500, n_keep=8)
            shifts = server.log.read_text().count("slot context shift")
        assert answers[name]["tokens_predicted"] == 1500 and answers[name]["truncated"] and shifts > 8
    f16, exact = answers["f16"]["content"], answers["exact"]["content"]
    assert exact[:200] == f16[:200]


def test_draft_model_does_not_change_the_answer(llama, tmp_path, coded):
    """The draft is another random model: most of what it proposes is rolled back."""
    draft = tools.calibrated_model(tmp_path / "draft.gguf", seed=5)
    for model in (llama, draft):
        arguments = ("-md", model, "--spec-type", "draft-simple", "--spec-draft-n-max", 8, "--cache-ram", 0)
        with serve(tmp_path, llama, *CODED, *arguments) as server:
            answer = server.complete(PROMPTS[0], 0, 64)
        assert answer["content"] == coded[0]
        assert answer["timings"]["draft_n"] > 0
