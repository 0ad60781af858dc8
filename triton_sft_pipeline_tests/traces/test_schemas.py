"""The shapes of records: which attempts they hold, what their labels say, and which field is refused by which name."""

from __future__ import annotations

from typing import Any

import pytest

from triton_sft_pipeline.traces.schemas import (
    LAUNCH_BOUND_MS,
    Labels,
    Wrong,
    attempts,
    is_code,
    is_conversation,
    labels_of,
    single_attempt,
)

CORRECT = {"correctness": True, "speedup": 1.5, "fast_0": True, "fast_1": True, "fast_2": False, "error": None}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"triton_code": "x"}, False),
        ({"triton_code": None, "turns": [{}]}, False),
        ({"turns": []}, True),
        ({"final_triton_code": None}, True),
        ({}, False),
    ],
)
def test_a_record_is_a_conversation_unless_it_has_a_kernel_field_of_its_own(
    record: dict[str, Any], expected: bool
) -> None:
    assert is_conversation(record) == expected


def test_turns_are_attempts_in_order_with_labels_of_their_own() -> None:
    turns = [{"triton_code": "a", "result": {"correctness": False, "error": "E"}}, {"triton_code": "b"}]
    first, second = attempts({"turns": turns, "final_triton_code": "b"})
    assert (first.code, first.code_field, first.turn) == ("a", "turn 1", 1)
    assert first.labels.given and first.labels.correctness is False and first.labels.error == "E"
    assert (second.code, second.turn, second.labels) == ("b", 2, Labels())


def test_a_final_code_that_no_turn_wrote_is_an_attempt_of_its_own() -> None:
    found = attempts({"turns": [{"triton_code": "a"}], "final_triton_code": "b", "final_result": CORRECT})
    assert [a.code for a in found] == ["a", "b"]
    assert found[1].code_field == "final_triton_code" and found[1].turn is None and found[1].labels.speedup == 1.5


@pytest.mark.parametrize("final", [None, "", "...", " a\n"])
def test_a_final_code_that_says_nothing_new_is_no_attempt(final: str | None) -> None:
    assert len(attempts({"turns": [{"triton_code": "a"}], "final_triton_code": final})) == 1


@pytest.mark.parametrize("turns", [None, []])
def test_a_conversation_without_turns_is_its_final_code(turns: Any) -> None:
    (found,) = attempts({"turns": turns, "final_triton_code": None, "final_result": {"correctness": False}})
    assert found.code is None and found.labels.correctness is False


def test_a_turn_whose_result_is_no_label_does_not_spoil_the_others() -> None:
    found = attempts({"turns": [{"triton_code": "a", "result": {}}, {"triton_code": "b", "result": CORRECT}]})
    assert not found[0].labels.given and found[1].labels.given


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"turns": {}}, "turns is an object, expected an array"),
        ({"turns": [3]}, "turns[0] is a number, expected an object"),
        ({"turns": [{}, {"triton_code": 5}]}, "turns[1].triton_code is a number, expected text"),
        ({"turns": [{"reasoning": []}]}, "turns[0].reasoning is an array, expected text"),
        ({"turns": [{"result": 1}]}, "turns[0].result is a number, expected an object or null"),
        (
            {"turns": [{"result": {"correctness": "no"}}]},
            "turns[0].result.correctness is text, expected true or false",
        ),
        (
            {"turns": [{"result": {**CORRECT, "speedup": "2x"}}]},
            "turns[0].result.speedup is text, expected a number",
        ),
        ({"final_triton_code": 5}, "final_triton_code is a number, expected text"),
        ({"final_result": True}, "final_result is a boolean, expected an object or null"),
        (
            {"final_result": {"correctness": True, "error": 1}},
            "final_result.error is a number, expected text",
        ),
    ],
)
def test_a_wrong_type_is_named_with_its_place_in_the_conversation(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Wrong) as caught:
        attempts({"turns": [], **changes})
    assert (caught.value.reason, str(caught.value)) == ("wrong_type", said)


def test_a_single_attempt_without_a_label_of_correctness_is_malformed() -> None:
    with pytest.raises(Wrong, match=r"^result\.correctness is missing$"):
        single_attempt({"triton_code": "x", "result": {"speedup": 1.0}})


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({}, None),
        ({"launch_bound": True}, True),
        ({"launch_bound": False, "reference_time_ms": 0.001}, False),
        ({"reference_time_ms": LAUNCH_BOUND_MS}, False),
        ({"reference_time_ms": 0.0499}, True),
        ({"reference_time_ms": None}, None),
        ({"reference_time_ms": "0.01 ms", "launch_bound": "yes"}, None),
        ({"reference_time_ms": float("nan")}, None),
    ],
)
def test_launch_bound_is_what_the_judge_said_or_follows_from_the_references_time(
    measured: dict[str, Any], expected: bool | None
) -> None:
    assert labels_of({**CORRECT, **measured}, "").launch_bound is expected


@pytest.mark.parametrize(("low", "expected"), [(1.25, 1.25), (2, 2.0), (None, None), ("?", None), (10**400, None)])
def test_what_stands_beside_the_labels_never_spoils_them(low: Any, expected: float | None) -> None:
    assert labels_of({**CORRECT, "speedup_low": low}, "").speedup_low == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [(None, False), ("", False), (" \n", False), ("...", False), (" ...\n", False), ("\u2026", False), ("x", True)],
)
def test_dots_and_nothing_are_no_code(code: str | None, expected: bool) -> None:
    assert is_code(code) == expected


def test_the_bar_for_launch_bound_is_the_judges_own() -> None:
    from triton_sft_pipeline.verification import measurement

    assert LAUNCH_BOUND_MS == measurement.LAUNCH_BOUND_MS
