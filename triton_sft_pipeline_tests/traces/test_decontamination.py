"""The step that keeps traces about held-out problems out: what it says, and how often it asks."""

from __future__ import annotations

import json

import pytest

from triton_sft_pipeline.problems.likeness import Contact
from triton_sft_pipeline.traces import decontamination
from triton_sft_pipeline.traces.decontamination import decontamination_step
from triton_sft_pipeline.traces.record import RawRecord, Trace, parse_record
from triton_sft_pipeline_tests.problems.test_likeness import NORMS, SOFTSIGN, SOFTSIGN_IN_DISGUISE, held_out
from triton_sft_pipeline_tests.traces.records import record


def test_the_step_names_the_problem_and_asks_about_each_problem_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(number: int, code: str) -> Trace:
        value = record(number, pytorch_code=code)
        parsed = parse_record(RawRecord("t.json", number, 0, value, json.dumps(value)))
        assert isinstance(parsed, Trace)
        return parsed

    index = held_out(SOFTSIGN)
    asked: list[str] = []
    touched_by = index.touched_by

    def counted(code: str, problem: str | None = None) -> Contact | None:
        asked.append(code)
        return touched_by(code, problem)

    monkeypatch.setattr(index, "touched_by", counted)
    reason, ask = decontamination_step(index)
    assert reason == decontamination.HELD_OUT == "held_out_problem"
    same = "the same module as the held-out problem problem_0"
    assert [ask(trace(n, SOFTSIGN)) for n in range(3)] == [same] * 3
    assert ask(trace(4, SOFTSIGN_IN_DISGUISE)) == f"{same}, but for names and layout"
    assert ask(trace(5, NORMS)) is None
    assert len(asked) == 3
