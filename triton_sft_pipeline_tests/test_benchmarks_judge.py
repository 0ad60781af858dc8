"""What the judge's benchmark makes of verdicts, and that its kernels are what it says they are."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.judgeable import Judgeable, read_judgeable
from triton_sft_pipeline.verification import VERDICTS, KernelJudge, Verdict
from triton_sft_pipeline.verification.gate import inspect_source

FOLDER = Path(__file__).parent.parent / "benchmarks"
MODULES = ("judge", "judge_figures", "judge_kernels", "judge_machine", "judge_parts", "judge_report", "judge_table")


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts import each other by bare names, as they do when one is run; no other test shall see those names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in (*MODULES, "judge_yardstick"):
        sys.modules.pop(name, None)


def load(name: str) -> Any:
    return importlib.import_module(name)


def verdict(name: str, key: str = "k", wall_s: float = 1.0, **fields: Any) -> Verdict:
    correct = name in ("verified", "verified_hybrid")
    return Verdict(key=key, verdict=name, correctness=correct, fast_0=correct, wall_s=wall_s, **fields)


def timed(key: str, low: float, high: float, launch_bound: bool = False) -> Verdict:
    speed = {"speedup": (low + high) / 2, "speedup_low": low, "speedup_high": high, "kernel_time_ms": 0.1}
    return verdict("verified", key, fast_1=low > 1.0, launch_bound=launch_bound, **speed)


def test_a_rate_counts_only_kernels_that_were_executed() -> None:
    ran = [verdict("verified", wall_s=1.0), verdict("incorrect_numerical", wall_s=2.0), verdict("timeout", wall_s=60.0)]
    refused = [verdict(name, wall_s=0.0) for name in ("no_code", "syntax_error", "unsupported_on_cpu", "infra_error")]
    found = load("judge_figures").rate(ran + refused, start_s=10.0, judging_s=50.0)
    assert (found["kernels"], found["executed"]) == (7, 3)
    assert found["kernels_per_minute"] == pytest.approx(3.0)
    assert found["kernels_per_minute_without_start"] == pytest.approx(3.6)
    assert (found["median_wall_s"], found["p95_wall_s"], found["timeouts"]) == (2.0, 60.0, 1)


def test_every_verdict_that_means_not_executed_is_one_of_the_judges() -> None:
    assert set(VERDICTS) >= load("judge_figures").NEVER_RAN


def test_a_quantile_is_the_smallest_value_that_its_share_does_not_exceed() -> None:
    quantile = load("judge_figures").quantile
    assert [quantile([3.0, 1.0, 2.0, 4.0], share) for share in (0.0, 0.5, 0.95, 1.0)] == [1.0, 2.0, 4.0, 4.0]
    assert quantile([], 0.5) is None


def test_judge_and_yardstick_are_compared_on_the_kernels_of_both() -> None:
    found = load("judge_figures").common({"a": 0.5, "b": 0.5, "c": 9.0}, {"a": 2.0, "b": 4.0, "d": 99.0}, workers=2)
    assert (found["kernels"], found["times"]) == (2, pytest.approx(6.0))
    assert found["judge_per_minute"] == pytest.approx(240.0)
    assert found["yardstick_per_minute"] == pytest.approx(40.0)


def test_a_label_is_held_only_against_a_conclusive_verdict() -> None:
    verdicts = [verdict("verified", "a"), verdict("crash", "b"), verdict("infra_error", "c"), verdict("verified", "d")]
    found = load("judge_figures").label_agreement(verdicts, {"a": True, "b": True, "c": True, "d": None})
    assert found == {"labelled": 2, "agree": 1}


def test_repeated_runs_are_compared_where_both_were_timed_and_not_both_launch_bound() -> None:
    first = [timed("same", 1.1, 1.2), timed("flips", 1.01, 1.1), timed("bound", 0.9, 1.1, True), verdict("crash", "x")]
    second = [timed("same", 1.1, 1.3), timed("flips", 0.99, 1.1), timed("bound", 1.1, 1.2, True), timed("x", 1.1, 1.2)]
    found = load("judge_figures").repeated({v.key: v for v in first}, {v.key: v for v in second})
    assert found["not_launch_bound"] == {"kernels": 2, "agree": 1, "share": 0.5}
    assert found["all"]["kernels"] == 3
    assert [(item["key"], item["not_launch_bound"]) for item in found["disagreements"]] == [
        ("flips", True),
        ("bound", False),
    ]
    assert [run["low"] for run in found["disagreements"][0]["runs"]] == [1.01, 0.99]
    assert found["other_verdicts"] == [{"key": "x", "verdicts": ["crash", "verified"]}]


def test_a_kernel_that_is_launch_bound_in_one_run_only_still_counts() -> None:
    found = load("judge_figures").repeated({"k": timed("k", 1.1, 1.2, True)}, {"k": timed("k", 0.9, 1.0, False)})
    assert found["not_launch_bound"] == {"kernels": 1, "agree": 0, "share": 0.0}


def test_a_kernel_against_itself_that_was_not_measured_does_not_pass_as_unflagged() -> None:
    verdicts = [timed("0", 0.97, 1.03), timed("1", 1.01, 1.05), timed("2", 0.9, 0.99), verdict("crash", "3")]
    found = load("judge_figures").against_itself(verdicts, {"0": "small", "1": "small", "2": "large", "3": "large"})
    everything = found["all"]
    assert (everything["runs"], everything["measured"]) == (4, 3)
    assert (everything["flagged"], everything["flagged_slower"]) == (1, 1)
    assert everything["width"]["max"] == pytest.approx(0.09)
    assert found["cases"]["large"]["measured"] == 1
    rows = load("judge_report").rows({"options": {"device": "cuda"}, "aa": found})
    assert [row.met for row in rows[:2]] == [False, False]


def test_kernels_against_themselves_are_the_same_text_and_pass_the_gate() -> None:
    twins = load("judge_kernels").twins()
    assert len(twins) >= 4
    for problem, kernel in twins.values():
        compile(problem, "problem", "exec")
        assert inspect_source(kernel) is None
        assert kernel[: kernel.index("class ModelNew")] == problem[: problem.index("class Model(")]


def test_hanging_kernels_pass_the_gate() -> None:
    assert [inspect_source(code) for code in load("judge_kernels").hangs().values()] == [None, None, None]


@pytest.mark.parametrize(
    ("stages", "exit_code", "expected"),
    [
        (["run", {"outcome": "correct"}], 0, ("correct", True, None)),
        (["run", {"outcome": "correct", "reference_ms": 2.0, "kernel_ms": 1.0}], 0, ("correct", True, (2.0, 1.0))),
        (["run", {"outcome": "compile_error"}], 0, ("compile_error", False, None)),
        (["run"], None, ("timeout", True, None)),
        (["run"], -11, ("crash", True, None)),
        (["reference", "load"], 1, ("broken_load", False, None)),
        (["reference"], None, ("timeout", False, None)),
        ([], 1, ("broken_start", False, None)),
    ],
)
def test_a_process_of_the_yardstick_counts_as_executed_once_it_called_the_kernel(
    stages: list[Any], exit_code: int | None, expected: tuple[str, bool, Any]
) -> None:
    reports = [{"stage": "end", **stage} if isinstance(stage, dict) else {"stage": stage} for stage in stages]
    output = "".join(f"yardstick {json.dumps(report)}\n" for report in reports)
    assert load("judge_yardstick").read_output(f"a kernel's own output\n{output}", exit_code) == expected


@pytest.mark.slow
def test_the_yardstick_tells_right_from_wrong_in_a_process_of_its_own(tmp_path: Path) -> None:
    kernels, yardstick = load("judge_kernels"), load("judge_yardstick")
    tasks = [
        yardstick.Task("right", kernels.HANG_PROBLEM, kernels.HONEST),
        yardstick.Task("wrong", kernels.HANG_PROBLEM, kernels.HONEST.replace("x * 1.5", "x * 2.5")),
    ]
    seen: list[Any] = []
    outcomes = yardstick.run_all(tasks, "cpu", 2, 2, False, seen.append)
    assert {outcome.key: outcome.outcome for outcome in outcomes} == {"right": "correct", "wrong": "incorrect"}
    assert all(outcome.executed for outcome in outcomes)
    assert seen == outcomes


def cpu_result() -> dict[str, Any]:
    figures = load("judge_figures")
    verdicts = [verdict("verified", f"{number}", wall_s=0.4) for number in range(10)]
    rate = figures.rate(verdicts, 1.0, 3.0) | {"timing": False, "gpu_busy": None}
    rate["labels"] = {"labelled": 10, "agree": 10}
    yardstick: dict[str, Any] = {
        "kernels": 10,
        "executed": 10,
        "kernels_per_minute": 60.0,
        "median_wall_s": 2.0,
        "timeouts": 0,
    }
    yardstick |= {"gpu_busy": None, "common": {"kernels": 10, "times": 5.0}}
    return {
        "about": {"gpu": None, "processors": 2, "versions": {"torch": "2", "a-long-name": "v" * 90}},
        "options": {"device": "cpu", "workers": 2, "trials": 5},
        "rate": rate,
        "yardstick": yardstick,
        "aa": {"skipped": "needs a GPU"},
    }


def test_the_table_has_eighty_columns_and_says_which_bound_was_missed() -> None:
    report, result = load("judge_report"), cpu_result()
    lines = report.rows(result)
    assert {row.what.strip(): row.met for row in lines if row.met is not None} == {
        "kernels a minute, start included": True,
        "one kernel, median": True,
        "the judge is so many times as fast": False,
    }
    printed = report.table(lines, result).splitlines()
    assert max(map(len, printed)) <= 80
    assert sum(line.endswith("MISSED") for line in printed) == 1


def test_nothing_in_the_table_of_a_gpu_is_cut_off() -> None:
    figures, report = load("judge_figures"), load("judge_report")
    names = list(load("judge_kernels").twins())
    runs = [timed(str(number), 0.985, 1.015) for number in range(200)]
    twice = [
        {"free": timed("free", 1.01, low)} | {f"{n}": timed(f"{n}", 1.1, 1.2) for n in range(300)} for low in (1, 2)
    ]
    twice[1]["free"] = timed("free", 0.99, 1.01)
    repeated = figures.repeated(*twice)
    for item in repeated["disagreements"]:
        item["name"] = "a key that is much longer than any column is wide"
    result = cpu_result() | {
        "aa": figures.against_itself(runs, {str(number): names[number % len(names)] for number in range(200)}),
        "repeat": repeated,
        "hang": {
            "runs": [{"where": name, "verdict": "timeout", "late_s": 0.1} for name in load("judge_kernels").hangs()]
            * 3,
            "worst_late_s": 0.1,
            "not_timeout": [],
            "honest": ["verified", "verified"],
        },
    }
    result["about"]["gpu"] = {"name": "NVIDIA H200"}
    result["options"]["device"], result["rate"]["timing"] = "cuda", True
    lines = report.rows(result)
    printed = report.table(lines, result)
    assert [row.what for row in lines if row.what not in printed] == []
    assert max(map(len, printed.splitlines())) <= 80
    assert [row.met for row in lines if row.bound == ">= 98%"] == [True]


def test_parts_run_in_their_order_and_unknown_ones_are_refused() -> None:
    judge = load("judge")
    assert judge.chosen_parts("hang, rate") == ["rate", "hang"]
    with pytest.raises(judge.PipelineError, match="rates"):
        judge.chosen_parts("rates")


def records(folder: Path, count: int) -> tuple[Path, list[Judgeable]]:
    file = folder / "traces.json"
    given = [
        {"sample_key": f"p{n}", "pytorch_code": f"a = {n}", "triton_code": "b", "result": {"correctness": n != 2}}
        for n in range(count)
    ]
    file.write_text(json.dumps(given), encoding="utf-8")
    return file, [item for item in read_judgeable([file]) if isinstance(item, Judgeable)]


def test_a_limit_spreads_over_the_records(tmp_path: Path) -> None:
    file, _ = records(tmp_path, 10)
    read = load("judge").read_records
    assert [record.name for record in read(file, 3)] == ["p0", "p3", "p6"]
    assert len(read(file, None)) == len(read(file, 99)) == 10


def test_markdown_has_a_row_a_verdict_and_a_line_a_disagreement(tmp_path: Path) -> None:
    _, kernels = records(tmp_path, 4)
    names = ["verified", "incorrect_shape", "verified", "infra_error"]
    details = ["fine", "(2, 3) | (3, 2)", "fine", "gone"]
    lines = [
        {"sample_key": "s", **verdict(name, kernel.identity, detail=detail).to_dict()}
        for name, kernel, detail in zip(names, kernels, details, strict=True)
    ]
    # The traces may be elsewhere by now, and one line may belong to other traces.
    for line in lines:
        line["key"] = line["key"].replace(str(tmp_path), "/elsewhere")
    lines.append({**lines[0], "key": "0@0@other.json"})
    table = load("judge_table")
    pairs = list(table.paired(lines, kernels))
    text = list(table.markdown(pairs))
    assert text[:3] == [
        "| verdict | labelled correct | labelled incorrect | all |",
        "|---|---:|---:|---:|",
        "| verified | 1 | 1 | 2 |",
    ]
    assert "| **all** | 3 | 1 | 4 |" in text
    assert "1 of 3 conclusive verdicts agree with the label on correctness." in text
    assert [line for line in text if line.startswith("- ")] == [
        "- `p1 (traces, record 1)`: labelled correct, judged **incorrect_shape**. (2, 3) \\| (3, 2)",
        "- `p2 (traces, record 2)`: labelled incorrect, judged **verified**. fine",
    ]


@pytest.mark.slow
def test_the_large_kernels_are_right(judging: KernelJudge) -> None:
    large = load("judge_kernels").large(sizes_mb=[1 / 64])
    assert len(large) == 6
    for name, sources in large.items():
        assert judging.verify(*sources).verdict == "verified", name
    assert len(load("judge_kernels").large()) == 24


@pytest.fixture
def judging() -> Iterator[KernelJudge]:
    with KernelJudge(device="cpu", workers=1, trials=2) as judge:
        yield judge
