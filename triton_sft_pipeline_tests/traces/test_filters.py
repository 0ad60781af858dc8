"""Each filter, its reason, and which reason comes first."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from triton_sft_pipeline.traces.filters import filter_traces, label_steps, training_steps
from triton_sft_pipeline.traces.record import RawRecord, Trace, parse_record
from triton_sft_pipeline.traces.settings import FilterSettings
from triton_sft_pipeline_tests.traces.records import MODULE, labelled, record

STRICTEST = FilterSettings(require_fast_1=True, require_fast_2=True, min_speedup=3.0)


def trace(value: Any) -> Trace:
    parsed = parse_record(RawRecord("t.json", 0, 0, value, json.dumps(value)))
    assert isinstance(parsed, Trace), parsed
    return parsed


def refusal(value: Any, settings: FilterSettings, held_out: dict[str, str] | None = None) -> tuple[str, str] | None:
    steps = label_steps(settings) + ([] if held_out is None else training_steps(held_out))
    kept, dropped = filter_traces([trace(value)], steps)
    assert len(kept) + len(dropped) == 1
    return None if kept else (dropped[0].reason, dropped[0].detail)


def reason(value: Any, **settings: Any) -> str | None:
    found = refusal(value, FilterSettings(**settings))
    return found[0] if found else None


def test_a_good_trace_is_kept() -> None:
    assert refusal(record(), FilterSettings(), {}) is None


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"correctness": False, "fast_0": False}, "correctness"),
        ({"correctness": True, "fast_0": False}, "fast_0"),
        ({"fast_1": False, "speedup": 0.9}, "fast_1"),
        ({"fast_2": False, "speedup": 1.9}, "fast_2"),
        ({"fast_2": True, "speedup": 2.9}, "min_speedup"),
        ({"fast_2": True, "speedup": None}, "min_speedup"),
        ({"fast_2": True, "speedup": 3.0}, None),
    ],
)
def test_the_first_filter_that_refuses_gives_the_reason(labels: dict[str, Any], expected: str | None) -> None:
    found = refusal(labelled(**labels), STRICTEST)
    assert (found[0] if found else None) == expected


@pytest.mark.parametrize(
    ("labels", "flag", "expected"),
    [
        ({"correctness": False}, "require_correctness", "correctness"),
        ({"fast_0": False}, "require_fast_0", "fast_0"),
        ({"fast_1": False}, "require_fast_1", "fast_1"),
        ({"fast_2": False}, "require_fast_2", "fast_2"),
    ],
)
def test_each_flag_asks_for_its_own_label_and_for_nothing_when_it_is_off(
    labels: dict[str, Any], flag: str, expected: str
) -> None:
    off = dict.fromkeys(("require_correctness", "require_fast_0", "require_fast_1", "require_fast_2"), False)
    assert reason(labelled(**labels), **off) is None
    assert reason(labelled(**labels), **{**off, flag: True}) == expected


def test_a_trace_that_was_never_judged_is_dropped_whatever_is_asked() -> None:
    assert reason(record(result=None), require_correctness=False, require_fast_0=False) == "no_result"


@pytest.mark.parametrize(("speedup", "kept"), [(1.19, False), (1.2, True), (1.21, True), (None, False)])
def test_min_speedup_is_met_by_equality(speedup: float | None, kept: bool) -> None:
    assert (reason(labelled(speedup=speedup), min_speedup=1.2) is None) == kept


def test_the_flag_in_the_file_decides_and_the_sentence_does_not_contradict_the_number() -> None:
    found = refusal(labelled(fast_1=False, speedup=1.5), FilterSettings(require_fast_1=True))
    assert found == ("fast_1", "fast_1 is not set: speedup 1.5, wanted above 1.0")
    found = refusal(labelled(correctness=False, fast_0=False), FilterSettings(require_correctness=False))
    assert found == ("fast_0", "fast_0 is not set (labelled incorrect)")


def test_the_first_line_of_the_traces_own_error_is_told() -> None:
    found = refusal(labelled(correctness=False, error="CompilationError: at 3:1\nlong\nstory"), FilterSettings())
    assert found == ("correctness", "labelled incorrect: CompilationError: at 3:1")
    assert refusal(labelled(correctness=False, error=""), FilterSettings()) == ("correctness", "labelled incorrect")


def test_a_trace_labelled_correct_with_an_error_and_no_speedup_is_kept_as_labelled() -> None:
    assert reason(labelled(correctness=True, error="timing failed", speedup=0.0)) is None


def test_a_trace_without_a_reasoning_is_dropped_for_training_alone() -> None:
    silent = record(model_reasoning=None, thinking=" ")
    assert refusal(silent, FilterSettings()) is None
    found = refusal(silent, FilterSettings(), {})
    assert found and found[0] == "no_reasoning"


def test_a_trace_about_a_held_out_problem_is_dropped_by_what_it_computes() -> None:
    respelled = MODULE.format(expression="(x   +  1)").replace("class Model(", "class Add(").replace("4, 4", "8, 8")
    held_out = {trace(record(1)).problem: "01_add"}
    found = refusal(record(0, pytorch_code=respelled), FilterSettings(), held_out)
    assert found == ("held_out_problem", "the same module as the held-out problem 01_add")
    assert refusal(record(2), FilterSettings(), held_out) is None


def test_label_filters_come_before_those_of_training() -> None:
    held_out = {trace(record(1)).problem: "01_add"}
    unjudged = record(1, result=None, model_reasoning=None, thinking=None)
    assert refusal(unjudged, FilterSettings(), held_out)[0] == "no_result"  # type: ignore[index]
    silent = record(1, model_reasoning=None, thinking=None)
    assert refusal(silent, FilterSettings(), held_out)[0] == "no_reasoning"  # type: ignore[index]


@pytest.mark.parametrize(
    "wrong",
    [{"min_speedup": -0.1}, {"min_speedup": float("nan")}, {"min_traces": 0}, {"min_share_kept": 1.5}, {"typo": 1}],
)
def test_settings_out_of_range_or_unknown_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FilterSettings(**wrong)
