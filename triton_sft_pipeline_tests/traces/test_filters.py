"""Each filter, its reason, and which reason comes first."""

from __future__ import annotations

import json
from typing import Any

import pytest

from triton_sft_pipeline.traces.filters import first_refusal, label_steps, quality_steps
from triton_sft_pipeline.traces.record import RawRecord, Trace, parse_record
from triton_sft_pipeline.traces.settings import FilterSettings
from triton_sft_pipeline_tests.traces.records import KERNEL, MODULE, labelled, record

STRICTEST = FilterSettings(require_fast_1=True, require_fast_2=True, min_speedup=3.0)


def trace(value: Any) -> Trace:
    parsed = parse_record(RawRecord("t.json", 0, 0, value, json.dumps(value)))
    assert isinstance(parsed, Trace), parsed
    return parsed


def refusal(value: Any, settings: FilterSettings, quality: bool = False) -> tuple[str, str] | None:
    steps = label_steps(settings) + (quality_steps(settings) if quality else [])
    return first_refusal(trace(value), steps)


def reason(value: Any, **settings: Any) -> str | None:
    found = refusal(value, FilterSettings(**settings))
    return found[0] if found else None


def test_a_good_trace_is_kept() -> None:
    assert refusal(record(), FilterSettings(), quality=True) is None


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


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"triton_code": None}, "there is no code"),
        ({"triton_code": "..."}, "the code is a literal '...'"),
        (
            {"triton_code": None, "result": {"correctness": False, "error": "Generation failed\nat once"}},
            "there is no code: Generation failed",
        ),
        ({"triton_code": None, "result": None}, "there is no code"),
    ],
)
def test_a_trace_without_a_kernel_is_dropped_before_its_labels_are_asked(changes: dict[str, Any], detail: str) -> None:
    assert refusal(record(**changes), FilterSettings()) == ("no_kernel", detail)
    assert reason(record(**changes), require_kernel=False) in (None, "no_result", "correctness")


@pytest.mark.parametrize(
    ("settings", "labels", "expected"),
    [
        ({"require_fast_1": True}, {"launch_bound": True}, "launch_bound_speed"),
        ({"require_fast_1": True}, {"launch_bound": False}, None),
        ({"require_fast_1": True}, {}, None),
        ({"require_fast_1": True}, {"launch_bound": True, "fast_1": False}, "fast_1"),
        ({"min_speedup": 1.2}, {"reference_time_ms": 0.01}, "launch_bound_speed"),
        ({"min_speedup": 1.2}, {"reference_time_ms": 0.2}, None),
        ({"require_fast_2": True}, {"launch_bound": True, "fast_2": True}, "launch_bound_speed"),
        ({}, {"launch_bound": True}, None),
    ],
)
def test_a_speedup_over_a_launch_counts_for_nothing_when_that_is_asked(
    settings: dict[str, Any], labels: dict[str, Any], expected: str | None
) -> None:
    assert reason(labelled(**labels), ignore_launch_bound=True, **settings) == expected
    assert reason(labelled(**labels), **settings) == (None if expected == "launch_bound_speed" else expected)


NO_LAUNCH = "def triton_kernel_wrapper(x):\n    return x"
FALLBACK = KERNEL.format(expression="x").replace("y = torch.empty_like(x)", "x = x @ x\n    y = torch.empty_like(x)")
LOOP = "The block size is 128 and the mask stops at the last element of the row. " * 40
MATMUL = MODULE.format(expression="x @ x")

BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "contradictory_label": ("check_labels", labelled(error="TypeError: x", speedup=0.0)),
    "syntax_error": ("check_syntax", record(triton_code="def triton_kernel_wrapper(x:\n")),
    "no_wrapper": ("require_wrapper", record(triton_code="import triton\n\n\ndef run(x):\n    return x")),
    "no_kernel_launch": ("require_launch", record(triton_code=NO_LAUNCH)),
    "torch_fallback": ("forbid_fallback", record(triton_code=FALLBACK, pytorch_code=MATMUL)),
    "no_reasoning": ("require_reasoning", record(model_reasoning=None, thinking=" ")),
    "refusal": ("drop_refusals", record(model_reasoning="I'm sorry, but I can't help with that.")),
    "reasoning_loop": ("drop_loops", record(model_reasoning=LOOP)),
    "unreadable_answer": (
        "require_readable",
        record(triton_code=KERNEL.format(expression="x") + "\nend = '</triton>'"),
    ),
}


