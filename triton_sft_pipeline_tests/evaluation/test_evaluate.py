"""The evaluation with a scripted model and a recording judge: what is asked, what is judged, what is counted, what is
kept.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.evaluation import evaluate as public_evaluate
from triton_sft_pipeline.evaluation import scores_hash
from triton_sft_pipeline.evaluation.evaluate import evaluate, sample_seen
from triton_sft_pipeline.verification.verdict import JudgeItem, Verdict
from triton_sft_pipeline_tests.evaluation.conftest import SPLITS, Evaluation, problem, run
from triton_sft_pipeline_tests.evaluation.models import RecordingJudge


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_model_and_split_has_its_own_count(evaluation: Evaluation) -> None:
    report = evaluation.report
    found = {
        (model, split): (report[model][split]["verified"], report[model][split]["n"])
        for model in ("base", "tuned")
        for split in ("seen", "test", "held_out")
    }
    assert found == {
        ("base", "seen"): (0, 2),
        ("base", "test"): (1, 1),
        ("base", "held_out"): (1, 3),
        ("tuned", "seen"): (2, 2),
        ("tuned", "test"): (0, 1),
        ("tuned", "held_out"): (1, 3),
    }
    assert report["headline"] == (
        "verified kernels: base 0/2 -> tuned 2/2 on seen problems; "
        "1/1 -> 0/1 on test problems; 1/3 -> 1/3 on held-out problems"
    )
    assert report["schema_version"] == 1
    assert report == json.loads(json.dumps(report)), "plain JSON data"


def test_models_are_compared_problem_by_problem(evaluation: Evaluation) -> None:
    held_out = evaluation.report["comparison"]["held_out"]
    assert held_out == {"n": 3, "both": 0, "neither": 1, "wins": 1, "losses": 1, "p_value": 1.0}


def test_an_answer_without_code_is_unparsed_and_never_judged(evaluation: Evaluation) -> None:
    rows = {row["key"]: row for row in evaluation.report["problems"]}
    assert rows["seen_a"]["base"]["verdict"] == rows["seen_b"]["base"]["verdict"] == "unparsed"
    assert rows["seen_a"]["base"]["code"] is None
    assert "without a <triton> block" in rows["seen_a"]["base"]["detail"]
    assert rows["seen_b"]["base"]["detail"] == "The answer is empty."
    assert len(evaluation.judge.items) == 12 - 3
    assert all(item.triton_code for item in evaluation.judge.items)


def test_the_judge_gets_each_problem_with_the_code_of_its_answer(evaluation: Evaluation) -> None:
    assert len({item.key for item in evaluation.judge.items}) == 9
    codes = {(item.pytorch_code, item.triton_code) for item in evaluation.judge.items}
    assert (problem("seen_b").pytorch_code, "def right(): pass") in codes
    row = next(row for row in evaluation.report["problems"] if row["key"] == "test_a")
    assert (row["base"]["verdict"], row["tuned"]["verdict"]) == ("verified", "incorrect_shape")
    assert row["tuned"]["code"] == "wrong shape"
    assert row["tuned"]["answer"].startswith("<think>\nShort.\n</think>")


def test_the_base_is_asked_with_the_adapter_off_and_both_are_asked_the_same(evaluation: Evaluation) -> None:
    assert evaluation.model.asked == [(6, False), (6, True)]
    assert evaluation.model.training, "the model is in the mode it was in"


def test_generations_and_verdicts_are_on_disk_line_by_line(evaluation: Evaluation) -> None:
    generations = lines(evaluation.directory / "generations.jsonl")
    assert {(g["model"], g["split"], g["key"], g["sample"]) for g in generations} == {
        (model, split, p.key, 0) for model in ("base", "tuned") for split, several in SPLITS.items() for p in several
    }
    assert all(
        g["tokens"] > 0 and g["stopped"] in ("stop", "eos") and g["text"].startswith("<think>") for g in generations
    )
    verdicts = lines(evaluation.directory / "verdicts.jsonl")
    assert len(verdicts) == 12
    assert Verdict.from_dict(verdicts[-1]).key in {p.key for several in SPLITS.values() for p in several}


def test_progress_counts_answers_and_verdicts(evaluation: Evaluation) -> None:
    assert evaluation.steps == [(i, 24) for i in range(1, 25)]


def test_a_problem_whose_reference_fails_is_named_and_stays_in_n(evaluation: Evaluation) -> None:
    cell = evaluation.report["tuned"]["held_out"]
    assert cell["unjudged"] == 1 and cell["n"] == 3 and cell["compiled"]["n"] == 2
    named = [note for note in evaluation.report["notes"] if "held_c" in note]
    assert len(named) == 1 and "reference_error" in named[0]


def test_the_notes_say_what_the_numbers_do_not_show(evaluation: Evaluation) -> None:
    notes = " ".join(evaluation.report["notes"])
    assert "memorisation check" in notes
    assert "CPU interpreter" in notes and "TF32" in notes
    assert "The base had read the fragments." in notes
    assert evaluation.report["provenance"]["adapter"] == {"hash": "ab" * 32}
    assert evaluation.report["judge"]["backend"] == "interpreter"


def test_without_an_adapter_there_is_only_the_base(tmp_path: Path) -> None:
    report = run(tmp_path, has_adapter=False).report
    assert "tuned" not in report and report["comparison"] == {}
    assert report["headline"].startswith("verified kernels: base 0/2 on seen problems; 1/1 on test problems")
    assert all("tuned" not in row for row in report["problems"])


def test_a_missing_split_has_no_problems_and_no_clause(tmp_path: Path) -> None:
    report = run(tmp_path, splits={"held_out": SPLITS["held_out"]}).report
    assert report["base"]["seen"]["n"] == 0 and report["base"]["seen"]["verified"] == 0
    assert report["headline"] == "verified kernels: base 1/3 -> tuned 1/3 on held-out problems"
    assert "memorisation" not in " ".join(report["notes"])


def test_scores_count_the_first_answer_and_keep_the_verdict_of_each(tmp_path: Path) -> None:
    report = run(tmp_path, splits={"test": SPLITS["test"]}, samples=3).report
    assert report["tuned"]["test"]["n"] == 1
    assert report["problems"][0]["tuned"]["all_verdicts"] == ["incorrect_shape"] * 3
    assert "answered 3 times" in " ".join(report["notes"])


def test_hybrid_kernels_are_verified_and_a_note_counts_them(tmp_path: Path) -> None:
    judge = RecordingJudge({"def right(): pass": "verified_hybrid"}, torch_share=0.2, speedup=1.5, speedup_low=0.9)
    report = run(tmp_path, judge=judge).report
    assert report["tuned"]["seen"]["verified"] == 2
    assert report["tuned"]["seen"]["verdicts"] == {"verified_hybrid": 2}
    note = "4 of the 9 verified kernels are hybrid: PyTorch operators did the lesser part of their work."
    assert any(n.startswith(note) for n in report["notes"])
    answer = report["problems"][0]["tuned"]
    assert (answer["torch_share"], answer["speedup"], answer["speedup_low"]) == (0.2, 1.5, 0.9)
    assert answer["correct_answers"] == 1


def test_without_hybrid_kernels_there_is_no_note_of_them(evaluation: Evaluation) -> None:
    assert "hybrid" not in " ".join(evaluation.report["notes"])


def test_fast_is_what_the_judge_calls_fast_whatever_the_point_estimate(tmp_path: Path) -> None:
    judge = RecordingJudge(speedup=2.5, speedup_low=0.9, fast_1=False, fast_2=False)
    cell = run(tmp_path, splits={"test": SPLITS["test"]}, judge=judge).report["base"]["test"]
    assert (cell["fast_1"]["count"], cell["fast_2"]["count"]) == (0, 0)


def test_seen_problems_are_sampled_by_hash_and_the_report_says_so(tmp_path: Path) -> None:
    many = [problem(f"p{i:03}") for i in range(100)]
    chosen = sample_seen(many, 10)
    assert len(chosen) == 10 and chosen == sorted(chosen, key=lambda p: p.key)
    assert set(chosen) == set(sample_seen(many[::-1], 10))
    assert len(set(chosen) & set(sample_seen(many[:99], 10))) >= 9, "one problem less changes one choice at most"
    report = run(tmp_path, splits={"seen": SPLITS["seen"]}, max_seen=1).report
    assert report["base"]["seen"]["n"] == 1
    assert any("Of 2 seen problems 1 were asked" in note for note in report["notes"])


def test_a_cut_answer_is_counted_and_explained(tmp_path: Path) -> None:
    from triton_sft_pipeline.evaluation import EvaluationSettings
    from triton_sft_pipeline_tests.evaluation.models import ScriptedModel, byte_tokenizer

    tokenizer = byte_tokenizer()
    report = evaluate(
        ScriptedModel(tokenizer, {("test_a", False): "on and on " * 20}),
        tokenizer,
        {"test": SPLITS["test"]},
        EvaluationSettings(max_new_tokens=50),
        judge=RecordingJudge(),
        out_dir=tmp_path,
        provenance={},
        has_adapter=False,
    )
    assert "cut at 50 tokens" in report["problems"][0]["base"]["detail"]
    assert "1 of 1 answers of the base model were cut at the limit of 50 tokens." in report["notes"]


def test_the_hash_of_the_scores_ignores_time_and_place_but_not_a_verdict(evaluation: Evaluation) -> None:
    changed = copy.deepcopy(evaluation.report)
    changed["generation"]["base"]["seconds"] = 1e6
    changed["judge"]["device"] = "elsewhere"
    changed["provenance"]["preset"] = "another"
    assert scores_hash(changed) == scores_hash(evaluation.report)
    changed["problems"][0]["tuned"]["all_verdicts"] = ["timeout"]
    assert scores_hash(changed) != scores_hash(evaluation.report)


def test_a_judge_that_forgets_an_answer_is_found_out(tmp_path: Path) -> None:
    class Forgetful(RecordingJudge):
        def verify_many(self, items: Iterable[JudgeItem]) -> Iterator[Verdict]:
            yield from super().verify_many(list(items)[1:])

    from triton_sft_pipeline.evaluation import EvaluationSettings
    from triton_sft_pipeline_tests.evaluation.conftest import ANSWERS
    from triton_sft_pipeline_tests.evaluation.models import ScriptedModel, byte_tokenizer

    tokenizer = byte_tokenizer()
    with pytest.raises(StepError, match="no verdict on 1 answers, the first to problem test_a"):
        evaluate(
            ScriptedModel(tokenizer, ANSWERS),
            tokenizer,
            SPLITS,
            EvaluationSettings(),
            judge=Forgetful(),
            out_dir=tmp_path,
            provenance={},
        )


@pytest.mark.parametrize(("splits", "message"), [({}, "no problems"), ({"train": []}, "unknown split 'train'")])
def test_a_request_that_cannot_be_met_is_refused_before_anything_is_written(
    tmp_path: Path, splits: Any, message: str
) -> None:
    with pytest.raises(PipelineError, match=message):
        run(tmp_path / "out", splits=splits)
    assert not (tmp_path / "out").exists()


def test_the_room_is_imported_without_heavy_libraries() -> None:
    heavy = ("torch", "transformers", "peft", "matplotlib", "pandas", "pyarrow")
    code = (
        "import sys; from triton_sft_pipeline.evaluation import EvaluationSettings, evaluate, generate, write_report;"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
    assert public_evaluate is evaluate
