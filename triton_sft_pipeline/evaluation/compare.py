"""Several reports side by side: the scores of each, and each paired with the first on the problems that both answered.

Reads report.json files and nothing else; what is paired is counted again from the answers in them, by the same
functions that made the reports.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.evaluation.report_text import SPLITS, models_of
from triton_sft_pipeline.evaluation.scores import compare, outcomes
from triton_sft_pipeline.evaluation.statistics import RESAMPLES

REPORT_SCHEMA = 2
COMPARISON_SCHEMA = 1

_MATTERS = {
    "settings": (
        *("max_new_tokens", "samples", "temperature", "top_p", "seed"),
        *("judge_timeout_s", "judge_trials", "judge_device", "timing", "compile_baseline"),
    ),
    "judge": ("device", "backend", "isolation", "trials", "versions"),
    "provenance": (
        *("base_model", "base_model_version", "device", "versions", "judge_version", "judge_settings"),
        *("asker.asked", "asker.chat_template", "asker.server.software", "asker.server.version"),
    ),
}
"""Entries of a report that make its numbers comparable with another's, or not."""


def read_reports(paths: Sequence[str | Path]) -> dict[str, dict[str, Any]]:
    """Read reports, each under a label of its own: the name of its directory as it was given ("current", not what that
    links to), with parents where names repeat.

    Args:
        paths: report.json files, or the directories that hold one.

    Raises:
        PipelineError: a file is missing, given twice, no report, or of another schema version; it says what to do.
    """
    files = [_report_file(Path(path)) for path in paths]
    for place, file in enumerate(files):
        if file.resolve() in {other.resolve() for other in files[:place]}:
            raise PipelineError(f"{file}: given twice. Name each report once.")
    return {label: _read(file) for label, file in zip(_labels(files), files, strict=True)}