@pytest.mark.parametrize("expected", BAD)
def test_each_step_of_quality_has_a_reason_a_sentence_and_a_switch(expected: str) -> None:
    switch, value = BAD[expected]
    found = refusal(value, FilterSettings(), quality=True)
    assert found is not None and found[0] == expected and len(found[1]) > 10
    assert refusal(value, FilterSettings()) is None
    off = refusal(value, FilterSettings(**{switch: False}), quality=True)
    assert off is None or off[0] != expected


def test_every_step_of_quality_is_tried() -> None:
    assert list(BAD) == [name for name, _ in quality_steps(FilterSettings())]


def test_everything_can_be_switched_off() -> None:
    settings = FilterSettings(**{switch: False for switch, _ in BAD.values()})
    assert quality_steps(settings) == []


def test_label_filters_come_before_those_of_quality() -> None:
    unjudged = record(result=None, model_reasoning=None, thinking=None)
    assert refusal(unjudged, FilterSettings(), quality=True) == (
        "no_result",
        "the kernel was never judged: result is missing or null",
    )


def test_prose_is_a_reasoning_unless_it_is_said_not_to_be() -> None:
    completion = f"{'The kernel adds one to each element of the input. ' * 4}\n<triton>\nx\n</triton>"
    value = record(model_reasoning=None, thinking=None, full_completion=completion)
    assert refusal(value, FilterSettings(), quality=True) is None
    found = refusal(value, FilterSettings(prose_is_reasoning=False), quality=True)
    assert found == ("no_reasoning", "nothing but the prose before the code")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"error": "TypeError: f() missing\nmore"}, "labelled correct, with an error: TypeError: f() missing"),
        ({"speedup": 0.0}, "labelled correct, with a speedup of 0"),
        ({"speedup": 0}, "labelled correct, with a speedup of 0"),
        ({"speedup": -1.5}, "labelled correct, with a speedup of -1.5"),
        ({"speedup": 0.9}, "fast_1 is set, but the speedup is 0.9"),
        ({"speedup": 1.0}, "fast_1 is set, but the speedup is 1"),
        ({"speedup": 0.99999}, "fast_1 is set, but the speedup is 0.99999"),
        ({"fast_1": False}, "fast_1 is not set, but the speedup is 1.5"),
        ({"fast_2": True}, "fast_2 is set, but the speedup is 1.5"),
        ({"speedup": 2.0}, "fast_2 is not set, but the speedup is 2"),
        ({"speedup": None, "fast_1": False, "fast_2": True}, "fast_2 is set, but fast_1 is not"),
        ({"fast_0": False}, "labelled correct, but fast_0 is not set"),
        ({"correctness": False}, "labelled incorrect, but fast_0 is set"),
        ({"correctness": False, "fast_0": False}, "labelled incorrect, but fast_1 is set"),
    ],
)
def test_labels_that_contradict_each_other_are_told_apart(labels: dict[str, Any], said: str) -> None:
    settings = FilterSettings(require_correctness=False, require_fast_0=False)
    assert refusal(labelled(**labels), settings, quality=True) == ("contradictory_label", said)


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {"speedup": None, "fast_1": None, "fast_2": None},
        {"speedup": None},
        {"speedup": 1.0, "fast_1": False},
        {"speedup": 2.0, "fast_2": True},
        {"error": ""},
        {"error": " \n"},
        {"fast_0": ..., "fast_1": ..., "fast_2": ...},
        {"correctness": False, "fast_0": False, "fast_1": False, "error": "wrong", "speedup": 0.0},
        {"correctness": False, "fast_0": False, "fast_1": False, "speedup": 3.0},
    ],
)
def test_labels_that_agree_or_say_nothing_are_no_contradiction(labels: dict[str, Any]) -> None:
    settings = FilterSettings(require_correctness=False, require_fast_0=False)
    assert refusal(labelled(**labels), settings, quality=True) is None
