"""What a reader of a report has to know to read its numbers rightly, as plain sentences.

Reads judged answers and facts; adds no number that the report does not hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from triton_sft_pipeline.evaluation.judged import JudgedAnswer
from triton_sft_pipeline.evaluation.scores import UNPARSED
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline.verification.verdict import UNJUDGED

SPLIT_NAMES = {"seen": "seen", "test": "test", "held_out": "held-out", "touched": "touched"}

MOST_NAMED = 10
"""Problems that a note names; a report holds all of them."""

FEW_PROBLEMS = 10
"""Fewer than these, and bootstrap intervals are too short: simulated differences of 10, 20 and 40 problems with 8
answers each lay in 95, 95 and 94 % of them, but of 2, 3, 4 and 5 problems in 63, 74, 84 and 88 %.
"""


def notes_on(
    judged: Sequence[JudgedAnswer],
    models: Sequence[str],
    settings: EvaluationSettings,
    rows: Sequence[Mapping[str, Any]],
    unusable: Sequence[Mapping[str, Any]],
) -> list[str]:
    """The sentences, the most general first.

    Args:
        judged: every answer.
        models: those that were asked.
        settings: what the answers were generated with.
        rows: the report's problems.
        unusable: the report's unusable problems.
    """
    return [
        *_split_notes(rows),
        *_judge_notes(judged, models),
        *_sampling_notes(settings, rows, models),
        *_bootstrap_notes(rows, models),
        *_unusable_notes(unusable),
        *_hybrid_notes(judged),
        *_cut_notes(judged, models, settings),
        *_unjudged_notes(judged),
    ]


def _split_notes(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if any(row["split"] == "seen" for row in rows):
        yield (
            "Seen problems are those of the train split. A high score there is a memorisation check: the model kept "
            "what it was shown. Only the test split and the held-out problems say anything about new ones."
        )
    touched = [f"{row['key']} ({row['touched'] or 'no reason given'})" for row in rows if row["split"] == "touched"]
    if touched:
        yield (
            f"{_problems(len(touched))} given as held out {_are(len(touched))} the same as, or nearly, what the "
            f"adapter was trained on, and {_are(len(touched))} reported apart as touched: {_listed(touched)}."
        )


def _judge_notes(judged: Sequence[JudgedAnswer], models: Sequence[str]) -> Iterator[str]:
    if any(j.verdict.verdict != UNPARSED and j.verdict.backend == "interpreter" for j in judged):
        yield (
            "Kernels ran in Triton's CPU interpreter: verified means that the values agree there. Speed was not "
            "measured, and TF32, tile limits, shared memory and races were not checked."
        )
    if "tuned" not in models:
        yield "No adapter was given: this is the base model alone."


def _sampling_notes(
    settings: EvaluationSettings, rows: Sequence[Mapping[str, Any]], models: Sequence[str]
) -> Iterator[str]:
    numbers = [len(row[model]) for row in rows for model in models]
    temperature = settings.resolved_temperature
    if max(numbers, default=0) > 1:
        paired = " The McNemar test takes the first answer to each problem alone." if "tuned" in models else ""
        yield (
            f"Each problem was answered {span(numbers)} times (temperature {temperature:g}, top-p "
            f"{settings.top_p:g}). A problem counts with the share of its answers that succeed, a rate is the mean "
            "over problems, and its interval is Wilson's with n problems, as if each had one answer: answers to one "
            "problem depend on each other, so more of them make no interval shorter, and it is rather too long than "
            f"too short.{paired}"
        )
    if len(set(numbers)) > 1:
        yield (
            "Not all problems have the same number of answers: each problem still weighs the same, and pass@k stops at "
            "the smallest number."
        )
    if temperature == 0:
        yield (
            "Answers are greedy (temperature 0): the most likely token each time, so asking again gives the same "
            "answer. The intervals are about which problems were asked, not about luck in the answers."
        )


def _bootstrap_notes(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> Iterator[str]:
    if "tuned" in models:
        yield (
            "Differences are tuned minus base, paired by problem; an interval that holds 0 leaves open which model is "
            "better. Intervals are 95 % each and not corrected for their number: of twenty, as by level or family, one "
            "is expected to miss."
        )
    sizes = Counter(row["split"] for row in rows)
    if few := [SPLIT_NAMES[split] for split in SPLIT_NAMES if 0 < sizes[split] < FEW_PROBLEMS]:
        each = f"are fewer than {FEW_PROBLEMS} each" if len(few) > 1 else f"are fewer than {FEW_PROBLEMS}"
        yield (
            f"The {_and(few)} problems {each}. Bootstrap intervals of so few (speedups, tokens, differences that are "
            "no bounds) are too short: in simulations with 5 problems 88 % of them held the truth instead of 95 %, and "
            "with 2 to 4 only 63 to 84 %. That holds for small families, too."
        )


def _unusable_notes(unusable: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if unusable:
        named = [f"{problem['key']} ({problem['kind']}: {problem['reason'].rstrip('.')})" for problem in unusable]
        yield (
            f"{_problems(len(unusable))} could not be used, {_were(len(unusable))} not asked and "
            f"{_are(len(unusable))} in no n: {_listed(named)}."
        )


def _hybrid_notes(judged: Sequence[JudgedAnswer]) -> Iterator[str]:
    correct = [j.verdict for j in judged if j.verdict.correctness]
    if hybrid := sum(verdict.verdict == "verified_hybrid" for verdict in correct):
        yield (
            f"{hybrid} of the {len(correct)} verified kernels are hybrid: PyTorch operators did the lesser part of "
            "their work. They count as verified."
        )


def _cut_notes(judged: Sequence[JudgedAnswer], models: Sequence[str], settings: EvaluationSettings) -> Iterator[str]:
    for name in models:
        own = [j.completion for j in judged if j.model == name]
        if cut := sum(completion.stopped == "length" for completion in own):
            limit = settings.max_new_tokens
            yield f"{cut} of {len(own)} answers of the {name} model {_were(cut)} cut at the limit of {limit} tokens."


def _unjudged_notes(judged: Sequence[JudgedAnswer]) -> Iterator[str]:
    """A sentence for each problem on which nothing can be said about some kernel; the problem stays in every n."""
    answers = Counter(j.completion.index for j in judged)
    unjudged = [j for j in judged if j.verdict.verdict in UNJUDGED]
    numbers = Counter(j.completion.index for j in unjudged)
    first = {j.completion.index: j for j in reversed(unjudged)}
    for index in sorted(first)[:MOST_NAMED]:
        verdict, question = first[index].verdict, first[index].question
        whole = numbers[index] == answers[index]
        problem = f"{'The' if whole else 'the'} {SPLIT_NAMES[question.split]} problem {question.problem.key}"
        some = "" if whole else f"{numbers[index]} of {answers[index]} answers to "
        yield (
            f"{some}{problem} could not be judged ({verdict.verdict}) and {'counts' if whole else 'count'} as not "
            f"verified: {verdict.detail}"
        )
    if len(first) > MOST_NAMED:
        yield f"{len(first) - MOST_NAMED} more problems have answers that could not be judged; report.json names all."


def _problems(count: int) -> str:
    return "1 problem" if count == 1 else f"{count} problems"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def _and(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _listed(named: Sequence[str]) -> str:
    more = len(named) - MOST_NAMED
    return "; ".join([*named[:MOST_NAMED], *([f"and {more} more, all in report.json"] if more > 0 else [])])


def span(numbers: Sequence[int]) -> str:
    """`8` where all numbers are the same, else `5 to 8`."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
