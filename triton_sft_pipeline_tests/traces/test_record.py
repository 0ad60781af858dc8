"""What is a trace, and what is refused with which reason."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_sft_pipeline.problems import fingerprint
from triton_sft_pipeline.traces.record import Malformed, RawRecord, Trace, parse_record
from triton_sft_pipeline.traces.schemas import LONGEST_CODE
from triton_sft_pipeline_tests.traces.records import labelled, record


def parse(value: Any, position: int = 0) -> Trace | Malformed:
    return parse_record(RawRecord("t.json", position, 0, value, json.dumps(value)))


def trace(value: Any, position: int = 0) -> Trace:
    parsed = parse(value, position)
    assert isinstance(parsed, Trace), parsed
    return parsed


def refusal(value: Any) -> tuple[str, str]:
    parsed = parse(value)
    assert isinstance(parsed, Malformed), parsed
    return parsed.reason, parsed.detail


def test_a_good_record_becomes_a_trace() -> None:
    raw = record(3)
    found = trace(raw, position=7)
    assert found.sample_key == "sample_3" and found.file == "t.json" and found.position == 7
    assert found.pytorch_code == raw["pytorch_code"] and found.triton_code == raw["triton_code"]
    assert found.problem == fingerprint(raw["pytorch_code"])
    assert found.has_result and found.correctness and found.fast_0 and found.fast_1
    assert found.fast_2 is False and found.speedup == 1.5 and found.error is None


@pytest.mark.parametrize(
    ("changes", "text", "field"),
    [
        ({}, "Each program adds 0 to a block.", "model_reasoning"),
        ({"reasoning": "r"}, "Each program adds 0 to a block.", "model_reasoning"),
        ({"model_reasoning": None, "reasoning": "r"}, "r", "reasoning"),
        ({"model_reasoning": "  \n", "reasoning": "r"}, "r", "reasoning"),
        ({"model_reasoning": ...}, "Add.", "thinking"),
        ({"model_reasoning": ..., "thinking": None}, None, None),
        ({"model_reasoning": "", "thinking": ""}, None, None),
        ({"model_reasoning": None, "thinking": None, "full_completion": "c</think>"}, "c", "full_completion </think>"),
    ],
)
def test_the_models_own_reasoning_comes_before_the_explanation(
    changes: dict[str, Any], text: str | None, field: str | None
) -> None:
    found = trace(record(**changes))
    assert (found.reasoning, found.reasoning_field) == (text, field)


@pytest.mark.parametrize("value", [None, True, 5, 1.5, "text", [], [record()]])
def test_a_record_that_is_no_object_is_refused(value: Any) -> None:
    reason, detail = refusal(value)
    assert reason == "not_an_object" and detail.endswith("expected an object")


@pytest.mark.parametrize(
    ("value", "said"), [(..., "is missing"), (None, "is missing"), ("", "is empty"), (" \n", "is empty")]
)
def test_a_record_without_a_module_is_refused(value: Any, said: str) -> None:
    assert refusal(record(pytorch_code=value)) == ("missing_field", f"pytorch_code {said}")


@pytest.mark.parametrize("value", [..., None, "", " \n"])
def test_a_missing_kernel_is_no_malformation(value: Any) -> None:
    found = trace(record(triton_code=value))
    assert (found.triton_code, found.kernel_field) == ("", None)


def test_dots_in_place_of_a_kernel_are_told_as_they_stand() -> None:
    found = trace(record(triton_code="...", full_completion="<triton>x = 1</triton>"))
    assert (found.triton_code, found.kernel_field) == ("...", "triton_code")


def test_a_kernel_that_only_the_completion_holds_is_found() -> None:
    found = trace(record(triton_code=None, full_completion="<triton>\nx = 1\n</triton>"))
    assert (found.triton_code, found.kernel_field) == ("x = 1", "completion <triton>")


@pytest.mark.parametrize("field", ["reasoning", "kernel"])
def test_half_of_a_surrogate_pair_in_what_the_completion_gave_is_refused(field: str) -> None:
    text = "<think>\ud800</think><triton>x = 1</triton>" if field == "reasoning" else "<triton>x = '\ud800'</triton>"
    changes: dict[str, Any] = {"model_reasoning": None, "thinking": None, "triton_code": None}
    reason, detail = refusal(record(full_completion=text, **changes))
    assert reason == "bad_text" and detail.startswith("full_completion" if field == "reasoning" else "completion")


@pytest.mark.parametrize("result", [..., None])
def test_a_missing_result_is_no_malformation(result: Any) -> None:
    found = trace(record(result=result))
    assert not found.has_result
    assert [found.correctness, found.fast_0, found.fast_1, found.fast_2, found.speedup, found.error] == [None] * 6


def test_a_result_without_a_label_of_correctness_is_refused() -> None:
    assert refusal(record(result={})) == ("missing_field", "result.correctness is missing")
    assert refusal(labelled(correctness=None)) == ("missing_field", "result.correctness is missing")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pytorch_code": 5}, "pytorch_code is a number, expected text"),
        ({"pytorch_code": ["x"]}, "pytorch_code is an array, expected text"),
        ({"triton_code": {"a": 1}}, "triton_code is an object, expected text"),
        ({"model_reasoning": True}, "model_reasoning is a boolean, expected text"),
        ({"reasoning": 1}, "reasoning is a number, expected text"),
        ({"thinking": []}, "thinking is an array, expected text"),
        ({"sample_key": 7}, "sample_key is a number, expected text"),
        ({"source": []}, "source is an array, expected text"),
        ({"name": 1.5}, "name is a number, expected text"),
        ({"timestamp": 1700000000}, "timestamp is a number, expected text"),
        ({"level": "1"}, "level is text, expected a 64-bit integer"),
        ({"level": True}, "level is a boolean, expected a 64-bit integer"),
        ({"problem_id": 2**63}, "problem_id is a number, expected a 64-bit integer"),
        ({"problem_id": float("nan")}, "problem_id is a number, expected a 64-bit integer"),
        ({"result": "correct"}, "result is text, expected an object or null"),
        ({"result": [True]}, "result is an array, expected an object or null"),
        ({"result": False}, "result is a boolean, expected an object or null"),
        (labelled(correctness="true"), "result.correctness is text, expected true or false"),
        (labelled(correctness=1), "result.correctness is a number, expected true or false"),
        (labelled(fast_1=0), "result.fast_1 is a number, expected true or false"),
        (labelled(speedup="1.5x"), "result.speedup is text, expected a number"),
        (labelled(speedup=True), "result.speedup is a boolean, expected a number"),
        (labelled(speedup=float("nan")), "result.speedup is not a finite number"),
        (labelled(speedup=float("inf")), "result.speedup is not a finite number"),
        (labelled(speedup=10**400), "result.speedup is not a finite number"),
        (labelled(error={"type": "x"}), "result.error is an object, expected text"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    assert refusal({**record(), **changes}) == ("wrong_type", said)


@pytest.mark.parametrize("field", ["pytorch_code", "triton_code", "thinking", "sample_key", "source"])
def test_half_of_a_surrogate_pair_is_refused_before_it_reaches_a_file(field: str) -> None:
    changes: dict[str, Any] = {field: "x\ud800y"}
    reason, detail = refusal(record(**changes))
    assert reason == "bad_text" and detail.startswith(f"{field} holds half of a surrogate pair")


def test_a_module_that_is_too_long_to_be_parsed_is_known_by_its_text() -> None:
    first, second = (trace(record(pytorch_code=f"# {'x' * LONGEST_CODE}{end}")) for end in "ab")
    assert first.problem != second.problem and len(first.problem) == 64


def test_a_whole_surrogate_pair_is_one_character() -> None:
    assert "\\ud83d\\ude00" in (text := json.dumps(record(model_reasoning="\U0001f600")))
    assert trace(json.loads(text)).reasoning == "\U0001f600"


def test_fields_that_are_not_known_do_not_matter() -> None:
    assert trace(record(full_completion=5, turns=[{}], extra={"x": "\ud800"})).version == trace(record()).version


@pytest.mark.parametrize(
    ("labels", "flags"),
    [
        ({"speedup": 1.0}, (True, False, False)),
        ({"speedup": 1.001}, (True, True, False)),
        ({"speedup": 2.0}, (True, True, True)),
        ({"speedup": 2}, (True, True, True)),
        ({"speedup": None}, (True, False, False)),
        ({"speedup": ...}, (True, False, False)),
        ({"speedup": 5.0, "correctness": False}, (False, False, False)),
    ],
)
def test_older_results_without_flags_get_them_from_what_they_mean(
    labels: dict[str, Any], flags: tuple[bool, bool, bool]
) -> None:
    absent: dict[str, Any] = {"fast_0": ..., "fast_1": ..., "fast_2": None}
    found = trace(labelled(**absent, **labels))
    assert (found.fast_0, found.fast_1, found.fast_2) == flags


def test_the_version_does_not_follow_the_place() -> None:
    assert trace(record(), position=0).version == trace(record(), position=5).version


@pytest.mark.parametrize("key", [..., None, ""])
def test_a_trace_without_a_name_is_named_by_its_content_and_not_by_its_place(key: Any) -> None:
    first, moved, other = (
        trace(record(1, sample_key=key)),
        trace(record(1, sample_key=key), 5),
        trace(record(2, sample_key=key)),
    )
    assert first.sample_key.startswith("unnamed_") and first.version == moved.version
    assert first.sample_key == moved.sample_key != other.sample_key


BESIDE = ("file", "position", "kernel_field", "launch_bound", "speedup_low")


@pytest.mark.parametrize("field", [f.name for f in fields(Trace) if f.name not in BESIDE])
def test_the_version_follows_every_other_field(field: str) -> None:
    changed: dict[str, Any] = {
        "has_result": False,
        "correctness": False,
        "fast_0": False,
        "fast_1": False,
        "fast_2": True,
    }
    changed |= {"level": 9, "problem_id": 9, "speedup": 9.0, "turn": 9, "num_turns": 9}
    found = trace(record())
    assert Trace(**{**found.__dict__, field: changed.get(field, "other")}).version != found.version


def test_a_record_that_was_read_before_fields_were_added_keeps_its_version() -> None:
    old = record(1, triton_code="import triton\n\n\ndef triton_kernel_wrapper(x):\n    return x + 1")
    assert trace(old).version == "d83daad6b5e4b4360c9279e6549dc93f35293553f99a656ff1258a8a8319e732"
    measured = {**old["result"], "launch_bound": True, "speedup_low": 1.2, "reference_time_ms": 0.01}
    found = trace({**old, "result": measured})
    assert found.launch_bound and found.speedup_low == 1.2 and found.version == trace(old).version


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab \ud800\u00e9", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


results = json_values | st.dictionaries(st.sampled_from(list(record()["result"])), json_values)


turns = st.lists(
    json_values
    | st.dictionaries(st.sampled_from(["triton_code", "full_completion", "result", "reasoning"]), json_values)
)
CONVERSATION = ("turns", "final_triton_code", "final_result", "num_turns", "full_messages", "full_completion")


@given(
    st.dictionaries(st.sampled_from([*record(), *CONVERSATION]), json_values),
    results,
    st.none() | turns,
)
def test_whatever_a_field_holds_a_record_becomes_a_trace_or_is_refused_and_can_be_stored(
    changes: dict[str, Any], result: Any, turns: Any
) -> None:
    value = {**record(), "result": result, **changes}
    if turns is not None:
        del value["triton_code"]
        value["turns"] = turns
    parsed = parse(value)
    if isinstance(parsed, Trace):
        assert len(parsed.version) == 64
        json.dumps(parsed.__dict__, allow_nan=False, ensure_ascii=False).encode()
    else:
        assert parsed.reason in {"missing_field", "wrong_type", "bad_text"} and parsed.detail
        parsed.detail.encode()


@pytest.mark.parametrize(
    "code", ["not " * 20_000 + "1", "-" * 100_000 + "1", "(" * 5000, "a" + ".b" * 50_000, "x\x00y"]
)
def test_code_that_pythons_parser_gives_up_on_is_still_a_trace(code: str) -> None:
    assert trace(record(pytorch_code=code)).problem != trace(record(pytorch_code="other")).problem
