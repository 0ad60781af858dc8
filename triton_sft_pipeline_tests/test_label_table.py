"""The end of `triton-sft verify`: every count by hand, every line inside 80 columns."""

from __future__ import annotations

from typing import Any

import pytest

from triton_sft_pipeline.judgeable import Judgeable
from triton_sft_pipeline.judging import Judged
from triton_sft_pipeline.label_table import MOST_SHOWN, outcome_lines
from triton_sft_pipeline.traces.record import RawRecord
from triton_sft_pipeline.verification import VERDICTS, Verdict
from triton_sft_pipeline.verification.verdict import CORRECT

GPU = {"gpu": "NVIDIA H200"}


def shown(
    rows: list[tuple[bool | None, str]], judged_now: int | None = None, seconds: float = 30.0, **fields: Any
) -> list[str]:
    """The lines for kernels labelled and judged like `rows`."""
    common: dict[str, Any] = {"backend": "cuda", "device": "cuda", "isolation": "namespaces", "versions": GPU, **fields}
    key = common.pop("sample_key", "sample_{}")
    kernels, verdicts = [], {}
    for number, (label, name) in enumerate(rows):
        result = None if label is None else {"correctness": label}
        value = {"sample_key": key.format(number), "pytorch_code": "", "result": result}
        kernels.append(Judgeable(RawRecord("t.json", number, 0, value, ""), str(number), "x"))
        correct = name in CORRECT
        verdicts[str(number)] = Verdict(
            **{
                "key": str(number),
                "verdict": name,
                "correctness": correct,
                "fast_0": correct,
                "detail": "Why.",
                **common,
            }
        )
    return list(outcome_lines(kernels, Judged(verdicts, len(rows) if judged_now is None else judged_now, seconds)))


def test_verdicts_are_counted_by_label_with_the_share_of_each_column() -> None:
    rows: list[tuple[bool | None, str]] = [(True, "verified")] * 6 + [(True, "crash")] * 2
    rows += [(False, "crash")] * 3 + [(False, "verified_hybrid")] + [(None, "verified")]
    table = [line.split() for line in shown(rows)[:6]]
    assert table == [
        ["labelled", "labelled"],
        ["verdict", "correct", "incorrect", "no", "label", "all"],
        ["verified", "6", "75", "%", "-", "1", "100", "%", "7", "54", "%"],
        ["crash", "2", "25", "%", "3", "75", "%", "-", "5", "38", "%"],
        ["verified_hybrid", "-", "1", "25", "%", "-", "1", "8", "%"],
        ["all", "8", "4", "1", "13"],
    ]


def test_each_label_that_does_not_hold_is_told_in_one_line() -> None:
    lines = shown([(True, "verified"), (True, "crash"), (False, "crash"), (False, "verified_hybrid"), (None, "crash")])
    start = lines.index("2 of 4 labels hold.")
    assert [line.split() for line in lines[start + 1 : start + 3]] == [
        ["sample_1", "correct", "crash", "Why."],
        ["sample_3", "incorrect", "verified_hybrid", "Why."],
    ]
    assert lines[start + 3] == ""


def test_a_verdict_that_says_nothing_about_the_kernel_contradicts_no_label() -> None:
    lines = shown([(True, "infra_error"), (True, "unsupported_on_cpu"), (True, "verified")])
    assert "1 of 1 labels hold; of 2 nothing can be said here." in lines
    assert not [line for line in lines if line.startswith("sample_")]


def test_without_labels_nothing_is_said_of_them() -> None:
    assert not [line for line in shown([(None, "crash")]) if "hold" in line]


def test_at_most_twenty_are_told_one_by_one_and_the_rest_is_counted() -> None:
    lines = shown([(True, "crash")] * (MOST_SHOWN + 3))
    assert len([line for line in lines if line.startswith("sample_")]) == MOST_SHOWN == 20
    assert "... and 3 more" in lines
    assert not [line for line in shown([(True, "crash")] * MOST_SHOWN) if "more" in line]


def test_no_line_is_wider_than_80_columns_and_none_moves_the_cursor() -> None:
    hostile = {"detail": "a\n\x1b[31m" + "very " * 60, "sample_key": "k\te\ry" * 30 + "{}"}
    rows: list[tuple[bool | None, str]] = [(name not in CORRECT, name) for name in VERDICTS] * 40
    for lines in (shown(rows, **hostile), shown(rows, versions={"gpu": "G" * 100}, isolation="i" * 100)):
        assert max(map(len, lines)) <= 80
        assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("judged_now", "seconds", "said"),
    [
        (3, 30.0, "3 kernels in 30.0 s, 6.0 a minute"),
        (2, 90.0, "2 kernels in 1 min 30 s, 1.3 a minute, 1 judged earlier"),
        (0, 0.1, "3 kernels, all judged earlier"),
        (1, 0.02, "1 kernel in 0.0 s, 2 judged earlier"),
    ],
)
def test_the_rate_counts_this_run_alone(judged_now: int, seconds: float, said: str) -> None:
    assert said in shown([(None, "verified")] * 3, judged_now, seconds)


def test_faster_kernels_are_counted_where_speeds_were_measured() -> None:
    said = "speed      fast_1 2, fast_2 0 (low end of the interval), 2 timed"
    rows: list[tuple[bool | None, str]] = [(None, "verified"), (None, "crash"), (None, "verified_hybrid")]
    lines = shown(rows, speedup=2.1, fast_1=True, fast_2=False)
    assert said in lines
    assert not [line for line in shown(rows) if line.startswith("speed")]


def test_right_kernels_whose_measurement_failed_are_told() -> None:
    kernels = [Judgeable(RawRecord("t.json", n, 0, {}, ""), str(n), "x") for n in range(3)]
    speeds: dict[str, Any] = {"0": {"speedup": 2.5, "fast_1": True, "fast_2": True}, "1": {}, "2": {}}
    verdicts = {key: Verdict(key, "verified", True, True, **fields) for key, fields in speeds.items()}
    lines = list(outcome_lines(kernels, Judged(verdicts, 3, 30.0)))
    assert "speed      fast_1 1, fast_2 1 (low end of the interval), 1 timed, 2 could not be" in lines


def test_device_and_isolation_are_those_of_the_verdicts() -> None:
    assert shown([(None, "verified")])[-2:] == ["device     NVIDIA H200 (cuda)", "isolation  namespaces"]
    cpu = shown([(None, "verified")], versions={}, backend="interpreter", device="cpu", isolation="process")
    assert cpu[-2].startswith("device     cpu, Triton's interpreter: no speed") and cpu[-1] == "isolation  process"
