"""The set steps together: their order, the shorter of equally good reasonings, and the best of each problem."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest

from triton_sft_pipeline.traces import duplicates
from triton_sft_pipeline.traces.duplicates import TraceKey
from triton_sft_pipeline.traces.record import RawRecord, Trace, parse_record
from triton_sft_pipeline.traces.selection import key_of, set_steps
from triton_sft_pipeline.traces.settings import FilterSettings
from triton_sft_pipeline_tests.traces.records import record
from triton_sft_pipeline_tests.traces.test_duplicates import kernel, key, variants

# Kernels so different that no two count as duplicates.
CODES = [f"def triton_kernel_wrapper(x):\n    return tl.f{n}(x, {n}).g{n}()[{n}] - x.h{n}\n" for n in range(8)]


def selected(keys: list[TraceKey], **settings: object) -> dict[int, tuple[str, str]]:
    found = set_steps(keys, FilterSettings(**settings))  # type: ignore[arg-type]
    return {place[1]: refusal for place, refusal in found.items()}


def traces(*quality: tuple[float | None, int], problem: str = "x + 1") -> list[TraceKey]:
    """One trace for each (speedup, reasoning length)."""
    return [
        key(place, CODES[place], problem, speedup=speedup, reasoning_length=length)
        for place, (speedup, length) in enumerate(quality)
    ]


def test_a_key_holds_what_the_trace_says() -> None:
    value = record(3, model_reasoning="Think.")
    trace = parse_record(RawRecord("t.json", 7, 0, value, json.dumps(value)))
    assert isinstance(trace, Trace)
    assert key_of(trace) == TraceKey(
        place=("t.json", 7),
        sample_key="sample_3",
        problem=trace.problem,
        pytorch_code=value["pytorch_code"],
        triton_code=value["triton_code"],
        version=trace.version,
        correct=True,
        speedup=1.5,
        reasoning_length=6,
    )


def test_of_equally_fast_traces_the_shorter_reasoning_is_kept_when_asked() -> None:
    keys = traces((1.00, 900), (1.05, 400), (1.11, 800))
    assert selected(keys) == {}
    sentence = "900 characters of reasoning; as fast with 400: s1 (t.json #1, 1.05x)"
    assert selected(keys, prefer_shorter=True) == {0: ("longer_reasoning", sentence)}


@pytest.mark.parametrize(
    "quality",
    [
        [(1.0, 900), (1.06, 400)],
        [(1.0, 400), (1.0, 400)],
        [(None, 900), (None, 400)],
        [(1.0, 900), (None, 400)],
    ],
)
def test_no_reasoning_goes_for_another_speed_an_equal_length_or_an_unknown_speed(
    quality: list[tuple[float | None, int]],
) -> None:
    assert selected(traces(*quality), prefer_shorter=True) == {}


def test_only_correct_traces_of_one_problem_are_weighed_against_each_other() -> None:
    keys = [
        key(0, CODES[0], "x + 1", speedup=1.0, reasoning_length=900),
        key(1, CODES[1], "x + 2", speedup=1.0, reasoning_length=400),
        key(2, CODES[2], "x + 1", correct=False, speedup=1.0, reasoning_length=100),
    ]
    assert selected(keys, prefer_shorter=True) == {}


def test_a_reasoning_goes_only_for_one_that_stays() -> None:
    # Each is within 5 % of the next; the second goes for the first, so the third has nobody to go for.
    assert set(selected(traces((1.00, 100), (1.04, 200), (1.08, 300)), prefer_shorter=True)) == {1}


def test_at_most_so_many_of_a_problem_are_kept_and_they_are_the_best() -> None:
    keys = traces((1.0, 1), (3.0, 1), (2.0, 1), (None, 1))
    keys.append(key(4, CODES[4], "torch.relu(x)", speedup=0.1))
    assert selected(keys, max_per_problem=2) == {
        0: ("max_per_problem", "number 3 of its problem; the best 2 are kept"),
        3: ("max_per_problem", "number 4 of its problem; the best 2 are kept"),
    }


def test_each_step_looks_only_at_what_the_one_before_left() -> None:
    keys = [
        key(0, kernel(), speedup=2.0, reasoning_length=500),
        # Would count as the second best, were it not a duplicate.
        key(1, kernel(block=64), speedup=1.9, reasoning_length=100),
        key(2, CODES[2], "x * 2", speedup=1.0, reasoning_length=300),
        key(3, CODES[3], "x * 2", speedup=1.02, reasoning_length=400),
        key(4, CODES[4], "x * 2", speedup=0.5, reasoning_length=1),
    ]
    found = selected(keys, prefer_shorter=True, max_per_problem=2)
    assert {position: reason for position, (reason, _) in found.items()} == {
        1: "near_duplicate",
        3: "longer_reasoning",
        4: "max_per_problem",
    }


def test_the_same_traces_stay_in_whatever_order_they_come() -> None:
    keys, settings = variants(60), FilterSettings(prefer_shorter=True, max_per_problem=3)
    expected = set_steps(keys, settings)
    assert {reason for reason, _ in expected.values()} >= {"duplicate", "near_duplicate", "max_per_problem"}
    for seed in range(5):
        shuffled = keys[:]
        random.Random(seed).shuffle(shuffled)
        assert set_steps(shuffled, settings) == expected


def test_keys_are_taken_one_at_a_time_and_none_is_kept() -> None:
    living = 0

    class Code(str):
        """A kernel that counts how many of its kind there are."""

        def __new__(cls, text: str) -> Code:
            nonlocal living
            living += 1
            return super().__new__(cls, text)

        def __del__(self) -> None:
            nonlocal living
            living -= 1

    most = 0

    def stream() -> Iterator[TraceKey]:
        nonlocal most
        for position in range(30):
            yield key(position, Code(CODES[position % 8]))
            most = max(most, living)

    assert len(set_steps(stream(), FilterSettings())) == 22
    assert most <= 3 and living == 0


def test_without_the_search_for_duplicates_no_code_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: str) -> list[str]:
        raise AssertionError(code)

    monkeypatch.setattr(duplicates, "kernel_tokens", refuse)
    keys = [key(0), key(1)]
    assert selected(keys, drop_duplicates=False) == {}
    assert set(selected(keys, drop_duplicates=False, max_per_problem=1)) == {1}
