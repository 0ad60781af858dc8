"""From judged answers to a report, as plain data: scores, comparison, headline, notes, and a row for each problem.

Knows nothing of how answers were generated or judged, and nothing of how a report is drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from triton_sft_pipeline.chat.prompt import Answer
from triton_sft_pipeline.evaluation.generation import Completion
from triton_sft_pipeline.evaluation.scores import UNJUDGED, UNPARSED, compare, score
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline.files import hash_json
from triton_sft_pipeline.problems import Problem
from triton_sft_pipeline.verification.verdict import Verdict

SCHEMA_VERSION = 1
MODELS = ("base", "tuned")
SPLITS = ("seen", "test", "held_out")
"""In the order of a report. They are never added up: each answers another question."""

_SPEED = (
    *("speedup", "speedup_low", "speedup_high", "compile_speedup", "graph_speedup", "launch_bound"),
    *("reference_time_ms", "reference_iqr_ms", "kernel_time_ms", "kernel_iqr_ms"),
)
_SPLIT_NAMES = {"seen": "seen", "test": "test", "held_out": "held-out"}


@dataclass(frozen=True)
class Question:
    """A problem, and the split that it is asked for."""

    split: str
    problem: Problem


@dataclass(frozen=True)
class JudgedAnswer:
    """One answer of one model to one question, with what became of it."""

    model: str
    question: Question
    completion: Completion
    answer: Answer
    verdict: Verdict


def summarise(
    judged: Sequence[JudgedAnswer],
    settings: EvaluationSettings,
    provenance: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Put a report together.

    Args:
        judged: every answer, in the order of the questions; the models asked are those that occur.
        settings: what the answers were generated and judged with.
        provenance: kept as it is; its "notes", a list of sentences, become notes of the report.
        notes: more sentences a reader has to know.

    Returns:
        schema_version, headline, `report[model][split]` as `scores.score` returns it, comparison by split as
        `scores.compare` returns it (empty without a tuned model), notes, problems, generation, judge, settings and
        provenance: JSON data throughout.
    """
    models = [name for name in MODELS if any(j.model == name for j in judged)]
    verdicts = _first_verdicts(judged)
    timed = any(j.verdict.fast_1 is not None for j in judged)
    report: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "headline": ""}
    for name in models:
        report[name] = {split: score(verdicts[name, split], timed=timed) for split in SPLITS}
    report["comparison"] = {}
    if "tuned" in models:
        report["comparison"] = {s: compare(verdicts["base", s], verdicts["tuned", s]) for s in SPLITS}
    report["headline"] = headline(report)
    report["notes"] = [*_notes(judged, models, settings), *notes, *provenance.get("notes", [])]
    report["problems"] = _problem_rows(judged)
    report["generation"] = {
        name: _generation_facts([j.completion for j in judged if j.model == name]) for name in models
    }
    report["judge"] = _judge_facts([j.verdict for j in judged])
    report["settings"] = settings.model_dump(mode="json")
    report["provenance"] = dict(provenance)
    return report


def headline(report: Mapping[str, Any]) -> str:
    """The report in one line, a clause for each split that has problems.

    For example `verified kernels: base 0/27 -> tuned 27/27 on seen problems; 0/10 -> 0/10 on held-out problems`.
    """

    def count(model: str, split: str) -> str:
        return f"{report[model][split]['verified']}/{report[model][split]['n']}"

    clauses: list[str] = []
    for split in (s for s in SPLITS if report["base"][s]["n"]):
        base, tuned = ("", "") if clauses else ("base ", "tuned ")
        after = f" -> {tuned}{count('tuned', split)}" if "tuned" in report else ""
        clauses.append(f"{base}{count('base', split)}{after} on {_SPLIT_NAMES[split]} problems")
    return "verified kernels: " + "; ".join(clauses)


def scores_hash(report: Mapping[str, Any]) -> str:
    """Hex SHA-256 of what was found, without when, where and how fast: the data version of a report."""
    models = [name for name in MODELS if name in report]
    rows = [[row["split"], row["key"], *(row[name]["all_verdicts"] for name in models)] for row in report["problems"]]
    return hash_json([report["schema_version"], {name: report[name] for name in models}, rows])


def _first_verdicts(judged: Sequence[JudgedAnswer]) -> dict[tuple[str, str], list[Verdict]]:
    """(model, split) -> the verdict on the first answer to each problem, in the order of the problems."""
    verdicts: dict[tuple[str, str], list[Verdict]] = {(name, split): [] for name in MODELS for split in SPLITS}
    for j in judged:
        if j.completion.sample == 0:
            verdicts[j.model, j.question.split].append(j.verdict)
    return verdicts


