"""From judged answers to a report, as plain data: scores, comparison, headline, notes, and a row for each problem.

Every score is counted from the rows that the report itself holds. Knows nothing of how answers were generated or
judged, and nothing of how a report is drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from triton_sft_pipeline.evaluation.generation import Completion
from triton_sft_pipeline.evaluation.judged import JudgedAnswer
from triton_sft_pipeline.evaluation.notes import SPLIT_NAMES, notes_on, span
from triton_sft_pipeline.evaluation.scores import UNPARSED, Outcome, compare, outcomes, score
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline.files import hash_json
from triton_sft_pipeline.problems import Unusable, family_of
from triton_sft_pipeline.verification.verdict import Verdict

SCHEMA_VERSION = 2
MODELS = ("base", "tuned")
SPLITS = ("seen", "test", "held_out", "touched")
"""In the order of a report. They are never added up: each answers another question. Touched problems were given as
held-out ones, but the adapter's training data holds the same or nearly the same.
"""

_SPEED = (
    *("speedup", "speedup_low", "speedup_high", "compile_speedup", "graph_speedup", "launch_bound"),
    *("reference_time_ms", "reference_iqr_ms", "kernel_time_ms", "kernel_iqr_ms"),
)


def summarise(
    judged: Sequence[JudgedAnswer],
    settings: EvaluationSettings,
    provenance: Mapping[str, Any],
    notes: Sequence[str] = (),
    unusable: Sequence[Unusable] = (),
    touched: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Put a report together.

    Args:
        judged: every answer, in any order; the models asked are those that occur. Problems may have different numbers
            of answers.
        settings: what the answers were generated and judged with; its seed is the bootstrap's too.
        provenance: kept as it is; its "notes", a list of sentences, become notes of the report.
        notes: more sentences a reader has to know.
        unusable: problems that were given and could not be asked.
        touched: for problems of the split "touched", key -> which training problem it touches and how alike they are.

    Returns:
        schema_version, headline, notes, `report[model][split]` as `scores.score` returns it, groups (the same by level
        and by operator family, for splits with problems), comparison by split as `scores.compare` returns it (empty
        without a tuned model), unusable, problems (each with every answer of every model), generation, judge, settings
        and provenance: JSON data throughout.
    """
    judged = sorted(judged, key=lambda j: (j.completion.index, MODELS.index(j.model), j.completion.sample))
    models = [name for name in MODELS if any(j.model == name for j in judged)]
    rows = _problem_rows(judged, models, touched or {})
    left_out = [{name: getattr(u, name) for name in ("key", "place", "kind", "reason")} for u in unusable]
    report: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "headline": "", "notes": []}
    report |= _scores(rows, models, judged, settings)
    report["unusable"], report["problems"] = left_out, rows
    report["headline"] = headline(report)
    report["notes"] = [
        *notes_on(judged, models, settings, rows, left_out),
        *notes,
        *provenance.get("notes", []),
    ]
    report["generation"] = {
        name: _generation_facts([j.completion for j in judged if j.model == name]) for name in models
    }
    report["judge"] = _judge_facts([j.verdict for j in judged])
    # The temperature that was meant, where none was given.
    report["settings"] = settings.model_dump(mode="json") | {"temperature": settings.resolved_temperature}
    report["provenance"] = dict(provenance)
    return report


def headline(report: Mapping[str, Any]) -> str:
    """The report in one line, a clause for each split that has problems.

    For example `verified kernels: base 0/27 -> tuned 27/27 on seen problems; 0/10 -> 0/10 on held-out problems`, and
    with several answers `verified answers, 8 a problem: base 3 % -> tuned 12 % on 10 held-out problems`.
    """
    models = [name for name in MODELS if name in report]
    several = any(len(row[name]) > 1 for row in report["problems"] for name in models)

    def found(name: str, split: str) -> str:
        scored = report[name][split]["fast_0"]
        return _percent(scored["rate"]) if several else f"{scored['count']}/{scored['n']}"

    clauses: list[str] = []
    for split in (s for s in SPLITS if any(report[name][s]["n"] for name in models)):
        shown = " -> ".join(f"{'' if clauses else name + ' '}{found(name, split)}" for name in models)
        rows = [row for row in report["problems"] if row["split"] == split]
        asked = f"on {SPLIT_NAMES[split]} problems"
        if several:
            asked = f"on {len(rows)} {SPLIT_NAMES[split]} problem{'' if len(rows) == 1 else 's'}"
        clauses.append(f"{shown} {asked}")
    each = span([len(row[name]) for row in report["problems"] for name in models]) if several else ""
    return (f"verified answers, {each} a problem: " if several else "verified kernels: ") + "; ".join(clauses)


