"""The evaluation itself: ask the base and the tuned model for every problem, let the judge decide, hand on to be summed
up.

Knows nothing of Dagster, of training, or of how a report is drawn. Whether a kernel is any good is the judge's word
alone; this room counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from triton_sft_pipeline.chat.prompt import parse_answer, user_message
from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.evaluation.generation import Completion, generate
from triton_sft_pipeline.evaluation.scores import UNPARSED
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline.evaluation.summary import SPLITS, JudgedAnswer, Question, summarise
from triton_sft_pipeline.files import hash_json
from triton_sft_pipeline.problems import Problem
from triton_sft_pipeline.verification.verdict import JudgeItem, Verdict


class Judge(Protocol):
    """What is asked of a judge; `verification.KernelJudge` is one."""

    def verify_many(self, items: Iterable[JudgeItem]) -> Iterator[Verdict]:
        """One verdict an item, in any order, under the item's key."""
        ...


def evaluate(
    model: Any,
    tokenizer: Any,
    splits: Mapping[str, Sequence[Problem]],
    settings: EvaluationSettings,
    *,
    judge: Judge,
    out_dir: Path,
    provenance: Mapping[str, Any],
    has_adapter: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate the base model and, with an adapter, the tuned one on the same problems.

    `generations.jsonl` and `verdicts.jsonl` grow in `out_dir` line by line; the report is returned, and `write_report`
    writes it.

    Args:
        model: the loaded model, with the adapter when `has_adapter`.
        tokenizer: its tokenizer.
        splits: "seen" (problems of the train split), "test" and "held_out"; a missing one is empty. Of the seen ones
            at most `settings.max_seen` are asked.
        judge: decides about kernels; the caller opens and closes it.
        out_dir: a directory for the two files; it is made when missing.
        provenance: anything that says where model and problems come from; kept as it is. Its "notes", a list of
            sentences, become notes of the report.
        has_adapter: without one there is no "tuned" in the report, and no comparison.
        progress: called with (steps done, steps in all); an answer is two steps, one to generate it and one to judge
            it.

    Returns:
        The report as `summary.summarise` describes it: `report["base"]["held_out"]["verified"]` and so on.

    Raises:
        PipelineError: no problems at all, or a split of another name.
        StepError: the judge left an answer without a verdict.
    """
    questions, notes = _questions(splits, settings)
    models = ("base", "tuned") if has_adapter else ("base",)
    advance = _counter(2 * len(models) * len(questions) * settings.samples, progress)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)

    completions: dict[str, list[Completion]] = {}
    with _json_lines(out_dir / "generations.jsonl") as write:
        for name in models:
            completions[name] = _ask(model, tokenizer, name, questions, settings, write, advance)
    with _json_lines(out_dir / "verdicts.jsonl") as write:
        judged = _judge_all(judge, questions, completions, write, advance)
    return summarise(judged, settings, provenance, notes)


def sample_seen(problems: Sequence[Problem], most: int) -> list[Problem]:
    """At most `most` of the problems, in their order. A hash of each decides, so one more problem changes little."""
    if len(problems) <= most:
        return list(problems)
    hashes = {i: hash_json([problem.key, problem.pytorch_code]) for i, problem in enumerate(problems)}
    return [problems[i] for i in sorted(sorted(hashes, key=hashes.__getitem__)[:most])]


def _questions(
    splits: Mapping[str, Sequence[Problem]], settings: EvaluationSettings
) -> tuple[list[Question], list[str]]:
    """Everything that is asked, split by split, and a note when not all seen problems are."""
    if unknown := sorted(set(splits) - set(SPLITS)):
        raise PipelineError(f"unknown split {unknown[0]!r}: an evaluation has {', '.join(SPLITS)}")
    chosen = {split: list(splits.get(split, ())) for split in SPLITS}
    everything, chosen["seen"] = len(chosen["seen"]), sample_seen(chosen["seen"], settings.max_seen)
    questions = [Question(split, problem) for split in SPLITS for problem in chosen[split]]
    if not questions:
        raise PipelineError("there are no problems to evaluate on: give a folder or a file of problems")
    if (asked := len(chosen["seen"])) < everything:
        return questions, [f"Of {everything} seen problems {asked} were asked, chosen by a hash of each (max_seen)."]
    return questions, []


def _ask(
    model: Any,
    tokenizer: Any,
    name: str,
    questions: list[Question],
    settings: EvaluationSettings,
    write: Callable[[dict[str, Any]], None],
    advance: Callable[[], None],
) -> list[Completion]:
    """All answers of one model, each on disk the moment it exists."""

    def keep(completion: Completion) -> None:
        question = questions[completion.index]
        row = completion.to_dict()
        del row["index"]
        write({"model": name, "split": question.split, "key": question.problem.key, **row})
        advance()

    prompts = [user_message(question.problem.pytorch_code) for question in questions]
    return generate(model, tokenizer, prompts, settings, adapter_enabled=name == "tuned", on_completion=keep)


def _judge_all(
    judge: Judge,
    questions: list[Question],
    completions: Mapping[str, list[Completion]],
    write: Callable[[dict[str, Any]], None],
    advance: Callable[[], None],
) -> list[JudgedAnswer]:
    """Judge the answers of all models in one go, so that no worker of the judge waits; in the order of the answers."""
    answers = {
        f"{name}-{completion.index}-{completion.sample}": (name, completion, parse_answer(completion.text))
        for name, several in completions.items()
        for completion in several
    }
    found: dict[str, JudgedAnswer] = {}

    def keep(verdict: Verdict) -> None:
        name, completion, answer = answers[verdict.key]
        question = questions[completion.index]
        named = replace(verdict, key=question.problem.key)
        found[verdict.key] = JudgedAnswer(name, question, completion, answer, named)
        write({"model": name, "split": question.split, "sample": completion.sample, **named.to_dict()})
        advance()

    items = []
    for key, (_, completion, answer) in answers.items():
        if answer.code is None:
            keep(_unparsed(key, completion))
        else:
            items.append(JudgeItem(key, questions[completion.index].problem.pytorch_code, answer.code))
    for verdict in judge.verify_many(items):
        keep(verdict)
    if missing := [key for key in answers if key not in found]:
        first = questions[answers[missing[0]][1].index].problem.key
        raise StepError(
            f"the judge gave no verdict on {len(missing)} answers, the first to problem {first}: run it again"
        )
    return [found[key] for key in answers]


def _unparsed(key: str, completion: Completion) -> Verdict:
    """The verdict on an answer in which there is no code to judge."""
    if not completion.text.replace("<think>", "", 1).strip():
        detail = "The answer is empty."
    elif completion.stopped == "length":
        detail = (
            f"The answer was cut at {completion.tokens} tokens before any kernel: if it was still reasoning, raise "
            "evaluation.max_new_tokens."
        )
    else:
        detail = "The answer ended without a <triton> block or a code fence."
    # No judge was asked, so the verdict names no device, no backend and no isolation.
    return Verdict(
        key=key,
        verdict=UNPARSED,
        correctness=False,
        fast_0=False,
        device="",
        backend="",
        isolation="",
        detail=detail,
    )


def _counter(total: int, progress: Callable[[int, int], None] | None) -> Callable[[], None]:
    """A function that counts one step further towards `total` and tells `progress`."""
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    return advance


@contextmanager
def _json_lines(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A writer of JSON lines, each of which is on disk when the call returns."""
    with path.open("w", encoding="utf-8", errors="backslashreplace") as stream:

        def write(row: dict[str, Any]) -> None:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()

        yield write