def _problem_rows(judged: Sequence[JudgedAnswer]) -> list[dict[str, Any]]:
    """One row a problem, with the first answer of each model and the verdicts of all its answers."""
    rows: dict[int, dict[str, Any]] = {}
    for j in judged:
        problem = j.question.problem
        row = rows.setdefault(
            j.completion.index,
            {
                "key": problem.key,
                "split": j.question.split,
                "source": problem.source,
                "level": problem.level,
                "pytorch_code": problem.pytorch_code,
            },
        )
        if j.model not in row:
            row[j.model] = _answer_row(j) | {"all_verdicts": [], "correct_answers": 0}
        row[j.model]["all_verdicts"].append(j.verdict.verdict)
        row[j.model]["correct_answers"] += j.verdict.correctness
    return list(rows.values())


def _answer_row(judged: JudgedAnswer) -> dict[str, Any]:
    verdict = judged.verdict
    return {
        "verdict": verdict.verdict,
        "correctness": verdict.correctness,
        "detail": verdict.detail,
        **{name: getattr(verdict, name) for name in _SPEED},
        "torch_share": verdict.torch_share,
        "code": judged.answer.code,
        "answer": judged.completion.text,
        "tokens": judged.completion.tokens,
        "stopped": judged.completion.stopped,
    }


def _generation_facts(completions: Sequence[Completion]) -> dict[str, Any]:
    tokens = sum(c.tokens for c in completions)
    seconds = sum(c.seconds for c in completions)
    return {
        "answers": len(completions),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "stopped": dict(sorted(Counter(c.stopped for c in completions).items())),
    }


def _judge_facts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What the verdicts say about the judge. They should agree; where they do not, every value is named."""
    asked = [v for v in verdicts if v.verdict != UNPARSED]

    def named(values: Iterator[str]) -> str | None:
        return ", ".join(sorted({value for value in values if value})) or None

    return {
        "device": named(v.device for v in asked),
        "backend": named(v.backend for v in asked),
        "isolation": named(v.isolation for v in asked),
        "trials": max((v.trials for v in asked), default=None),
        "kernels": len(asked),
        "seconds": round(sum(v.wall_s for v in asked), 3),
        "versions": {name: version for v in asked for name, version in sorted(v.versions.items())},
    }


def _notes(judged: Sequence[JudgedAnswer], models: Sequence[str], settings: EvaluationSettings) -> list[str]:
    """What a reader has to know to read the numbers rightly."""
    notes = []
    if any(j.question.split == "seen" for j in judged):
        notes.append(
            "Seen problems are those of the train split. A high score there is a memorisation check: the model kept "
            "what it was shown. Only the test split and the held-out problems say anything about new ones."
        )
    if any(j.verdict.verdict != UNPARSED and j.verdict.backend == "interpreter" for j in judged):
        notes.append(
            "Kernels ran in Triton's CPU interpreter: verified means that the values agree there. Speed was not "
            "measured, and TF32, tile limits, shared memory and races were not checked."
        )
    if "tuned" not in models:
        notes.append("No adapter was given: this is the base model alone.")
    if settings.samples > 1:
        notes.append(f"Each problem was answered {settings.samples} times; the scores count the first answer.")
    return [*notes, *_hybrid_notes(judged), *_cut_notes(judged, models, settings), *_unjudged_notes(judged)]


def _hybrid_notes(judged: Sequence[JudgedAnswer]) -> Iterator[str]:
    first = [j.verdict for j in judged if j.completion.sample == 0 and j.verdict.correctness]
    if hybrid := sum(verdict.verdict == "verified_hybrid" for verdict in first):
        yield (
            f"{hybrid} of the {len(first)} verified kernels are hybrid: PyTorch operators did the lesser part of their "
            "work. They count as verified."
        )


def _cut_notes(judged: Sequence[JudgedAnswer], models: Sequence[str], settings: EvaluationSettings) -> Iterator[str]:
    for name in models:
        own = [j.completion for j in judged if j.model == name]
        if cut := sum(completion.stopped == "length" for completion in own):
            limit = settings.max_new_tokens
            yield f"{cut} of {len(own)} answers of the {name} model were cut at the limit of {limit} tokens."


def _unjudged_notes(judged: Sequence[JudgedAnswer]) -> Iterator[str]:
    """A sentence for each problem on which nothing can be said about some kernel; the problem stays in every n."""
    named: set[int] = set()
    for j in judged:
        if j.verdict.verdict in UNJUDGED and j.completion.index not in named:
            named.add(j.completion.index)
            yield (
                f"The {_SPLIT_NAMES[j.question.split]} problem {j.question.problem.key} could not be judged "
                f"({j.verdict.verdict}) and counts as not verified: {j.verdict.detail}"
            )
