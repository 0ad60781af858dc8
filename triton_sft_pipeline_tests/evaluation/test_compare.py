"""Reports side by side: what is paired, what is left out and why, what is warned of, and how it is drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.evaluation.compare import compare_reports, read_reports
from triton_sft_pipeline.evaluation.compare_report import comparison_html, comparison_lines, comparison_markdown
from triton_sft_pipeline.evaluation.report_text import points
from triton_sft_pipeline_tests.evaluation.pages import Page, assert_self_contained
from triton_sft_pipeline_tests.evaluation.reports import answer, made_problems, made_report, problem

HOSTILE = "</script><b>a|b\x00\ud800"


def row(
    key: str, number: int, good: bool, split: str = "held_out", base: bool = False, **fields: Any
) -> dict[str, Any]:
    """A problem whose tuned model is right or wrong with one answer."""
    answers = {name: [answer("verified" if right else "timeout")] for name, right in (("base", base), ("tuned", good))}
    return problem(key, split, number, **answers, **fields)


def report(rows: list[dict[str, Any]], **parts: Any) -> dict[str, Any]:
    return made_report(rows, timed=False, **parts)


@pytest.fixture(scope="module")
def comparison() -> dict[str, Any]:
    reports = {
        name: made_report(made_problems({"seen": 4, "held_out": 5}, samples, seed=seed))
        for name, samples, seed in (
            ("adapters/first", 8, 1),
            ("second", 8, 2),
            ("a-third-one-with-a-long-name/run-17", 1, 3),
        )
    }
    return compare_reports(reports, resamples=200)


def test_later_reports_are_paired_with_the_first_problem_by_problem() -> None:
    """By hand: first right on 1 of 4, second on 3 of 4; one problem is solved by both, two by the second alone."""
    first = report([row("a", 1, True), row("b", 2, False), row("c", 3, False), row("d", 4, False)])
    second = report([row("d", 4, True), row("c", 3, True), row("b", 2, False), row("a", 1, True)])
    found = compare_reports({"A": first, "B": second}, resamples=2000)["splits"]["held_out"]
    paired = found["paired"]["B"]["comparison"]
    assert (paired["n"], paired["both"], paired["wins"], paired["losses"], paired["neither"]) == (4, 1, 2, 0, 1)
    assert paired["fast_0"]["difference"] == 0.5 and paired["p_value"] == 0.5
    assert paired["fast_0"]["interval"] == [0.0, 1.0]
    assert paired["fast_1"] is None
    assert found["scores"]["B"]["score"] == second["tuned"]["held_out"]
    assert found["scores"]["B"]["base"] == second["base"]["held_out"]
    assert found["paired"]["B"]["left_out"] == []
    turned = compare_reports({"B": second, "A": first}, resamples=2000)["splits"]["held_out"]["paired"]["A"][
        "comparison"
    ]
    assert (turned["wins"], turned["losses"], turned["fast_0"]["difference"]) == (0, 2, -0.5)


def test_problems_are_the_same_when_their_code_is_and_the_others_are_named() -> None:
    first = report([row("a", 1, True), row("b", 2, True), row("c", 3, True), row("e", 5, True)])
    second = report(
        [row("level3/a", 1, True), row("b", 9, True), row("c", 3, True, split="touched"), row("f", 6, True)]
    )
    found = compare_reports({"A": first, "B": second}, resamples=50)["splits"]["held_out"]["paired"]["B"]
    assert found["comparison"]["n"] == 1
    assert found["left_out"] == [
        {"key": "b", "reason": "B has other PyTorch code under this key"},
        {"key": "c", "reason": "B has it among its touched problems"},
        {"key": "e", "reason": "B has no such problem"},
        {"key": "b", "reason": "A has other PyTorch code under this key"},
        {"key": "f", "reason": "A has no such problem"},
    ]


def test_one_code_under_two_keys_is_paired_key_by_key() -> None:
    first = report([row("a", 1, True), row("b", 1, False)])
    second = report([row("b", 1, False), row("a", 1, True)])
    paired = compare_reports({"A": first, "B": second}, resamples=50)["splits"]["held_out"]["paired"]["B"]["comparison"]
    assert (paired["n"], paired["both"], paired["neither"], paired["wins"]) == (2, 1, 1, 0)


def test_a_problem_is_paired_once_and_what_is_left_over_is_named() -> None:
    first = report([row("a", 1, True)])
    second = report([row("a", 1, True), row("x", 1, False)])
    found = compare_reports({"A": first, "B": second}, resamples=50)["splits"]["held_out"]["paired"]["B"]
    assert (found["comparison"]["n"], found["comparison"]["both"]) == (1, 1)
    assert [left["key"] for left in found["left_out"]] == ["x"]


def test_of_a_report_without_a_tuned_model_the_base_counts_and_that_is_warned_of() -> None:
    tuned = report([row("a", 1, True), row("b", 2, True)])
    rows = [{k: v for k, v in r.items() if k != "tuned"} for r in (row("a", 1, True), row("b", 2, True, base=True))]
    base = report(rows)
    found = compare_reports({"base": base, "tuned": tuned}, resamples=50)
    assert found["splits"]["held_out"]["scores"]["base"]["model"] == "base"
    assert found["splits"]["held_out"]["paired"]["tuned"]["comparison"]["wins"] == 1
    assert "Only a base model was asked in base; the others count their tuned model." in found["warnings"]


def test_whatever_makes_the_numbers_hard_to_compare_is_warned_of() -> None:
    first = report([row("a", 1, True)])
    assert compare_reports({"A": first, "B": first}, resamples=50)["warnings"] == []
    for part, name, value in (
        ("settings", "judge_trials", 99),
        ("settings", "temperature", 1.5),
        ("judge", "device", "cpu"),
        ("provenance", "device", "another GPU"),
        ("provenance", "base_model", "another/base"),
        ("provenance", "judge_settings", {"version": "4"}),
        ("provenance", "asker", {"asked": "by a server"}),
    ):
        other = {**first, part: {**first[part], name: value}}
        (warning,) = compare_reports({"A": first, "B": other}, resamples=50)["warnings"]
        assert warning.startswith(f"{part}.{name}")
    other = {**first, "judge": {**first["judge"], "versions": {"triton": "3.6.0", "torch": "2.13.0"}}}
    (warning,) = compare_reports({"A": first, "B": other}, resamples=50)["warnings"]
    assert warning == "judge.versions.triton is not the same. A: 3.7.1; B: 3.6.0."


def test_nothing_in_common_is_said_and_drawn() -> None:
    found = compare_reports({"A": report([row("a", 1, True)]), "B": report([row("b", 2, True)])}, resamples=50)
    assert found["warnings"] == ["Held-out problems: A and B have none in common, so nothing can be paired."]
    assert "no problem in common" in "\n".join(comparison_lines(found))
    assert_self_contained(comparison_html(found))
    assert "A has no such problem" in comparison_markdown(found)


def test_a_split_that_one_report_alone_has_costs_a_line_and_no_table() -> None:
    both, one = row("a", 1, True), row("s", 2, True, split="seen")
    found = compare_reports({"A": report([both, one]), "B": report([both])}, resamples=50)
    assert list(found["splits"]) == ["held_out"]
    assert found["warnings"] == ["Seen problems: only A has any, so there is nothing to compare and no table of them."]
    lines = comparison_lines(found)
    assert sum("Seen problems" in line for line in lines) == 1 and comparison_markdown(found).count("Seen") == 1
    assert_self_contained(comparison_html(found))


def test_a_report_without_problems_of_a_split_is_in_no_table_of_it() -> None:
    both, seen = row("a", 1, True), row("s", 2, True, split="seen")
    reports = {"A": report([both, seen]), "B": report([both]), "C": report([both, seen])}
    found = compare_reports(reports, resamples=50)
    assert list(found["splits"]["seen"]["scores"]) == ["A", "C"] and list(found["splits"]["seen"]["paired"]) == ["C"]
    assert found["warnings"] == ["Seen problems: B has none."]
    turned = compare_reports({"B": reports["B"], "A": reports["A"], "C": reports["C"]}, resamples=50)
    assert list(turned["splits"]["seen"]["scores"]) == ["A", "C"] and turned["splits"]["seen"]["paired"] == {}
    assert turned["warnings"] == [
        "Seen problems: B has none. Nothing is paired, because B is what the others are paired with."
    ]
    assert "Seen problems: differences" not in comparison_markdown(turned)
    assert "Seen problems: problems" in comparison_markdown(turned)
    assert "no problem in common" not in "\n".join(comparison_lines(turned))
    assert_self_contained(comparison_html(turned))


def test_reports_without_a_problem_can_be_compared() -> None:
    found = compare_reports({"A": report([]), "B": report([])}, resamples=50)
    assert found["splits"] == {}
    assert_self_contained(comparison_html(found))
    assert comparison_markdown(found).startswith("# Comparison")


def test_a_comparison_needs_two_reports() -> None:
    with pytest.raises(PipelineError, match="two reports or more"):
        compare_reports({"A": report([])})


def test_the_same_comparison_twice_is_the_same(comparison: dict[str, Any]) -> None:
    reports = {
        "A": made_report(made_problems({"held_out": 5}, 8)),
        "B": made_report(made_problems({"held_out": 5}, 8, seed=4)),
    }
    once, twice = (json.dumps(compare_reports(reports, seed=3, resamples=100)) for _ in range(2))
    assert once == twice
    assert json.loads(json.dumps(comparison)) == comparison


def test_the_terminal_gets_at_most_80_columns_of_plain_signs(comparison: dict[str, Any]) -> None:
    lines = comparison_lines(comparison)
    assert max(map(len, lines)) <= 80
    assert "\n".join(lines).isascii()
    text = " ".join(" ".join(lines).split())
    assert "warning: settings.samples is not the same. adapters/first: 8; second: 8" in text
    assert "second less adapters/first, in points, n = 5: verified" in text and "exact McNemar p" in text


def test_every_difference_is_on_the_page_and_in_markdown(comparison: dict[str, Any]) -> None:
    page, markdown = Page(comparison_html(comparison)).words, comparison_markdown(comparison)
    differences = [own["comparison"] for split in comparison["splits"].values() for own in split["paired"].values()]
    assert len(differences) == 4
    for found in differences:
        for name in ("fast_0", "fast_1", "fast_2"):
            value, ends = found[name]["difference"], found[name]["interval"]
            shown = f"[{points(ends[0])}, {points(ends[1])}]"
            assert f"{points(value)} {shown} n = {found['n']}" in page
            assert f"{points(value)} points {shown}, n = {found['n']}" in markdown
    assert all(warning in page for warning in comparison["warnings"])


def test_the_speedups_of_all_splits_are_drawn_on_one_axis() -> None:
    slow, fast = ([answer("verified", speedup=speed)] for speed in (1.5, 30.0))
    rows = [problem("a", "seen", 1, base=slow, tuned=slow), problem("b", "held_out", 2, base=slow, tuned=fast)]
    page = comparison_html(compare_reports({"one": made_report(rows), "two": made_report(rows)}, resamples=50))
    figures = [figure for figure in re.findall(r"<svg.*?</svg>", page, re.S) if "speedup over PyTorch" in figure]
    seen, held_out = (re.findall(r">([0-9.]+x)<", figure) for figure in figures)
    assert seen == held_out and "32x" in seen


def test_the_page_is_self_contained_and_hostile_labels_and_keys_are_text() -> None:
    reports = {
        HOSTILE: report([row(HOSTILE, 1, True)], headline=HOSTILE),
        "B": report([row(HOSTILE, 2, True)], provenance={"device": HOSTILE}),
    }
    found = compare_reports(reports, resamples=50)
    html = comparison_html(found)
    assert_self_contained(html)
    assert "</script><b>a|b\ufffd\ufffd" in Page(html).text and "\x00" not in html
    tables = [line for line in comparison_markdown(found).splitlines() if line.startswith("|")]
    assert tables and "\x00" not in "".join(tables)
    assert "\x00" not in "".join(comparison_lines(found))


def test_reports_are_read_under_the_shortest_names_that_differ(tmp_path: Path) -> None:
    for name in ("one/run", "two/run", "three"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "report.json").write_text(json.dumps(report([])), encoding="utf-8")
    found = read_reports([tmp_path / "one" / "run", tmp_path / "three" / "report.json"])
    assert list(found) == ["run", "three"]
    found = read_reports([tmp_path / "one" / "run", str(tmp_path / "two" / "run" / "report.json")])
    assert list(found) == ["one/run", "two/run"]
    (tmp_path / "current").symlink_to(tmp_path / "one" / "run")
    assert list(read_reports([tmp_path / "current", tmp_path / "three"])) == ["current", "three"]
    assert list(read_reports([tmp_path / "one" / ".." / "current", tmp_path / "two" / "run"])) == ["current", "run"]
    (tmp_path / "three" / "other.json").write_text(json.dumps(report([])), encoding="utf-8")
    assert list(read_reports([tmp_path / "three", tmp_path / "three" / "other.json"])) == ["report", "other"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "cannot be read as JSON"),
        ("[]", "no report of an evaluation"),
        ('{"schema_version": 1}', "schema version 1, and 2 is needed.*run its evaluation again"),
        ('{"schema_version": 3}', "this version knows 2. Install the newer"),
        ('{"schema_version": 2, "base": {}}', "'problems' is missing"),
        ("\udcff", "cannot be read as JSON"),
    ],
)
def test_what_is_no_report_is_refused_by_name_with_what_to_do(
    tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "report.json"
    if content is not None:
        file.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(PipelineError, match=message) as caught:
        read_reports([file])
    assert str(file) in str(caught.value)


def test_a_report_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report([])), encoding="utf-8")
    with pytest.raises(PipelineError, match="given twice"):
        read_reports([tmp_path, tmp_path / "report.json"])
