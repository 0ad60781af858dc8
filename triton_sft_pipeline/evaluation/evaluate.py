"""The evaluation itself: ask the base and the tuned model for every problem, let the judge decide, hand on to be summed
up.

Knows nothing of Dagster, of training, or of how a report is drawn. Whether a kernel is any good is the judge's word
alone; this room counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from triton_sft_pipeline.chat.prompt import PROMPT_VERSION, parse_answer, user_message
from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.evaluation.generation import Asker, Completion, Request
from triton_sft_pipeline.evaluation.journal import Journal, open_run, rows_of_same_run
from triton_sft_pipeline.evaluation.judged import JudgedAnswer, Question
from triton_sft_pipeline.evaluation.meter import Meter
from triton_sft_pipeline.evaluation.sampling import request_seed
from triton_sft_pipeline.evaluation.scores import UNPARSED
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline.evaluation.summary import SPLITS, summarise
from triton_sft_pipeline.files import hash_json
from triton_sft_pipeline.problems import Problem
from triton_sft_pipeline.progress import Progress
from triton_sft_pipeline.verification import JUDGE_VERSION
from triton_sft_pipeline.verification.verdict import JudgeItem, Verdict

if TYPE_CHECKING:
    from triton_sft_pipeline.problems import Unusable

_INCIDENTAL_SETTINGS = {"batch_size", "bootstrap_resamples", "levels", "max_seen"}
"""Settings that change no single answer and no verdict; which problems are asked stands in `run.json` by itself."""
_INCIDENTAL_FACTS = {
    *("batch_size", "concurrency", "created", "device", "left_out"),
    *("software", "url", "version", "versions"),
}
"""What an asker says of itself, at any depth, that may change between a killed run and the one that goes on."""


Place = tuple[str, int, int]
"""Model, position of the question, sample: which answer is meant."""


class Judge(Protocol):
    """What is asked of a judge; `verification.KernelJudge` is one."""

    def verify_many(self, items: Iterable[JudgeItem]) -> Iterator[Verdict]:
        """One verdict an item, in any order, under the item's key."""
        ...