def scores_hash(report: Mapping[str, Any]) -> str:
    """Hex SHA-256 of what was found: the verdicts on all answers, and the problems that could not be used.

    The data version of a report. It knows neither when nor where, and nothing that a clock said: another measurement of
    the same kernels is the same finding. All else in a report is counted from these verdicts, or speed.
    """
    models = [name for name in MODELS if name in report]
    rows = [
        [row["split"], row["key"], *([[a["verdict"], a["correctness"]] for a in row[name]] for name in models)]
        for row in report["problems"]
    ]
    unusable = [[problem["key"], problem["kind"]] for problem in report["unusable"]]
    return hash_json([report["schema_version"], models, sorted(rows, key=lambda row: row[:2]), sorted(unusable)])


def _percent(rate: float | None) -> str:
    """Whole percent, and a decimal below 10 and above 90, as everywhere in a report; what is almost none or almost all
    is not rounded to none or all.
    """
    if rate is None:
        return "-"
    if 0 < rate < 0.001:
        return "< 0.1 %"
    if 0.999 < rate < 1:
        return "> 99.9 %"
    value = 100 * rate
    return f"{value:.0f} %" if 10 <= value <= 90 else f"{value:.1f}".removesuffix(".0") + " %"


def _scores(
    rows: Sequence[Mapping[str, Any]],
    models: Sequence[str],
    judged: Sequence[JudgedAnswer],
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """The counted part of a report: a score for each model and split, groups, and the comparison."""
    options: dict[str, Any] = {
        "timed": any(j.verdict.fast_1 is not None for j in judged),
        "resamples": settings.bootstrap_resamples,
        "seed": settings.seed,
    }
    by_split = {split: [row for row in rows if row["split"] == split] for split in SPLITS}

    def answers(name: str, own: Sequence[Mapping[str, Any]]) -> list[list[Outcome]]:
        return [outcomes(row[name]) for row in own]

    found: dict[str, Any] = {
        name: {split: score(answers(name, own), **options) for split, own in by_split.items()} for name in models
    }
    found["groups"] = {
        split: {
            kind: {
                value: {name: score(answers(name, members), **options) for name in models}
                for value, members in _grouped(own, kind).items()
            }
            for kind in ("level", "family")
        }
        for split, own in by_split.items()
        if own
    }
    found["comparison"] = {}
    if set(models) == set(MODELS):
        found["comparison"] = {
            split: compare(answers("base", own), answers("tuned", own), **options) for split, own in by_split.items()
        }
    return found


def _grouped(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by level, in its order and unknown ones last, or by family, the largest first."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault("unknown" if row[kind] is None else str(row[kind]), []).append(row)
    if kind == "level":
        return dict(sorted(groups.items(), key=lambda item: (item[0] == "unknown", item[0])))
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def _problem_rows(
    judged: Sequence[JudgedAnswer], models: Sequence[str], touched: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One row a problem, with every answer of each model, in the order of the questions and of the answers."""
    rows: dict[int, dict[str, Any]] = {}
    for j in judged:
        problem, split = j.question.problem, j.question.split
        if j.completion.index not in rows:
            rows[j.completion.index] = {
                "key": problem.key,
                "split": split,
                "source": problem.source,
                "level": problem.level,
                "family": family_of(problem.pytorch_code),
                "name": problem.name,
                "pytorch_code": problem.pytorch_code,
                "touched": touched.get(problem.key) if split == "touched" else None,
                **{name: [] for name in models},
            }
        rows[j.completion.index][j.model].append(_answer_row(j))
    return list(rows.values())


def _answer_row(judged: JudgedAnswer) -> dict[str, Any]:
    verdict = judged.verdict
    return {
        "sample": judged.completion.sample,
        "verdict": verdict.verdict,
        "correctness": verdict.correctness,
        "detail": verdict.detail,
        "fast_1": verdict.fast_1,
        "fast_2": verdict.fast_2,
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
