"""A report from judged answers that were written by hand: layout, groups, headline, notes and data version."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from triton_sft_pipeline.chat.prompt import parse_answer
from triton_sft_pipeline.evaluation.generation import Completion
from triton_sft_pipeline.evaluation.judged import JudgedAnswer, Question
from triton_sft_pipeline.evaluation.notes import MOST_NAMED
from triton_sft_pipeline.evaluation.scores import compare, outcomes, score
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline.evaluation.summary import SPLITS, scores_hash, summarise
from triton_sft_pipeline.problems import Problem, Unusable, family_of
from triton_sft_pipeline.verification.verdict import CORRECT, Verdict

CODE = "import torch\nimport torch.nn as nn\nclass Model(nn.Module):\n    def forward(self, x):\n        return {}\n"
MATMUL, SOFTMAX = CODE.format("torch.matmul(x, x)"), CODE.format("torch.softmax(x, -1)")
FEW = {"bootstrap_resamples": 50}

# (split, key, level, code) -> model -> verdicts of its answers
PROBLEMS: list[tuple[str, str, int | None, str]] = [
    ("seen", "seen_a", None, MATMUL),
    ("held_out", "level3/1_a", 3, MATMUL),
    ("held_out", "level4/2_b", 4, SOFTMAX),
    ("held_out", "level4/3_c", 4, SOFTMAX),
    ("touched", "level3/9_t", 3, MATMUL),
]
GOOD, BAD, BROKEN = "verified", "incorrect_numerical", "reference_error"
BASE = [[BAD, BAD], [BAD, GOOD], [BAD, BAD], [BROKEN, BROKEN], [BAD, BAD]]
TUNED = [[GOOD, GOOD], [GOOD, GOOD], ["torch_fallback", GOOD], [BROKEN, BROKEN], [GOOD, GOOD]]


def verdict(name: str, key: str, timed: bool) -> Verdict:
    good = name in CORRECT
    speed = {"speedup": 1.5, "fast_1": good, "fast_2": False} if timed and good else {}
    return Verdict(key, name, good, good, detail=f"{name}.", device="cuda", backend="cuda", wall_s=1.0, **speed)


def answered(
    base: Sequence[Sequence[str]] = BASE, tuned: Sequence[Sequence[str]] | None = TUNED, timed: bool = True
) -> list[JudgedAnswer]:
    judged = []
    for model, given in (("base", base), ("tuned", tuned)):
        for index, names in enumerate(given or []):
            split, key, level, code = PROBLEMS[index]
            question = Question(split, Problem(key, code, "hand-written", level, key.rpartition("/")[2]))
            for sample, name in enumerate(names):
                text = "<think>\n</think>\n<triton>\nkernel\n</triton>"
                done = Completion(index, sample, text, 5, 10 + sample, "stop", 0.5)
                judged.append(JudgedAnswer(model, question, done, parse_answer(text), verdict(name, key, timed)))
    return judged


def report_on(judged: list[JudgedAnswer], more: Any = None, **settings: Any) -> dict[str, Any]:
    samples = max(j.completion.sample for j in judged) + 1
    given = EvaluationSettings(**{"samples": samples, **FEW, **settings})
    return summarise(
        judged, given, {"preset": "tiny", "notes": ["From the provenance."]}, ["By the caller."], **more or {}
    )


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return report_on(answered(), {"touched": {"level3/9_t": "the same module as the training problem relu_4"}})


def notes(report: dict[str, Any]) -> str:
    return "\n".join(report["notes"])


def test_the_report_is_plain_data_in_the_published_layout(report: dict[str, Any]) -> None:
    assert report == json.loads(json.dumps(report, allow_nan=False))
    assert list(report) == [
        *("schema_version", "headline", "notes", "base", "tuned", "groups", "comparison"),
        *("unusable", "problems", "generation", "judge", "settings", "provenance"),
    ]
    assert report["schema_version"] == 2
    assert list(report["base"]) == list(report["tuned"]) == list(report["comparison"]) == list(SPLITS)
    row = report["problems"][1]
    assert list(row) == [
        *("key", "split", "source", "level", "family", "name", "pytorch_code", "touched", "base", "tuned"),
    ]
    assert (row["key"], row["split"], row["level"], row["name"]) == ("level3/1_a", "held_out", 3, "1_a")
    assert set(row["tuned"][1]) == {
        *("sample", "verdict", "correctness", "detail", "fast_1", "fast_2", "torch_share", "code", "answer"),
        *("tokens", "stopped", "speedup", "speedup_low", "speedup_high", "compile_speedup", "graph_speedup"),
        *("launch_bound", "reference_time_ms", "reference_iqr_ms", "kernel_time_ms", "kernel_iqr_ms"),
    }
    second = {name: row["tuned"][1][name] for name in ("sample", "verdict", "speedup", "code", "tokens", "stopped")}
    assert second == {
        "sample": 1, "verdict": GOOD, "speedup": 1.5, "code": "kernel", "tokens": 11, "stopped": "stop",
    }  # fmt: skip
    assert report["generation"]["base"] == {
        "answers": 10, "tokens": 105, "seconds": 5.0, "tokens_per_second": 21.0, "stopped": {"stop": 10},
    }  # fmt: skip


def test_splits_are_scored_apart_and_from_the_reports_own_rows(report: dict[str, Any]) -> None:
    found = {split: report["tuned"][split]["fast_0"]["rate"] for split in SPLITS}
    assert found == {"seen": 1.0, "test": None, "held_out": pytest.approx((1 + 0.5 + 0) / 3), "touched": 1.0}
    rows = [row for row in report["problems"] if row["split"] == "held_out"]
    base, tuned = ([outcomes(row[name]) for row in rows] for name in ("base", "tuned"))
    assert report["base"]["held_out"] == score(base, timed=True, resamples=50)
    assert report["comparison"]["held_out"] == compare(base, tuned, timed=True, resamples=50)
    assert report["comparison"]["held_out"]["fast_0"]["difference"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert report["comparison"]["held_out"]["wins"] == 1, "the first answers alone"


def test_groups_are_by_level_and_family_within_a_split(report: dict[str, Any]) -> None:
    groups = report["groups"]
    assert list(groups) == ["seen", "held_out", "touched"], "only splits with problems"
    assert list(groups["held_out"]["level"]) == ["3", "4"]
    assert list(groups["seen"]["level"]) == ["unknown"]
    softmax, matmul = family_of(SOFTMAX), family_of(MATMUL)
    assert list(groups["held_out"]["family"]) == [softmax, matmul], "the largest first"
    four = groups["held_out"]["level"]["4"]
    assert {model: cell["fast_0"]["rate"] for model, cell in four.items()} == {"base": 0.0, "tuned": 0.25}
    for kind in ("level", "family"):
        assert sum(cell["base"]["n"] for cell in groups["held_out"][kind].values()) == 3


def test_the_order_of_the_answers_does_not_matter(report: dict[str, Any]) -> None:
    touched = {"touched": {"level3/9_t": "the same module as the training problem relu_4"}}
    again = report_on(answered()[::-1], touched)
    assert again == report


def test_several_answers_have_a_headline_of_shares(report: dict[str, Any]) -> None:
    assert report["headline"] == (
        "verified answers, 2 a problem: base 0 % -> tuned 100 % on 1 seen problem; "
        "17 % -> 50 % on 3 held-out problems; 0 % -> 100 % on 1 touched problem"
    )


def test_one_answer_has_a_headline_of_counts() -> None:
    one = report_on(answered([[BAD], [BAD], [GOOD], [BAD]], [[GOOD], [GOOD], [GOOD], [BAD]]))
    assert (
        one["headline"] == "verified kernels: base 0/1 -> tuned 1/1 on seen problems; 1/3 -> 2/3 on held-out problems"
    )
    alone = report_on(answered([[BAD], [BAD], [GOOD], [BAD]], None))
    assert alone["headline"] == "verified kernels: base 0/1 on seen problems; 1/3 on held-out problems"
    assert "tuned" not in alone and alone["comparison"] == {}
    assert all("tuned" not in cell for cell in alone["groups"]["held_out"]["level"].values())
    assert "base model alone" in notes(alone) and "Differences are" not in notes(alone)


def test_next_to_nothing_is_not_rounded_to_nothing() -> None:
    assert "base 0.5 % on" in report_on(answered([[GOOD] + [BAD] * 199], None))["headline"]
    assert "base 4.2 % on" in report_on(answered([[GOOD] + [BAD] * 23], None))["headline"], "as in the tables"
    assert "base 99.5 % on" in report_on(answered([[BAD] + [GOOD] * 199], None))["headline"]


def test_an_unfinished_run_with_uneven_answers_is_counted_as_it_is() -> None:
    ragged = report_on(answered([[BAD], [GOOD, BAD, BAD]], [[GOOD, GOOD], [BAD]]))
    assert (
        "verified answers, 1 to 3 a problem: " in ragged["headline"] and "on 1 held-out problem" in ragged["headline"]
    )
    assert "same number of answers" in notes(ragged) and "1 to 3 times" in notes(ragged)
    assert ragged["base"]["held_out"]["fast_0"]["rate"] == pytest.approx(1 / 3)
    assert list(ragged["base"]["held_out"]["pass_at_k"]) == ["1", "2", "3"]
    lonely = report_on(answered([[BAD], [GOOD]], [[GOOD]]))
    assert lonely["problems"][1]["tuned"] == [] and lonely["comparison"]["held_out"]["n"] == 0
    assert lonely["tuned"]["held_out"]["n"] == 0 and lonely["headline"].startswith("verified kernels: base 0/1")


def test_without_timing_there_is_no_speed_in_any_score() -> None:
    untimed = report_on(answered(timed=False))
    cells = [untimed["tuned"]["held_out"], untimed["groups"]["held_out"]["level"]["3"]["tuned"]]
    for cell in cells:
        assert [cell[name] for name in ("fast_1", "fast_2", "fast_p", "speedup")] == [None] * 4
    assert untimed["comparison"]["held_out"]["fast_1"] is None


def test_the_settings_name_the_temperature_that_was_used(report: dict[str, Any]) -> None:
    assert report["settings"]["temperature"] == 0.7
    assert report_on(answered([[BAD]], [[GOOD]]))["settings"]["temperature"] == 0.0


def test_notes_say_how_to_read_several_answers(report: dict[str, Any]) -> None:
    assert "answered 2 times (temperature 0.7, top-p 0.95)" in notes(report)
    assert "as if each had one answer" in notes(report) and "first answer to each problem" in notes(report)
    assert "The seen, held-out and touched problems are fewer than 10 each. Bootstrap intervals" in notes(report)
    assert "with 2 to 4 only 63 to 84 %" in notes(report), "a family of kernels is often that small"
    assert "The seen problems are fewer than 10. Bootstrap" in notes(report_on(answered([[BAD]], [[GOOD]])))
    assert "memorisation check" in notes(report) and "greedy" not in notes(report)
    assert report["notes"][-2:] == ["By the caller.", "From the provenance."]


def test_notes_say_what_greedy_answers_cannot_show() -> None:
    greedy = notes(report_on(answered([[BAD]], [[GOOD]])))
    assert "temperature 0" in greedy and "as if each had one answer" not in greedy
    assert "temperature 0" not in notes(report_on(answered([[BAD]], [[GOOD]]), temperature=0.7))


def test_touched_problems_are_named_with_what_they_touch(report: dict[str, Any]) -> None:
    assert "level3/9_t (the same module as the training problem relu_4)" in notes(report)
    assert "1 problem given as held out is the same as" in notes(report)
    assert [row["touched"] for row in report["problems"]] == [None] * 4 + [
        "the same module as the training problem relu_4"
    ]
    assert report["tuned"]["held_out"]["n"] == 3


def test_unusable_problems_are_counted_and_named_and_in_no_n(report: dict[str, Any]) -> None:
    problem = Unusable("broken", "problems/broken.py", "invalid", "It defines no get_inputs().")
    with_one = report_on(answered(), {"unusable": [problem]})
    assert with_one["unusable"] == [
        {"key": "broken", "place": "problems/broken.py", "kind": "invalid", "reason": "It defines no get_inputs()."}
    ]
    assert "1 problem could not be used, was not asked and is in no n: broken (invalid: It def" in notes(with_one)
    assert with_one["base"] == report["base"]
    many = report_on(answered(), {"unusable": [replace(problem, key=f"b{i:02}") for i in range(13)]})
    assert "13 problems could not be used, were not asked" in notes(many)
    assert f"b{MOST_NAMED - 1:02} (" in notes(many) and f"b{MOST_NAMED:02} (" not in notes(many)
    assert "and 3 more, all in report.json" in notes(many) and len(many["unusable"]) == 13


def test_problems_that_could_not_be_judged_are_named_with_how_many_answers() -> None:
    found = notes(report_on(answered([[GOOD, BROKEN], [BROKEN, BROKEN]], [[GOOD, GOOD], [BROKEN, BROKEN]])))
    assert "1 of 4 answers to the seen problem seen_a could not be judged (reference_error) and count as not" in found
    assert "The held-out problem level3/1_a could not be judged (reference_error) and counts as not verified" in found


def test_hybrid_kernels_of_all_answers_are_counted_in_a_note() -> None:
    found = notes(report_on(answered([[BAD, "verified_hybrid"]], [[GOOD, GOOD]])))
    assert "1 of the 3 verified kernels are hybrid" in found


def change(change: Callable[[dict[str, Any]], None], report: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(report)
    change(changed)
    return changed


def test_equal_verdicts_have_an_equal_hash_whatever_a_clock_said(report: dict[str, Any]) -> None:
    def slower(j: JudgedAnswer) -> JudgedAnswer:
        measured = replace(j.verdict, speedup=0.3, fast_1=False, fast_2=None, wall_s=99.0, detail="Otherwise.")
        return replace(j, verdict=measured, completion=replace(j.completion, seconds=9.0))

    elsewhere = summarise([slower(j) for j in answered()], EvaluationSettings(samples=2, seed=3, **FEW), {}, ["Other."])
    assert elsewhere["tuned"]["held_out"]["fast_1"] != report["tuned"]["held_out"]["fast_1"]
    assert scores_hash(elsewhere) == scores_hash(report)
    assert scores_hash(change(lambda r: r["problems"].reverse(), report)) == scores_hash(report)


@pytest.mark.parametrize(
    "found_otherwise",
    [
        lambda r: r["problems"][1]["tuned"][1].update(verdict="timeout"),
        lambda r: r["problems"][1]["tuned"][1].update(correctness=False),
        lambda r: r["problems"][1]["tuned"].pop(),
        lambda r: r["problems"].pop(),
        lambda r: r["problems"][1].update(split="touched"),
        lambda r: r["problems"][1].update(key="another"),
        lambda r: r["unusable"].append({"key": "broken", "place": "here", "kind": "invalid", "reason": "It is."}),
        lambda r: r.pop("tuned"),
        lambda r: r.update(schema_version=3),
    ],
)
def test_another_finding_has_another_hash(report: dict[str, Any], found_otherwise: Any) -> None:
    assert scores_hash(change(found_otherwise, report)) != scores_hash(report)
