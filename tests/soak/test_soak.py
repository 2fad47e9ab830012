"""A short soak of a tiny model. Failures caught: those of soak.py, and a soak that would not notice them."""

from __future__ import annotations

import pytest
import tools

from tests.soak import soak
from tests.soak.server import Answer, ServerError, serve
from tests.soak.workload import Request

SECONDS, N_CTX = 10, 256
TIE = 1e-3  # nats; weights are f32, so that only the order of sums differs


def test_server_serves_mixed_requests_without_crash_leak_or_changed_answer(tmp_path):
    model = tools.calibrated_model(tmp_path / "llama.gguf")
    text = tools.write_text(tmp_path / "text.txt")
    arguments = ("-ct", "kvtc-k2v4", "-t", 1, "--cache-ram", 1)
    report = soak.soak(tools.BIN / "llama-server", model, text, tmp_path, arguments, N_CTX, SECONDS, TIE)
    assert not report.failures(max_ties=0.02), report
    assert report.compared >= 3 * 10 and report.shifts >= 3 * 3


def test_answer_that_parts_at_no_tie_is_different():
    request, fresh = Request("r", {}), Answer(200, (1, 2, 3), ({1: -0.1}, {2: -0.5, 5: -0.6, 7: -3.0}, {3: -0.1}))
    report = soak.Report(memory=[100, 100], shifts=1)
    for tokens in ((1, 2, 3), (1, 5, 4), (1, 7, 3), (1, 9, 3), (1, 2)):
        soak.compare(request, Answer(200, tokens), fresh, 0.25, report)
    assert report.equal == 1 and [round(gap, 3) for _, gap in report.ties] == [0.1]
    assert report.failures(max_ties=0.2) == report.different and len(report.different) == 3
    assert len(report.failures(max_ties=0.1)) == 4


@pytest.mark.parametrize(("mebibytes", "shifts"), [((80, 90, 100, 105), 1), ((500, 500), 0)], ids=["leak", "no shift"])
def test_growth_and_a_soak_without_shifts_fail(mebibytes, shifts):
    memory = [value << 20 for value in mebibytes]
    assert len(soak.Report(memory=memory, shifts=shifts).failures(max_ties=0)) == 1


def test_server_that_is_killed_is_an_error(tmp_path):
    model = tools.calibrated_model(tmp_path / "llama.gguf")
    with pytest.raises(ServerError, match="ended with -9"):  # noqa: SIM117
        with serve(tools.BIN / "llama-server", model, tmp_path / "log", ("-t", 1)) as server:
            server.process.kill()
            server.process.wait()
            soak.one_pass(server, [Request("r", {"prompt": [5], "n_predict": 1})], 0, 1)