def compare_reports(
    reports: Mapping[str, Mapping[str, Any]], seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Put reports side by side. Of each the last model counts: the tuned one where there is one, else the base.

    Args:
        reports: label -> report, two or more; the others are paired with the first.
        seed, resamples: of the bootstrap.

    Returns:
        schema_version, first (its label), warnings (what makes the numbers hard to compare, as sentences),
        reports: label -> {"model", "headline", "provenance", "settings"},
        splits: for each split in which two reports or more have problems, of those reports
            scores: label -> {"model", "score": Score, "base": Score of the report's base model}, as in the reports;
            paired: label -> {"comparison": Comparison as `scores.compare` gives it, the first report as base,
                "left_out": [{"key", "reason"}]} for every label but the first; empty when the first has no problem in
                this split. Problems are the same when their PyTorch code is;
            problems: [{"key", "family", "level", "cells": {label: {"answers", "verified", "speedups"}}}].

    Raises:
        PipelineError: fewer than two reports.
    """
    if len(reports) < 2:
        raise PipelineError("a comparison needs two reports or more: name their report.json files")
    first = next(iter(reports))
    splits, absent = {}, []
    for split in SPLITS:
        rows = {label: [r for r in report["problems"] if r["split"] == split] for label, report in reports.items()}
        there = {label: own for label, own in rows.items() if own}
        if len(there) > 1:
            splits[split] = _split(split, there, reports, resamples, seed)
        if 0 < len(there) < len(reports):
            absent.append(_only_some(split, list(there), list(reports)))
    return {
        "schema_version": COMPARISON_SCHEMA,
        "first": first,
        "warnings": [*_warnings(reports), *absent, *_nothing_shared(splits, first)],
        "reports": {
            label: {
                "model": models_of(report)[-1],
                "headline": report["headline"],
                "provenance": report["provenance"],
                "settings": report["settings"],
            }
            for label, report in reports.items()
        },
        "splits": splits,
    }


def _split(
    split: str,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    reports: Mapping[str, Mapping[str, Any]],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """One split of the reports that have rows in it."""
    first = next(iter(reports))
    models = {label: models_of(reports[label])[-1] for label in rows}
    scores = {
        label: {
            "model": models[label],
            "score": reports[label][models[label]][split],
            "base": reports[label]["base"][split],
        }
        for label in rows
    }
    paired = {}
    for label in [label for label in rows if label != first] if first in rows else []:
        pairs = _pairs(rows[first], rows[label])
        found = compare(
            [outcomes(mine[models[first]]) for mine, _ in pairs],
            [outcomes(theirs[models[label]]) for _, theirs in pairs],
            timed=all(scores[name]["score"]["fast_1"] is not None for name in (first, label)),
            resamples=resamples,
            seed=seed,
        )
        left_out = [
            *_left_out(rows[first], [mine for mine, _ in pairs], reports[label], label),
            *_left_out(rows[label], [theirs for _, theirs in pairs], reports[first], first),
        ]
        paired[label] = {"comparison": found, "left_out": left_out}
    return {"scores": scores, "paired": paired, "problems": _matrix(rows, models)}


def _pairs(
    mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Rows with the same PyTorch code, in the order of `mine`; where a code occurs twice, the same keys first."""
    by_code: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in theirs:
        by_code[row["pytorch_code"]].append(row)
    found: dict[int, Mapping[str, Any]] = {}
    for same_key in (True, False):
        for place, row in enumerate(mine):
            left = by_code[row["pytorch_code"]]
            match = next((other for other in left if not same_key or other["key"] == row["key"]), None)
            if place not in found and match is not None:
                found[place] = match
                left.remove(match)
    return [(mine[place], found[place]) for place in sorted(found)]


def _left_out(
    rows: Sequence[Mapping[str, Any]], paired: Sequence[Mapping[str, Any]], other: Mapping[str, Any], label: str
) -> Iterator[dict[str, str]]:
    """The rows that found no partner in the other report, with the reason."""
    there = {id(row) for row in paired}
    splits = {row["pytorch_code"]: row["split"] for row in other["problems"]}
    keys = {(row["split"], row["key"]) for row in other["problems"]}
    for row in rows:
        if id(row) in there:
            continue
        elsewhere = splits.get(row["pytorch_code"])
        if elsewhere and elsewhere != row["split"]:
            reason = f"{label} has it among its {SPLITS[elsewhere][0].lower()}"
        elif (row["split"], row["key"]) in keys:
            reason = f"{label} has other PyTorch code under this key"
        else:
            reason = f"{label} has no such problem"
        yield {"key": row["key"], "reason": reason}


def _matrix(rows: Mapping[str, Sequence[Mapping[str, Any]]], models: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every problem of the split, with what became of it in each report that has it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for label, own in rows.items():
        for row in own:
            place = found.setdefault(
                (row["key"], row["pytorch_code"]),
                {"key": row["key"], "family": row["family"], "level": row["level"], "cells": {}},
            )
            answers = row[models[label]]
            place["cells"][label] = {
                "answers": len(answers),
                "verified": sum(answer["correctness"] for answer in answers),
                "speedups": [a["speedup"] for a in answers if a["correctness"] and a["speedup"]],
            }
    return list(found.values())


def _warnings(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A sentence for each entry on which the reports do not agree."""
    for part, names in _MATTERS.items():
        found = {label: dict(_leaves({n: _at(report[part], n) for n in names})) for label, report in reports.items()}
        for name in dict.fromkeys(name for values in found.values() for name in values):
            values = {label: own.get(name) for label, own in found.items()}
            if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
                told = "; ".join(f"{label}: {_told(value)}" for label, value in values.items())
                yield f"{part}.{name} is not the same. {told}."
    models = {label: models_of(report)[-1] for label, report in reports.items()}
    if len(set(models.values())) > 1:
        alone = [label for label, model in models.items() if model == "base"]
        yield f"Only a base model was asked in {', '.join(alone)}; the others count their tuned model."


def _only_some(split: str, there: Sequence[str], labels: Sequence[str]) -> str:
    """That not all reports have problems in a split."""
    name = SPLITS[split][0]
    if len(there) == 1:
        return f"{name}: only {there[0]} has any, so there is nothing to compare and no table of them."
    missing = " and ".join(label for label in labels if label not in there)
    alone = "" if labels[0] in there else f" Nothing is paired, because {labels[0]} is what the others are paired with."
    return f"{name}: {missing} {'has' if len(labels) - len(there) == 1 else 'have'} none.{alone}"


def _nothing_shared(splits: Mapping[str, Mapping[str, Any]], first: str) -> Iterator[str]:
    for split, found in splits.items():
        for label, own in found["paired"].items():
            if not own["comparison"]["n"]:
                yield f"{SPLITS[split][0]}: {first} and {label} have none in common, so nothing can be paired."


def _at(data: Any, name: str) -> Any:
    """The entry under a dotted name, None where there is none."""
    for part in name.split("."):
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _told(value: Any) -> str:
    if value is None:
        return "not said"
    return value if isinstance(value, str) else json.dumps(value)


def _report_file(path: Path) -> Path:
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise PipelineError(f"{file}: no such file. Give report.json files that `triton-sft evaluate` wrote.")
    return file


def _read(file: Path) -> dict[str, Any]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PipelineError(f"{file}: cannot be read as JSON ({error}). Evaluate again to write it anew.") from error
    if not isinstance(report, dict) or not isinstance(version := report.get("schema_version"), int):
        raise PipelineError(f"{file}: no report of an evaluation (it has no schema_version).")
    if version < REPORT_SCHEMA:
        raise PipelineError(
            f"{file}: a report of schema version {version}, and {REPORT_SCHEMA} is needed. It was written by an older "
            "version: run its evaluation again."
        )
    if version > REPORT_SCHEMA:
        raise PipelineError(
            f"{file}: a report of schema version {version}, and this version knows {REPORT_SCHEMA}. Install the newer "
            "triton-sft-pipeline that wrote it."
        )
    if missing := [name for name in ("base", "problems", "settings", "judge", "provenance") if name not in report]:
        raise PipelineError(f"{file}: no whole report, {missing[0]!r} is missing. Evaluate again to write it anew.")
    return report


def _labels(files: Sequence[Path]) -> list[str]:
    """The shortest ends of the directories' paths that differ; with the files' names where a directory repeats."""
    # Not resolved: a link such as "current" is what a person knows the report by.
    parts = [Path(os.path.normpath(file.absolute())).parent.parts[1:] or ("report",) for file in files]
    if len(set(parts)) < len(parts):
        parts = [(*own, file.stem) for own, file in zip(parts, files, strict=True)]
    for length in range(1, max(map(len, parts), default=0) + 1):
        labels = ["/".join(own[-length:]) for own in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(file) for file in files]
