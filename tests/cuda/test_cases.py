"""The choice of cases for a quick run. Failure caught: a kind of case that no quick run, so no sanitizer, ever sees."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.cuda.cases import ALWAYS, cases, quick_cases

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native"))  # attention_case


def test_a_quick_run_has_a_case_of_each_kind_and_few_in_all() -> None:
    names = [name for name, _ in cases()]
    taken = quick_cases(names)
    assert {re.sub(r"\d+", "", name) for name in names} == {re.sub(r"\d+", "", names[i]) for i in taken}
    assert taken == sorted(set(taken)) and len(taken) < len(names) / 4
    assert set(ALWAYS) <= {names[i] for i in taken}