def evaluate(
    asker: Asker,
    splits: Mapping[str, Sequence[Problem]],
    settings: EvaluationSettings,
    *,
    judge: Judge,
    out_dir: Path,
    provenance: Mapping[str, Any],
    unusable: Sequence[Unusable] = (),
    touched: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    on_going_on: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate the base model and, with an adapter, the tuned one on the same problems.

    `generations.jsonl` and `verdicts.jsonl` grow in `out_dir` line by line. Started again with the same `out_dir` after
    it was killed, an evaluation goes on: what is on disk is neither asked nor judged again, except what the judge
    itself failed on. The report is returned, and `write_report` writes it.

    Args:
        asker: the models.
        splits: "seen" (problems of the train split), "test", "held_out" and "touched"; a missing one is empty. Of the
            seen ones at most `settings.max_seen` are asked.
        settings: how many answers, how they are sampled, and how they are judged.
        judge: decides about kernels; the caller opens and closes it.
        out_dir: a directory for the two files and `run.json`; it is made when missing.
        provenance: anything that says where model and problems come from; kept as it is, with what the asker says of
            itself under "asker". Its "notes", a list of sentences, become notes of the report.
        unusable: problems that could not be asked, for the report.
        touched: key -> the sentence that says which training problem a problem touches; a held-out one named there
            counts as "touched".
        progress: called with (steps done, steps in all, note); first with what earlier runs have done. An answer is two
            steps, one to generate it and one to judge it.
        on_going_on: called with (answers that earlier runs left, answers in all) when there are some and it is known
            that they are answers to the same.

    Returns:
        The report as `summary.summarise` describes it.

    Raises:
        PipelineError: no problems at all, a split of another name, or an `out_dir` in which something else was asked or
            another process is at work.
        StepError: an answer or a verdict is missing, or the disk is full.
    """
    questions, notes = _questions(splits, settings, touched or {})
    models = tuple(asker.models)
    with open_run(Path(out_dir), _identity(asker, questions, settings, judge)) as run:
        completions = _kept_completions(run.generations, questions)
        verdicts = _kept_verdicts(run.verdicts)
        wanted = [
            (name, index, sample)
            for name in models
            for index in range(len(questions))
            for sample in range(settings.samples)
        ]
        known = [place for place in wanted if place in completions]
        judged = [place for place in known if _judgement_key(place, questions, completions[place]) in verdicts]
        if known and on_going_on:
            on_going_on(len(known), len(wanted))
        meter = Meter(len(wanted), len(known), len(judged), settings.max_new_tokens, progress)
        for name in models:
            missing = [place for place in wanted if place[0] == name and place not in completions]
            completions |= _ask(asker, name, missing, questions, settings, run.generations, meter)
        answers = {place: completions[place] for place in wanted}
        meter.judging()
        found = _judge_all(judge, questions, answers, verdicts, run.verdicts, meter)
    about = {**provenance, "asker": asker.facts()}
    return summarise(found, settings, about, notes, unusable=unusable, touched=touched or {})


def answers_there(
    out_dir: Path,
    models: Sequence[str],
    splits: Mapping[str, Sequence[Problem]],
    settings: EvaluationSettings,
    touched: Mapping[str, str] | None = None,
) -> int:
    """How many answers an earlier run of the same evaluation left, as far as that can be told before any model is
    there: who answers and on what judge, `evaluate` itself compares.

    Args:
        out_dir, splits, settings, touched: as for `evaluate`.
        models: those that will be asked.

    Raises:
        PipelineError: something else was asked there.
    """
    return rows_of_same_run(out_dir, _asked(models, _questions(splits, settings, touched or {})[0], settings))


def sample_seen(problems: Sequence[Problem], most: int) -> list[Problem]:
    """At most `most` of the problems, in their order. A hash of each decides, so one more problem changes little."""
    if len(problems) <= most:
        return list(problems)
    hashes = {i: hash_json([problem.key, problem.pytorch_code]) for i, problem in enumerate(problems)}
    return [problems[i] for i in sorted(sorted(hashes, key=hashes.__getitem__)[:most])]


def _questions(
    splits: Mapping[str, Sequence[Problem]], settings: EvaluationSettings, touched: Mapping[str, str]
) -> tuple[list[Question], list[str]]:
    """Everything that is asked, split by split, and a note when not all seen problems are."""
    if unknown := sorted(set(splits) - set(SPLITS)):
        raise PipelineError(f"unknown split {unknown[0]!r}: an evaluation has {', '.join(SPLITS)}")
    chosen = {split: list(splits.get(split, ())) for split in SPLITS}
    chosen["touched"] += [problem for problem in chosen["held_out"] if problem.key in touched]
    chosen["held_out"] = [problem for problem in chosen["held_out"] if problem.key not in touched]
    everything, chosen["seen"] = len(chosen["seen"]), sample_seen(chosen["seen"], settings.max_seen)
    # The same code under the same key is one question, however often it is listed.
    named = {_place(split, problem): Question(split, problem) for split in SPLITS for problem in chosen[split]}
    if not named:
        raise PipelineError("there are no problems to evaluate on: give a folder or a file of problems")
    if (asked := len(chosen["seen"])) < everything:
        note = f"Of {everything} seen problems {asked} were asked, chosen by a hash of each (max_seen)."
        return list(named.values()), [note]
    return list(named.values()), []


def _identity(
    asker: Asker, questions: Sequence[Question], settings: EvaluationSettings, judge: Judge
) -> dict[str, Any]:
    """What is asked of whom, by which a run that goes on is known to be the same."""
    return {
        **_asked(asker.models, questions, settings),
        "asker": _lasting(asker.facts()),
        "judge": {"version": JUDGE_VERSION, "backend": getattr(judge, "backend", None)},
    }


def _asked(models: Sequence[str], questions: Sequence[Question], settings: EvaluationSettings) -> dict[str, Any]:
    """The part of the identity that is known before model and judge are there."""
    return {
        "models": list(models),
        "settings": {
            **{k: v for k, v in settings.model_dump(mode="json").items() if k not in _INCIDENTAL_SETTINGS},
            "temperature": settings.resolved_temperature,
        },
        "prompt_version": PROMPT_VERSION,
        "questions": {f"{q.split}/{q.problem.key}/{_place(q.split, q.problem)[2]}": "asked" for q in questions},
    }


def _lasting(facts: Any) -> Any:
    if not isinstance(facts, dict):
        return facts
    return {name: _lasting(value) for name, value in facts.items() if name not in _INCIDENTAL_FACTS}


def _place(split: str, problem: Problem) -> tuple[str, str, str]:
    """What a question is known by on disk. Keys alone may repeat among the problems of a dataset."""
    return split, problem.key, hash_json(problem.pytorch_code)[:16]


def _kept_completions(journal: Journal, questions: Sequence[Question]) -> dict[Place, Completion]:
    """What earlier runs generated."""
    indices = {_place(question.split, question.problem): index for index, question in enumerate(questions)}
    kept: dict[Place, Completion] = {}
    for row in journal.rows:
        with _rows_explained(journal):
            index = indices.get((row["split"], row["key"], row["problem"]))
            if index is not None:
                fields = ("text", "prompt_tokens", "tokens", "stopped", "seconds")
                completion = Completion(index, row["sample"], **{name: row[name] for name in fields})
                kept[row["model"], index, completion.sample] = completion
    return kept


def _kept_verdicts(journal: Journal) -> dict[tuple[str, ...], Verdict]:
    """What earlier runs judged, without what the judge itself failed on: that is worth another try."""
    kept: dict[tuple[str, ...], Verdict] = {}
    for row in journal.rows:
        with _rows_explained(journal):
            place = (row["model"], row["split"], row["key"], str(row["sample"]), row["judged"])
            kept[place] = Verdict.from_dict(row)
    return {place: verdict for place, verdict in kept.items() if verdict.verdict != "infra_error"}


@contextmanager
def _rows_explained(journal: Journal) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError) as error:
        raise PipelineError(
            f"{journal.path}: a row is not one of this version's ({error!r}). Give --out another name."
        ) from error


def _judgement_key(place: Place, questions: Sequence[Question], completion: Completion) -> tuple[str, ...]:
    """What a verdict is known by on disk: the answer's place, and a hash of the problem and the kernel judged."""
    model, index, sample = place
    question = questions[index]
    judged = hash_json([question.problem.pytorch_code, parse_answer(completion.text).code])[:16]
    return model, question.split, question.problem.key, str(sample), judged


def _ask(
    asker: Asker,
    name: str,
    missing: Sequence[Place],
    questions: Sequence[Question],
    settings: EvaluationSettings,
    journal: Journal,
    meter: Meter,
) -> dict[Place, Completion]:
    """The answers of one model that are not there yet, each on disk the moment it exists."""
    found: dict[Place, Completion] = {}

    def keep(completion: Completion) -> None:
        completion = replace(completion, text=_as_read_back(completion.text))
        split, key, problem = _place(questions[completion.index].split, questions[completion.index].problem)
        row = completion.to_dict()
        del row["index"]
        journal.append({"model": name, "split": split, "key": key, "problem": problem, **row})
        found[name, completion.index, completion.sample] = completion
        meter.generated(completion.tokens)

    requests = [
        Request(
            index,
            sample,
            user_message(questions[index].problem.pytorch_code),
            request_seed(settings.seed, questions[index].problem.key, sample),
        )
        for _, index, sample in missing
    ]
    if requests:
        asker.ask(name, requests, keep, meter.running)
    if absent := [place for place in missing if place not in found]:
        raise StepError(
            f"the {name} model gave no answer to {len(absent)} requests, the first on problem "
            f"{questions[absent[0][1]].problem.key}: start again with the same --out to go on"
        )
    return found


def _as_read_back(text: str) -> str:
    """The text as JSON gives it back: two halves of a surrogate pair that stand side by side are one character there.
    A run that goes on must judge what the first one judged.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _judge_all(
    judge: Judge,
    questions: Sequence[Question],
    answers: Mapping[Place, Completion],
    known: Mapping[tuple[str, ...], Verdict],
    journal: Journal,
    meter: Meter,
) -> list[JudgedAnswer]:
    """Judge the answers of all models in one go, so that no worker of the judge waits; in the order of the answers."""
    found: dict[Place, JudgedAnswer] = {}
    names = {f"{model}-{index}-{sample}": (model, index, sample) for model, index, sample in answers}

    def keep(place: Place, verdict: Verdict, is_new: bool = True) -> None:
        model, index, sample = place
        question, completion = questions[index], answers[place]
        named = replace(verdict, key=question.problem.key)
        found[place] = JudgedAnswer(model, question, completion, parse_answer(completion.text), named)
        if is_new:
            judged = _judgement_key(place, questions, completion)[-1]
            row = {"model": model, "split": question.split, "sample": sample, "judged": judged}
            journal.append({**row, **named.to_dict()})
            meter.judged()

    items = []
    for key, place in names.items():
        code = parse_answer(answers[place].text).code
        if verdict := known.get(_judgement_key(place, questions, answers[place])):
            keep(place, verdict, is_new=False)
        elif code is None:
            keep(place, unparsed(key, answers[place]))
        else:
            items.append(JudgeItem(key, questions[place[1]].problem.pytorch_code, code))
    for verdict in judge.verify_many(items) if items else ():
        keep(names[verdict.key], verdict)
    if missing := [place for place in answers if place not in found]:
        first = questions[missing[0][1]].problem.key
        raise StepError(
            f"the judge gave no verdict on {len(missing)} answers, the first to problem {first}: run it again"
        )
    return [found[place] for place in answers]


def unparsed(key: str, completion: Completion) -> Verdict:
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
