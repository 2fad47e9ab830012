"""What is kept between requests. Failures caught: slots that mix, a slot that does not come back from a file as it was,
a prompt cache that costs quality, a damaged or foreign file that gets in or brings the server down."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import tools
from kvtc_gguf.format import write

from tests.serving.process import CODED, EXACT, KVTC, PROMPTS, serve


@pytest.mark.parametrize("unified", [(), ("-kvu",)], ids=["streams", "unified"])
def test_parallel_slots_answer_as_each_alone(llama, tmp_path, exact, unified):
    with serve(tmp_path, llama, *EXACT, "--cache-ram", 0, "-np", 4, "-c", 2048, *unified) as server:
        for _ in range(2):
            with ThreadPoolExecutor(4) as pool:
                assert list(pool.map(server.text, PROMPTS)) == exact
            assert list(map(server.text, PROMPTS)) == exact


def test_prompt_that_is_still_in_its_slot_stays_exact(llama, tmp_path, exact):
    """The answer is removed from the cache again, the prompt is not computed again."""
    with serve(tmp_path, llama, *EXACT, "--cache-ram", 0) as server:
        assert server.text(PROMPTS[0], 0) == exact[0]
        again = server.complete(PROMPTS[0], 0)
        assert again["timings"]["cache_n"] > 100 and again["content"] == exact[0]
        other = server.complete(PROMPTS[0][:90] + PROMPTS[1], 0)
        assert other["timings"]["cache_n"] >= 90
        assert other["content"] == server.text(PROMPTS[0][:90] + PROMPTS[1], 1)


@pytest.mark.parametrize("answer", [24, 150], ids=["within-rollback", "beyond-rollback"])
def test_prompt_asked_again_gets_its_window_back(llama, tmp_path, coded, answer):
    """Beyond the spare slots, its exact rows come from the context checkpoint before the end of the prompt."""
    with serve(tmp_path, llama, *CODED, "--cache-ram", 0) as server:
        server.text(PROMPTS[0], 0, answer)
        again = server.complete(PROMPTS[0], 0, 64)
        assert again["timings"]["cache_n"] > 100 and again["content"] == coded[0]


def test_cut_prompt_without_checkpoints_computes_its_window_again(llama, tmp_path):
    with serve(tmp_path, llama, *CODED, "--cache-ram", 0, "--ctx-checkpoints", 0) as server:
        server.text(PROMPTS[0], 0, 150)
        again = server.complete(PROMPTS[0], 0, 64)
        assert abs(again["timings"]["cache_n"] - (len(PROMPTS[0]) - 2 * 16)) <= 2


def test_prompts_come_back_from_host_memory_as_they_were(llama, tmp_path, coded):
    """One slot, four prompts in turn: each is pushed out to the prompt cache and taken back."""
    with serve(tmp_path, llama, *CODED, "--cache-ram", 64, "-np", 1) as server:
        for _ in range(2):
            for prompt, expected in zip(PROMPTS, coded, strict=True):
                answer = server.complete(prompt, n=64)
                assert answer["content"] == expected
        assert answer["timings"]["cache_n"] > 100


def test_saved_slot_goes_on_after_a_restart_in_any_slot(llama, tmp_path, coded):
    with serve(tmp_path, llama, *CODED, "--cache-ram", 0) as server:
        server.text(PROMPTS[0], 0, 1)
        saved = server.slot("save", 0)
        assert server.text(PROMPTS[0], 0, 64) == coded[0]
    with serve(tmp_path, llama, *CODED, "--cache-ram", 0) as server:
        server.text(PROMPTS[1], 1)
        for slot in (0, 1):
            assert server.slot("restore", slot)["n_restored"] == saved["n_saved"] > 100
            answer = server.complete(PROMPTS[0], slot, 64)
            assert answer["timings"]["cache_n"] > 100 and answer["content"] == coded[0]
        assert server.slot("erase", 0)["n_erased"] > 100
        answer = server.complete(PROMPTS[0], 0, 64)
        assert answer["timings"]["cache_n"] == 0 and answer["content"] == coded[0]


def test_moved_chunks_of_a_prompt_are_reused(llama, tmp_path):
    """--cache-reuse shifts cells: their keys must be where f16 has them."""
    prefix, gone, kept = (prompt[:120] for prompt in PROMPTS[:3])
    answers = {}
    for name, arguments in (("f16", ("-fa", "on")), ("kvtc", EXACT)):
        with serve(tmp_path, llama, *arguments, "--cache-ram", 0, "--cache-reuse", 16) as server:
            server.text(prefix + gone + kept, 0)
            answers[name] = server.complete(prefix + kept, 0, 64)
            assert answers[name]["timings"]["cache_n"] > len(prefix) + len(kept) // 2
    assert answers["kvtc"]["content"] == answers["f16"]["content"]


def test_damaged_files_are_refused_and_the_server_goes_on(llama, tmp_path, coded):
    with serve(tmp_path, llama, *CODED, "--cache-ram", 0) as server:
        server.text(PROMPTS[0], 0, 1)
        server.slot("save", 0)
        whole = (tmp_path / "slot.bin").read_bytes()
        start = whole.index(b"kvtc")
        head = range(start, start + 40)
        damages = {f"flip {at}": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (0, 4, *head)}
        lengths = (0, 3, 30, start, start + 5, start + 60, len(whole) // 2, len(whole) - 1)
        damages |= {f"cut to {n}": whole[:n] for n in lengths}
        for name, content in damages.items():
            (tmp_path / "damaged.bin").write_bytes(content)
            assert server.slot("restore", 0, "damaged.bin").get("status") == 400, name
        assert server.text(PROMPTS[0], 0, 64) == coded[0]
        assert server.slot("restore", 0)["n_restored"] > 100
        assert server.text(PROMPTS[0], 0, 64) == coded[0]


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ((*KVTC, "--kvtc-window", 17), "--kvtc-window 16, this context has 4 and 17"),
        (
            ("-ct", "kvtc-k3v4", "--kvtc-window", 16),
            "holds kvtc2/kvtc4 for layer 0, this context kvtc3/kvtc4",
        ),
        ((*CODED, "--kvtc-file", "FOREIGN"), "saved under another calibration"),
    ],
    ids=["window", "type", "calibration"],
)
def test_files_of_another_cache_are_refused_with_their_reason(llama, tmp_path, other, line):
    foreign = tmp_path / "foreign.kvtc.gguf"
    write(tools.calibration_of(llama, seed=7), foreign)
    with serve(tmp_path, llama, *CODED, "--cache-ram", 0) as server:
        server.text(PROMPTS[0], 0, 1)
        server.slot("save", 0)
    other = [foreign if part == "FOREIGN" else part for part in other]
    with serve(tmp_path, llama, *other, "--cache-ram", 0) as server:
        expected = server.text(PROMPTS[1], 1, 64)
        assert server.slot("restore", 0)["status"] == 400
        assert server.text(PROMPTS[1], 0, 64) == expected
    assert len(re.findall(rf"kvtc: .*{re.escape(line)}", server.log.read_text())) == 1


def test_state_of_f16_is_refused_and_the_reverse(llama, tmp_path, coded):
    with serve(tmp_path, llama, "-fa", "on", "--cache-ram", 0) as server:
        server.text(PROMPTS[0], 0, 1)
        server.slot("save", 0, "f16.bin")
    with serve(tmp_path, llama, *CODED, "--cache-ram", 0) as server:
        assert server.slot("restore", 0, "f16.bin")["status"] == 400
        assert "not saved from a kvtc cache" in server.log.read_text()
        assert server.text(PROMPTS[0], 0, 64) == coded[0]
        server.slot("save", 0, "kvtc.bin")
    with serve(tmp_path, llama, "-fa", "on", "--cache-ram", 0) as server:
        assert server.slot("restore", 0, "kvtc.bin")["status"] == 400
        assert server.text(PROMPTS[0], 0)
