"""A run that was killed, goes on, and ends where an uninterrupted one ends; what was done is not done again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.evaluation import Completion, EvaluationSettings, LocalAsker, Request, evaluate
from triton_sft_pipeline.verification.verdict import JudgeItem, Verdict
from triton_sft_pipeline_tests.evaluation.conftest import SPLITS, problem, written
from triton_sft_pipeline_tests.evaluation.models import RecordingJudge, byte_tokenizer, micro_afmoe

SAMPLED = EvaluationSettings(samples=2, temperature=0.9, max_new_tokens=24, batch_size=3)
ROWS = 2 * 6 * 2


def tuned_micro_afmoe(tokenizer: Any) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    small = micro_afmoe(tokenizer, num_hidden_layers=2, num_experts=2)
    model = get_peft_model(small, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def evaluate_micro(directory: Path) -> dict[str, Any]:
    """An evaluation with a real network, its adapter on and off; also what the killed process runs."""
    tokenizer = byte_tokenizer()
    asker = LocalAsker(tuned_micro_afmoe(tokenizer), tokenizer, SAMPLED, has_adapter=True)
    return evaluate(asker, SPLITS, SAMPLED, judge=RecordingJudge(), out_dir=directory, provenance={})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def answers_in(directory: Path) -> set[tuple[Any, ...]]:
    rows = lines(directory / "generations.jsonl")
    names = ("model", "split", "key", "sample", "text", "tokens", "stopped")
    return {tuple(row[name] for name in names) for row in rows}


def verdicts_in(directory: Path) -> set[tuple[Any, ...]]:
    names = ("model", "split", "key", "sample", "judged", "verdict", "detail")
    return {tuple(row[name] for name in names) for row in lines(directory / "verdicts.jsonl")}


def wait_for_rows(path: Path, rows: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= rows:
            return
        time.sleep(0.005)
    raise AssertionError(f"it ended before it was killed: {process.stderr.read() if process.stderr else ''}")


@pytest.mark.slow
def test_a_run_killed_in_the_middle_ends_with_the_answers_of_an_uninterrupted_one(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    code = f"from {__name__} import *; evaluate_micro(Path({str(killed)!r}))"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        wait_for_rows(killed / "generations.jsonl", 4, process)
        process.kill()
    left = (killed / "generations.jsonl").read_bytes().count(b"\n")
    assert 4 <= left < ROWS, "killed in the middle"
    with (killed / "generations.jsonl").open("a") as stream:
        stream.write('{"model": "tuned", "spl')

    resumed, uninterrupted = evaluate_micro(killed), evaluate_micro(whole)
    assert answers_in(killed) == answers_in(whole) and len(answers_in(whole)) == ROWS
    assert len(lines(killed / "generations.jsonl")) == ROWS, "nothing twice"
    assert verdicts_in(killed) == verdicts_in(whole) and len(lines(killed / "verdicts.jsonl")) == ROWS
    assert resumed["problems"] == uninterrupted["problems"]
    assert (killed / "run.json").read_text() == (whole / "run.json").read_text()


class FakeAsker:
    """Answers with what it is told, and dies after so many answers.

    Attributes:
        asked: (model, key of the prompt's problem, sample) of every request.
    """

    def __init__(self, text: Callable[[str, Request], str], dies_after: int | None = None, **facts: Any) -> None:
        self.models = ("base", "tuned")
        self._text, self._dies_after, self._facts = text, dies_after, facts
        self.asked: list[tuple[str, Request]] = []

    def facts(self) -> dict[str, Any]:
        return {"name": "fake", **self._facts}

    def ask(
        self,
        model: str,
        requests: Sequence[Request],
        on_completion: Callable[[Completion], None],
        on_tokens: Any = None,
    ) -> None:
        for request in requests:
            if self._dies_after is not None and len(self.asked) == self._dies_after:
                raise StepError("the server went away")
            self.asked.append((model, request))
            text = self._text(model, request)
            on_completion(Completion(request.index, request.sample, text, 5, len(text), "stop", 0.01))


def kernel(model: str, request: Request) -> str:
    return written(f"def {model}_{request.sample}(): pass")


def answered(
    directory: Path, asker: Any = None, judge: Any = None, splits: Any = None, steps: Any = None, **settings: Any
) -> dict[str, Any]:
    return evaluate(
        asker or FakeAsker(kernel),
        SPLITS if splits is None else splits,
        EvaluationSettings(**settings),
        judge=judge or RecordingJudge(),
        out_dir=directory,
        provenance={},
        progress=None if steps is None else lambda done, total, note="": steps.append((done, total)),
    )


def test_an_asker_that_dies_is_asked_for_the_rest_alone(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="went away"):
        answered(tmp_path, FakeAsker(kernel, dies_after=8), samples=2)
    assert len(lines(tmp_path / "generations.jsonl")) == 8
    second, steps = FakeAsker(kernel), []
    answered(tmp_path, second, steps=steps, samples=2)
    assert len(second.asked) == 24 - 8
    assert steps[0] == (8, 48) and steps[-1] == (48, 48), "what the first one did counts as done"
    assert len({(model, request.index, request.sample) for model, request in second.asked}) == 16


def test_a_run_that_was_done_asks_nobody_and_judges_nothing_again(tmp_path: Path) -> None:
    first = answered(tmp_path)
    asker, judge, steps = FakeAsker(kernel), RecordingJudge(), []
    again = answered(tmp_path, asker, judge, steps=steps)
    assert asker.asked == [] and judge.items == []
    assert again == first and steps == [(24, 24)]


def test_what_was_there_is_told_once_and_after_it_is_known_to_be_the_same(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    def run(asker: Any) -> None:
        evaluate(
            asker,
            SPLITS,
            EvaluationSettings(),
            judge=RecordingJudge(),
            out_dir=tmp_path,
            provenance={},
            on_going_on=lambda there, asked: told.append((there, asked)),
        )

    with pytest.raises(StepError, match="went away"):
        run(FakeAsker(kernel, dies_after=5))
    assert told == [], "there was nothing"
    with pytest.raises(PipelineError, match="asker"):
        run(FakeAsker(kernel, weights="other"))
    assert told == []
    run(FakeAsker(kernel))
    assert told == [(5, 12)]


def test_verdicts_are_gone_on_with_and_the_judges_own_failures_are_judged_again(tmp_path: Path) -> None:
    class Dying(RecordingJudge):
        def verify_many(self, items: Iterable[JudgeItem]) -> Iterator[Verdict]:
            for n, verdict in enumerate(super().verify_many(items)):
                if n == 5:
                    raise StepError("the judge died")
                yield verdict

    with pytest.raises(StepError, match="judge died"):
        answered(tmp_path, judge=Dying({"def tuned_1": "infra_error"}), samples=2)
    kept = lines(tmp_path / "verdicts.jsonl")
    failed = sum(row["verdict"] == "infra_error" for row in kept)
    assert (len(kept), failed) == (5, 3)
    judge = RecordingJudge()
    report = answered(tmp_path, judge=judge, samples=2)
    assert len(judge.items) == 24 - 5 + failed
    assert report["tuned"]["held_out"]["unjudged"] == 0


def test_a_verdict_belongs_to_the_code_it_was_found_on(tmp_path: Path) -> None:
    answered(tmp_path)
    path = tmp_path / "generations.jsonl"
    path.write_text(path.read_text().replace("tuned_0", "another_kernel", 1))
    judge = RecordingJudge()
    answered(tmp_path, judge=judge)
    assert [item.triton_code for item in judge.items] == ["def another_kernel(): pass"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_new_tokens": 7}, r"settings\.max_new_tokens was 2048, is 7"),
        ({"samples": 2}, r"settings\.samples was 1, is 2; settings\.temperature was 0\.0, is 0\.7"),
        ({"asker": FakeAsker(kernel, weights="cd")}, r'asker\.weights was "ab", is "cd"'),
        (
            {"splits": {"test": SPLITS["test"]}},
            r'questions\.held_out/held_a/\w+ was "asked", is not there.*; and 2 more',
        ),
    ],
)
def test_another_evaluation_in_the_same_place_is_refused_with_what_differs(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    answered(tmp_path, FakeAsker(kernel, weights="ab"))
    before = (tmp_path / "generations.jsonl").read_bytes()
    asker = change.setdefault("asker", FakeAsker(kernel, weights="ab"))
    with pytest.raises(PipelineError, match=said):
        answered(tmp_path, **change)
    assert asker.asked == [] and (tmp_path / "generations.jsonl").read_bytes() == before


def test_what_changes_no_answer_may_differ(tmp_path: Path) -> None:
    answered(tmp_path, FakeAsker(kernel, url="http://a", server={"version": "1"}))
    asker = FakeAsker(kernel, url="http://b", server={"version": "2"})
    answered(tmp_path, asker, batch_size=3, bootstrap_resamples=100, max_seen=3)
    assert asker.asked == []


def test_a_second_run_at_the_same_time_is_refused_before_it_asks(tmp_path: Path) -> None:
    second = FakeAsker(kernel)

    def starting_another(model: str, request: Request) -> str:
        with pytest.raises(PipelineError, match="another run is writing there"):
            answered(tmp_path, second)
        return kernel(model, request)

    answered(tmp_path, FakeAsker(starting_another))
    assert second.asked == [] and len(lines(tmp_path / "generations.jsonl")) == 12


def test_a_row_of_another_version_is_refused(tmp_path: Path) -> None:
    answered(tmp_path)
    with (tmp_path / "verdicts.jsonl").open("a") as stream:
        stream.write('{"key": "a"}\n')
    with pytest.raises(PipelineError, match=r"verdicts\.jsonl: a row is not one of this version's \(KeyError"):
        answered(tmp_path)


def test_answers_are_seeded_by_problem_and_sample_whoever_is_asked(tmp_path: Path) -> None:
    asker, alone = FakeAsker(kernel), FakeAsker(kernel)
    answered(tmp_path / "all", asker, samples=2)
    answered(tmp_path / "one", alone, splits={"held_out": [problem("held_b")]}, samples=2)
    seeds = {(model, request.prompt, request.sample): request.seed for model, request in asker.asked}
    assert len(set(seeds.values())) == 12, "base and tuned have the same"
    for model, request in alone.asked:
        assert seeds[model, request.prompt, request.sample] == request.seed
    other = FakeAsker(kernel)
    answered(tmp_path / "other", other, samples=2, seed=1)
    assert not {request.seed for _, request in other.asked} & set(seeds.values())
