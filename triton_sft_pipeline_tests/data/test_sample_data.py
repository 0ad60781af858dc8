"""What ships under data/: the counts that its README states, the schema, and that held-out problems are held out."""

from __future__ import annotations

import ast
import json
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.problems import fingerprint, load_problems

DATA = Path(__file__).parents[2] / "data"
RECORDS: list[dict[str, Any]] = json.loads((DATA / "reasoning_traces.json").read_text(encoding="utf-8"))
TEXTS = ("sample_key", "source", "name", "model_reasoning", "thinking", "triton_code", "full_completion", "timestamp")
LABELS = ("correctness", "speedup", "fast_0", "fast_1", "fast_2", "error")
MEASURED = ("reference_time_ms", "reference_iqr_ms", "kernel_time_ms", "kernel_iqr_ms", "speedup_low", "speedup_high")


def kind(record: dict[str, Any]) -> str:
    if record["pytorch_code"] is None:
        return "malformed"
    if record.get("result") is None:
        return "no result"
    return "correct" if record["result"]["correctness"] else "wrong"


CORRECT = [record for record in RECORDS if kind(record) == "correct"]
JUDGED = [record for record in RECORDS if record.get("result") is not None]


def by_key(record: dict[str, Any]) -> str:
    return record["sample_key"]


def functions(code: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}


def arguments_of_forward(pytorch_code: str) -> list[str]:
    model = next(node for node in ast.parse(pytorch_code).body if isinstance(node, ast.ClassDef))
    forward = next(node for node in model.body if isinstance(node, ast.FunctionDef) and node.name == "forward")
    return [argument.arg for argument in forward.args.args[1:]]


def test_there_are_as_many_records_of_each_kind_as_the_readme_says() -> None:
    assert Counter(kind(record) for record in RECORDS) == {"correct": 31, "wrong": 6, "malformed": 1, "no result": 2}


def test_both_ways_of_having_no_result_are_there() -> None:
    without = [record for record in RECORDS if kind(record) == "no result"]
    assert sorted("result" in record for record in without) == [False, True]


def test_sample_keys_are_unique() -> None:
    assert len({record["sample_key"] for record in RECORDS}) == len(RECORDS)


@pytest.mark.parametrize("record", RECORDS, ids=by_key)
def test_a_record_follows_the_schema(record: dict[str, Any]) -> None:
    assert set(record) | {"result"} == {*TEXTS, "level", "problem_id", "pytorch_code", "result"}
    assert all(isinstance(record[field], str) and record[field].strip() for field in TEXTS)
    assert record["source"] == "sample"
    assert record["level"] in (1, 2)
    assert isinstance(record["problem_id"], int)
    assert record["full_completion"] == (
        f"<think>\n{record['thinking']}\n</think>\n\n<triton>\n{record['triton_code']}\n</triton>"
    )
    datetime.fromisoformat(record["timestamp"])


@pytest.mark.parametrize("record", JUDGED, ids=by_key)
def test_a_result_agrees_with_itself(record: dict[str, Any]) -> None:
    result = record["result"]
    assert set(result) == {*LABELS, *MEASURED, "launch_bound"}
    for name in (*MEASURED, "launch_bound"):
        assert (result[name] is not None) == result["correctness"], "every right kernel was measured, and no other"
    if result["correctness"]:
        assert result["speedup_low"] <= result["speedup"] <= result["speedup_high"]
        assert result["speedup"] == pytest.approx(result["reference_time_ms"] / result["kernel_time_ms"], rel=1e-3)
    assert result["fast_0"] == result["correctness"]
    assert result["fast_1"] == (result["correctness"] and result["speedup"] > 1.0)
    assert result["fast_2"] == (result["correctness"] and result["speedup"] >= 2.0)
    assert isinstance(result["speedup"], float)
    assert (result["error"] is None) == result["correctness"]


@pytest.mark.parametrize("record", CORRECT, ids=by_key)
def test_a_correct_kernel_has_one_jit_function_and_a_wrapper_that_takes_the_inputs_of_forward(
    record: dict[str, Any],
) -> None:
    code = functions(record["triton_code"])
    assert set(code) == {"kernel", "triton_kernel_wrapper"}
    assert [ast.unparse(decorator) for decorator in code["kernel"].decorator_list] == ["triton.jit"]
    taken = [argument.arg for argument in code["triton_kernel_wrapper"].args.args]
    inputs = arguments_of_forward(record["pytorch_code"])
    assert taken[: len(inputs)] == inputs
    assert all(f"self.{weight} = nn.Parameter" in record["pytorch_code"] for weight in taken[len(inputs) :])


def test_some_correct_kernels_take_a_parameter() -> None:
    assert sum("nn.Parameter" in record["pytorch_code"] for record in CORRECT) == 3


def test_every_correct_kernel_answers_a_problem_of_its_own() -> None:
    """The tiny model is to know each answer by heart, so no prompt may have two."""
    assert len({fingerprint(record["pytorch_code"]) for record in CORRECT}) == len(CORRECT)


def test_three_wrong_kernels_answer_a_problem_that_a_correct_one_answers_too() -> None:
    answered = {fingerprint(record["pytorch_code"]) for record in CORRECT}
    repeats = [r for r in RECORDS if kind(r) == "wrong" and fingerprint(r["pytorch_code"]) in answered]
    assert len(repeats) == 3


def test_a_problem_has_one_name_and_one_number() -> None:
    seen: dict[str, set[tuple[str, int]]] = {}
    for record in RECORDS:
        if record["pytorch_code"] is not None:
            seen.setdefault(fingerprint(record["pytorch_code"]), set()).add((record["name"], record["problem_id"]))
    assert all(len(labels) == 1 for labels in seen.values())
    assert len({number for labels in seen.values() for _, number in labels}) == len(seen)


def test_as_many_kernels_are_faster_as_the_readme_says() -> None:
    results = [record["result"] for record in CORRECT]
    assert (sum(r["fast_1"] for r in results), sum(r["fast_2"] for r in results)) == (28, 10)
    lows = [r["speedup_low"] for r in results]
    assert (sum(low > 1.0 for low in lows), sum(low >= 2.0 for low in lows)) == (22, 6)
    assert all(r["launch_bound"] for r in results)


def test_the_slow_kernel_is_correct_and_not_faster_than_pytorch() -> None:
    slow = next(record for record in CORRECT if record["name"] == "sum_of_squares")
    assert slow["result"]["speedup"] < 1.0


def test_there_are_ten_different_held_out_problems() -> None:
    problems = load_problems(DATA / "held_out")
    assert len({fingerprint(problem.pytorch_code) for problem in problems}) == len(problems) == 10


def test_no_held_out_problem_is_the_problem_of_a_trace() -> None:
    held_out = {fingerprint(problem.pytorch_code): problem.key for problem in load_problems(DATA / "held_out")}
    traced = {fingerprint(record["pytorch_code"]) for record in RECORDS if record["pytorch_code"] is not None}
    assert not [key for problem, key in held_out.items() if problem in traced]
