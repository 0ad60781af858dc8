"""Conversations: the best turn, and the messages up to its answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.traces.record import Malformed, RawRecord, Trace, parse_record
from triton_sft_pipeline_tests.traces.records import record

FEEDBACK = "Correct but slow."


def turn(
    number: int, correct: bool | None = True, speedup: float | None = 1.0, code: str | None = "", **changes: Any
) -> dict[str, Any]:
    code = f"code_{number} = 1" if code == "" else code
    result = None if correct is None else {"correctness": correct, "speedup": speedup, "error": None}
    made = {
        "turn": number,
        "reasoning": None,
        "triton_code": code,
        "full_completion": f"<think>\nThought {number}.\n</think>\n\n<triton>\n{code}\n</triton>",
        "result": result,
        "feedback_given": FEEDBACK,
    }
    return {**made, **changes}


def conversation(*turns: dict[str, Any], **changes: Any) -> dict[str, Any]:
    opening = [{"role": "system", "content": "You convert."}, {"role": "user", "content": "Convert this."}]
    made = record(triton_code=..., result=..., thinking=..., model_reasoning=...)
    made |= {"num_turns": len(turns), "stop_reason": "max_turns_reached", "turns": list(turns)}
    made |= {"final_triton_code": turns[-1]["triton_code"] if turns else None, "final_result": None}
    return {**made, "full_messages": opening, **changes}


def parse(value: Any) -> Trace:
    parsed = parse_record(RawRecord("t.json", 0, 0, value, ""))
    assert isinstance(parsed, Trace), parsed
    return parsed


def refusal(value: Any) -> tuple[str, str]:
    parsed = parse_record(RawRecord("t.json", 0, 0, value, ""))
    assert isinstance(parsed, Malformed), parsed
    return parsed.reason, parsed.detail


@pytest.mark.parametrize(
    ("turns", "best"),
    [
        ([turn(1), turn(2, speedup=2.0), turn(3, speedup=1.5)], 2),
        ([turn(1, speedup=1.5), turn(2, speedup=1.5)], 1),
        ([turn(1, correct=False, speedup=9.0), turn(2, speedup=0.1)], 2),
        ([turn(1, correct=False), turn(2, correct=False)], 1),
        ([turn(1, speedup=None), turn(2, speedup=0.0)], 2),
        ([turn(1, correct=None), turn(2)], 2),
        ([turn(1, code=None, full_completion=None), turn(2, correct=False)], 2),
        ([turn(1, code="..."), turn(2, correct=False)], 2),
        (
            [turn(1, result={"correctness": True, "speedup": 3.0, "error": "TypeError"}), turn(2, speedup=0.5)],
            2,
        ),
    ],
)
def test_the_best_turn_is_correct_then_fastest_then_earliest(turns: list[dict[str, Any]], best: int) -> None:
    found = parse(conversation(*turns))
    assert (found.turn, found.num_turns) == (best, len(turns))
    assert found.kernel_field == f"turn {best}" and found.triton_code == f"code_{best} = 1"
    assert found.reasoning == f"Thought {best}." and found.reasoning_field == "full_completion <think>"


def test_the_labels_are_those_of_the_best_turn_and_not_the_final_ones() -> None:
    found = parse(
        conversation(
            turn(1, speedup=2.5), turn(2, correct=False, speedup=0.0), final_result={"correctness": False, "error": "E"}
        )
    )
    assert found.has_result and found.correctness and found.speedup == 2.5 and found.fast_2 and found.error is None


def test_code_that_a_turn_left_in_its_completion_is_found() -> None:
    found = parse(conversation(turn(1, triton_code=None)))
    assert (found.triton_code, found.kernel_field, found.turn) == ("code_1 = 1", "completion <triton>", 1)


def test_the_messages_end_with_the_answer_of_the_best_turn() -> None:
    found = parse(conversation(turn(1, correct=False), turn(2, feedback_given=None)))
    said = found.conversation
    assert said is not None and [m["role"] for m in said] == ["system", "user", "assistant", "user", "assistant"]
    assert said[2]["content"].startswith("<think>\nThought 1.") and said[3]["content"] == FEEDBACK
    assert said[4]["content"].endswith("code_2 = 1\n</triton>")


def test_turns_after_the_best_one_are_not_among_the_messages() -> None:
    found = parse(conversation(turn(1, speedup=3.0), turn(2), turn(3)))
    assert found.conversation is not None and len(found.conversation) == 3


def test_a_turn_whose_generation_failed_is_left_out_with_its_feedback() -> None:
    failed = turn(1, correct=False, code=None, full_completion=None)
    found = parse(conversation(failed, turn(2)))
    assert [m["role"] for m in found.conversation or []] == ["system", "user", "assistant"]
    assert found.turn == 2


def test_an_answer_without_feedback_before_the_next_one_is_left_out() -> None:
    found = parse(conversation(turn(1, correct=False, feedback_given=None), turn(2)))
    assert [m["content"][:7] for m in found.conversation or []] == ["You con", "Convert", "<think>"]
    assert (found.conversation or [])[-1]["content"].startswith("<think>\nThought 2.")


def test_an_answer_whose_completion_is_lost_is_put_together_again() -> None:
    found = parse(conversation(turn(1, full_completion=None, reasoning="Why.")))
    assert (found.conversation or [])[-1]["content"] == "<think>\nWhy.\n</think>\n\n<triton>\ncode_1 = 1\n</triton>"
    assert found.reasoning_field == "reasoning"


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        [{"role": "system", "content": "s"}],
        [{"role": "user", "content": None}],
        [{"role": "assistant", "content": "a"}],
        [{"role": "tool", "content": "a"}],
    ],
)
def test_a_conversation_without_a_question_still_gives_its_kernel(messages: Any) -> None:
    found = parse(conversation(turn(1), full_messages=messages))
    assert found.messages is None and found.conversation is None and found.triton_code == "code_1 = 1"


def test_a_conversation_in_which_everything_failed_is_a_trace_without_code() -> None:
    failed = {"code": None, "full_completion": None, "result": {"correctness": False, "error": "Generation failed"}}
    found = parse(conversation(turn(1, **failed), turn(2, **failed)))
    assert (found.triton_code, found.kernel_field, found.reasoning, found.messages) == ("", None, None, None)
    assert found.correctness is False and found.error == "Generation failed" and found.num_turns == 2


def test_a_final_code_of_its_own_has_no_turn_and_no_messages() -> None:
    value = conversation(
        turn(1, correct=False), final_triton_code="final = 1", final_result={"correctness": True, "speedup": 1.1}
    )
    found = parse(value)
    assert (found.kernel_field, found.turn, found.num_turns, found.messages) == ("final_triton_code", None, 1, None)


def test_the_declared_number_of_turns_counts_where_the_turns_are_gone() -> None:
    assert parse(conversation(final_triton_code="final = 1", num_turns=4)).num_turns == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"full_messages": "x"}, "full_messages is text, expected an array"),
        ({"full_messages": [1]}, "full_messages[0] is a number, expected an object"),
        ({"full_messages": [{"role": "user", "content": 5}]}, "full_messages[0].content is a number, expected text"),
        ({"num_turns": "2"}, "num_turns is text, expected a 64-bit integer"),
    ],
)
def test_a_wrong_type_in_the_conversation_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    assert refusal(conversation(turn(1), **changes)) == ("wrong_type", said)


def test_feedback_of_a_wrong_type_is_refused_by_name() -> None:
    value = conversation(turn(1, correct=False, feedback_given=5), turn(2))
    assert refusal(value) == ("wrong_type", "turns[0].feedback_given is a number, expected text")


@pytest.mark.parametrize(
    ("first", "place"),
    [
        ({"feedback_given": "\ud800"}, "turns[0].feedback_given"),
        ({"full_completion": "\ud800 <triton>a = 1</triton>"}, "turns[0].full_completion"),
    ],
)
def test_messages_that_no_file_can_store_are_refused(first: dict[str, Any], place: str) -> None:
    reason, detail = refusal(conversation(turn(1, correct=False, **first), turn(2)))
    assert reason == "bad_text" and detail.startswith(place)


def test_the_messages_are_part_of_the_version() -> None:
    first, second = (parse(conversation(turn(1, correct=False, feedback_given=f), turn(2))) for f in ("a", "b"))
    assert first.version != second.version
    assert json.loads(first.messages or "")[3]["content"] == "a"


@pytest.mark.skipif("TRITON_SFT_REAL_TRACES" not in os.environ, reason="TRITON_SFT_REAL_TRACES names no folder")
def test_real_conversations_are_remembered_for_their_best_turns() -> None:
    path = Path(os.environ["TRITON_SFT_REAL_TRACES"]) / "qwen3_multi_turn.json"
    values = json.loads(path.read_text("utf-8"))
    found = [parse(value) for value in values]
    assert [t.turn for t in found] == [3, 1, 4, 2, 3, 2, 2, 2, 1]
    # Written without a marker, and the first answer of each conversation without a word before its code.
    assert [t.reasoning_field for t in found] == [None if t.turn == 1 else "full_completion prose" for t in found]
    for value, trace in zip(values, found, strict=True):
        answers = [m["content"] for m in trace.conversation or [] if m["role"] == "assistant"]
        assert answers == [t["full_completion"] for t in value["turns"][: trace.turn]]
