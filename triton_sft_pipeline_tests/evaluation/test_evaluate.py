"""The evaluation with a scripted model and a recording judge: what is asked, what is judged, what is counted, what is
kept.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.evaluation import (
    Completion,
    EvaluationSettings,
    LocalAsker,
    Request,
    scores_hash,
    write_report,
)
from triton_sft_pipeline.evaluation import evaluate as public_evaluate
from triton_sft_pipeline.evaluation.evaluate import evaluate, sample_seen
from triton_sft_pipeline.problems import Problem
from triton_sft_pipeline.verification import KernelJudge
from triton_sft_pipeline.verification.verdict import JudgeItem, Verdict
from triton_sft_pipeline_tests.evaluation.conftest import ANSWERS, SPLITS, Evaluation, problem, run
from triton_sft_pipeline_tests.evaluation.models import RecordingJudge, ScriptedModel, byte_tokenizer

ADD = Problem(
    key="add",
    pytorch_code=(
        "import torch\nimport torch.nn as nn\n\n\nclass Model(nn.Module):\n    def forward(self, a, b):\n"
        "        return a + b\n\n\ndef get_inputs():\n    return [torch.randn(8, 8), torch.randn(8, 8)]\n\n\n"
        "def get_init_inputs():\n    return []\n"
    ),
    source="hand-written",
)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_every_model_and_split_has_its_own_count(evaluation: Evaluation) -> None:
    report = evaluation.report
    found = {
        (model, split): (report[model][split]["fast_0"]["count"], report[model][split]["n"])
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
    assert report["schema_version"] == 2
    assert report == json.loads(json.dumps(report)), "plain JSON data"


def test_models_are_compared_problem_by_problem(evaluation: Evaluation) -> None:
    held_out = evaluation.report["comparison"]["held_out"]
    expected = {"n": 3, "both": 0, "neither": 1, "wins": 1, "losses": 1, "p_value": 1.0}
    assert {name: held_out[name] for name in expected} == expected


def test_an_answer_without_code_is_unparsed_and_never_judged(evaluation: Evaluation) -> None:
    rows = {row["key"]: row for row in evaluation.report["problems"]}
    assert rows["seen_a"]["base"][0]["verdict"] == rows["seen_b"]["base"][0]["verdict"] == "unparsed"
    assert rows["seen_a"]["base"][0]["code"] is None
    assert "without a <triton> block" in rows["seen_a"]["base"][0]["detail"]
    assert rows["seen_b"]["base"][0]["detail"] == "The answer is empty."
    assert len(evaluation.judge.items) == 12 - 3
    assert all(item.triton_code for item in evaluation.judge.items)


def test_the_judge_gets_each_problem_with_the_code_of_its_answer(evaluation: Evaluation) -> None:
    assert len({item.key for item in evaluation.judge.items}) == 9
    codes = {(item.pytorch_code, item.triton_code) for item in evaluation.judge.items}
    assert (problem("seen_b").pytorch_code, "def right(): pass") in codes
    row = next(row for row in evaluation.report["problems"] if row["key"] == "test_a")
    assert (row["base"][0]["verdict"], row["tuned"][0]["verdict"]) == ("verified", "incorrect_shape")
    assert row["tuned"][0]["code"] == "wrong shape"
    assert row["tuned"][0]["answer"].startswith("<think>\nShort.\n</think>")


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
    # Between two of them it is told again how many tokens there are.
    assert list(dict.fromkeys(evaluation.steps)) == [(i, 24) for i in range(25)]
    assert evaluation.steps == sorted(evaluation.steps)


def test_a_problem_whose_reference_fails_is_named_and_stays_in_n(evaluation: Evaluation) -> None:
    cell = evaluation.report["tuned"]["held_out"]
    assert cell["unjudged"] == 1 and cell["n"] == 3
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
    assert report["base"]["seen"]["n"] == 0 and report["base"]["seen"]["fast_0"]["count"] == 0
    assert report["headline"] == "verified kernels: base 1/3 -> tuned 1/3 on held-out problems"
    assert "memorisation" not in " ".join(report["notes"])


def test_every_sample_of_a_problem_is_asked_judged_and_kept(tmp_path: Path) -> None:
    evaluation = run(tmp_path, splits={"test": SPLITS["test"]}, samples=3)
    row = evaluation.report["problems"][0]
    assert [(a["sample"], a["verdict"]) for a in row["tuned"]] == [(i, "incorrect_shape") for i in range(3)]
    assert evaluation.report["tuned"]["test"]["n"] == 1 and evaluation.report["tuned"]["test"]["answers"] == 3
    assert len(evaluation.judge.items) == 6
    assert "answered 3 times" in " ".join(evaluation.report["notes"])


def test_hybrid_kernels_are_verified_and_a_note_counts_them(tmp_path: Path) -> None:
    judge = RecordingJudge({"def right(): pass": "verified_hybrid"}, torch_share=0.2, speedup=1.5, speedup_low=0.9)
    report = run(tmp_path, judge=judge).report
    assert report["tuned"]["seen"]["fast_0"]["count"] == 2
    assert report["tuned"]["seen"]["verdicts"] == {"verified_hybrid": 2}
    note = "4 of the 9 verified kernels are hybrid: PyTorch operators did the lesser part of their work."
    assert any(n.startswith(note) for n in report["notes"])
    answer = report["problems"][0]["tuned"][0]
    assert (answer["torch_share"], answer["speedup"], answer["speedup_low"]) == (0.2, 1.5, 0.9)


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
    tokenizer, settings = byte_tokenizer(), EvaluationSettings(max_new_tokens=50)
    model = ScriptedModel(tokenizer, {("test_a", False): "on and on " * 20})
    report = evaluate(
        LocalAsker(model, tokenizer, settings, has_adapter=False),
        {"test": SPLITS["test"]},
        settings,
        judge=RecordingJudge(),
        out_dir=tmp_path,
        provenance={},
    )
    assert "cut at 50 tokens" in report["problems"][0]["base"][0]["detail"]
    assert "1 of 1 answers of the base model was cut at the limit of 50 tokens." in report["notes"]


def test_the_hash_of_the_scores_ignores_time_and_place_but_not_a_verdict(evaluation: Evaluation) -> None:
    changed = copy.deepcopy(evaluation.report)
    changed["generation"]["base"]["seconds"] = 1e6
    changed["judge"]["device"] = "elsewhere"
    changed["provenance"]["preset"] = "another"
    assert scores_hash(changed) == scores_hash(evaluation.report)
    changed["problems"][0]["tuned"][0]["verdict"] = "timeout"
    assert scores_hash(changed) != scores_hash(evaluation.report)


def test_a_judge_that_forgets_an_answer_is_found_out(tmp_path: Path) -> None:
    class Forgetful(RecordingJudge):
        def verify_many(self, items: Iterable[JudgeItem]) -> Iterator[Verdict]:
            yield from super().verify_many(list(items)[1:])

    with pytest.raises(StepError, match="no verdict on 1 answers, the first to problem test_a"):
        run(tmp_path, judge=Forgetful())


def test_an_asker_that_forgets_an_answer_is_found_out(tmp_path: Path) -> None:
    class Forgetful:
        models = ("base",)

        def facts(self) -> dict[str, Any]:
            return {}

        def ask(
            self,
            model: str,
            requests: Sequence[Request],
            on_completion: Callable[[Completion], None],
            on_tokens: Any = None,
        ) -> None:
            for request in requests[1:]:
                on_completion(Completion(request.index, request.sample, "", 1, 1, "eos", 0.1))

    with pytest.raises(StepError, match="the base model gave no answer to 1 requests, the first on problem seen_a"):
        evaluate(Forgetful(), SPLITS, EvaluationSettings(), judge=RecordingJudge(), out_dir=tmp_path, provenance={})


def test_touched_and_unusable_problems_are_reported_apart(tmp_path: Path) -> None:
    tokenizer, settings = byte_tokenizer(), EvaluationSettings(max_new_tokens=400)
    report = evaluate(
        LocalAsker(ScriptedModel(tokenizer, ANSWERS), tokenizer, settings, has_adapter=True),
        {"held_out": SPLITS["held_out"], "touched": [problem("test_a")], "test": [problem("seen_a")]},
        settings,
        judge=RecordingJudge(),
        out_dir=tmp_path,
        provenance={},
        unusable=[SimpleNamespace(key="x", place="x.py", kind="invalid", reason="It has no get_inputs.")],
        touched={"held_b": "It is the training problem relu.", "test_a": "It is like relu.", "seen_a": "Not asked so."},
    )
    rows = {row["key"]: (row["split"], row["touched"]) for row in report["problems"]}
    assert rows["held_a"] == ("held_out", None)
    assert rows["held_b"] == ("touched", "It is the training problem relu.")
    assert rows["test_a"] == ("touched", "It is like relu.")
    assert rows["seen_a"][0] == "test", "only held-out problems are moved"
    assert (report["tuned"]["held_out"]["n"], report["tuned"]["touched"]["n"]) == (2, 2)
    assert [problem["key"] for problem in report["unusable"]] == ["x"]


def test_a_seen_problem_that_shares_its_key_with_a_touched_one_is_not_touched(tmp_path: Path) -> None:
    tokenizer, settings = byte_tokenizer(), EvaluationSettings(max_new_tokens=400)
    report = evaluate(
        LocalAsker(ScriptedModel(tokenizer, ANSWERS), tokenizer, settings, has_adapter=True),
        {"seen": [problem("held_b")], "test": [problem("held_a")], "held_out": SPLITS["held_out"]},
        settings,
        judge=RecordingJudge(),
        out_dir=tmp_path,
        provenance={},
        touched={"held_a": "It is like relu.", "held_b": "It is the training problem relu."},
    )
    assert [(row["split"], row["key"], row["touched"]) for row in report["problems"]] == [
        ("seen", "held_b", None),
        ("test", "held_a", None),
        ("held_out", "held_c", None),
        ("touched", "held_a", "It is like relu."),
        ("touched", "held_b", "It is the training problem relu."),
    ]


def test_two_problems_of_one_key_are_two_questions_and_one_listed_twice_is_one(tmp_path: Path) -> None:
    other = Problem(key="held_a", pytorch_code=problem("held_b").pytorch_code, source="elsewhere")
    evaluation = run(tmp_path, splits={"held_out": [problem("held_a"), other, problem("held_a")]})
    assert evaluation.report["base"]["held_out"]["n"] == 2
    assert [row["base"][0]["verdict"] for row in evaluation.report["problems"]] == ["verified", "unparsed"]
    again = run(tmp_path, splits={"held_out": [problem("held_a"), other, problem("held_a")]})
    assert again.model.asked == [] and again.report["problems"] == evaluation.report["problems"]


RUBBISH = {
    "empty": "",
    "only white space": "<think>\n \n\t\n",
    "repetition": "<think>\n" + "and then and then " * 5600,
    "repeated tags": "<triton>" * 12_000,
    "repeated fences": "```python\n" * 10_000,
    "repeated code": "</think><triton>\n" + "x = x + 1\n" * 10_000 + "</triton>",
    "deep code": "</think><triton>\n" + "(" * 100_000 + "\n</triton>",
    "NUL bytes": "</think><triton>\nimport triton\x00\n\x00\x01\x02\n</triton>",
    "lone surrogates": "</think><triton>\nx = '\ud800\udfff\ud83d'\n</triton>",
    "replacement characters": "</think><triton>\n" + "\ufffd" * 1000 + "</triton>",
    "control characters": "".join(map(chr, range(32))) + "\x7f\u202e\u2028",
}


class Rubbish:
    """Answers each request with the next piece of rubbish."""

    models = ("base",)

    def facts(self) -> dict[str, Any]:
        return {}

    def ask(
        self,
        model: str,
        requests: Sequence[Request],
        on_completion: Callable[[Completion], None],
        on_tokens: Any = None,
    ) -> None:
        for request, text in zip(requests, RUBBISH.values(), strict=True):
            on_completion(Completion(request.index, request.sample, text, 5, 100, "eos", 0.1))


def test_rubbish_gets_verdicts_from_the_real_judge_and_a_report_that_can_be_written(tmp_path: Path) -> None:
    settings = EvaluationSettings(samples=len(RUBBISH))
    with KernelJudge(device="cpu", workers=2, trials=1) as judge:
        report = evaluate(
            Rubbish(), {"held_out": [ADD]}, settings, judge=judge, out_dir=tmp_path / "out", provenance={}
        )
    verdicts = dict(zip(RUBBISH, report["problems"][0]["base"], strict=True))
    assert {name: answer["verdict"] for name, answer in verdicts.items()} == {
        "empty": "unparsed",
        "only white space": "unparsed",
        "repetition": "unparsed",
        "repeated tags": "syntax_error",
        "repeated fences": "unparsed",
        "repeated code": "missing_wrapper",
        "deep code": "syntax_error",
        "NUL bytes": "syntax_error",
        "lone surrogates": "syntax_error",
        "replacement characters": "syntax_error",
        "control characters": "unparsed",
    }
    assert all(answer["detail"] for answer in verdicts.values())
    kept = [row["text"] for row in lines(tmp_path / "out" / "generations.jsonl")]
    assert kept == [text.replace("\ud800\udfff", "\U000103ff") for text in RUBBISH.values()]
    write_report(report, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    nobody = RecordingJudge()
    nobody.backend = "interpreter"
    again = evaluate(Rubbish(), {"held_out": [ADD]}, settings, judge=nobody, out_dir=tmp_path / "out", provenance={})
    assert nobody.items == [] and again["problems"] == report["problems"], "every verdict is found again"


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
