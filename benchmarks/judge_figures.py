"""What the judge's benchmark makes of verdicts: rates, agreement, distributions. Plain data in and out."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from triton_sft_pipeline.verification import Verdict

NEVER_RAN = frozenset(
    {"no_code", "unparsed", "syntax_error", "forbidden_construct", "import_error", "missing_wrapper", "contract_error"}
    | {"compile_error", "unsupported_on_cpu", "degenerate_task", "reference_error", "infra_error"}
)
"""Verdicts on kernels that were never executed. They cost little, and no rate counts them."""

QUANTILES = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}


def executed(verdicts: Sequence[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.verdict not in NEVER_RAN]


def per_minute(count: int, seconds: float) -> float:
    return 60.0 * count / seconds if seconds > 0 else 0.0


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of the values do not exceed; None of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def rate(verdicts: Sequence[Verdict], start_s: float, judging_s: float) -> dict[str, Any]:
    """The figures of one run over records. `start_s`: from nothing to a judge that is ready; `judging_s`: the rest."""
    ran = executed(verdicts)
    walls = [verdict.wall_s for verdict in ran]
    return {
        "kernels": len(verdicts),
        "executed": len(ran),
        "start_s": start_s,
        "judging_s": judging_s,
        "kernels_per_minute": per_minute(len(ran), start_s + judging_s),
        "kernels_per_minute_without_start": per_minute(len(ran), judging_s),
        "median_wall_s": statistics.median(walls) if walls else None,
        "p95_wall_s": quantile(walls, 0.95),
        "timeouts": sum(verdict.verdict == "timeout" for verdict in verdicts),
        "verdicts": dict(Counter(verdict.verdict for verdict in verdicts).most_common()),
        "isolation": sorted({verdict.isolation for verdict in verdicts}),
    }


def label_agreement(verdicts: Sequence[Verdict], labels: Mapping[str, bool | None]) -> dict[str, int]:
    """How many verdicts say of correctness what the label says, among the labelled on which it is conclusive.

    Args:
        labels: key -> the label's `correctness`; None where there is no label.
    """
    pairs = [(verdict.correctness, labels.get(verdict.key)) for verdict in verdicts if verdict.is_conclusive]
    labelled = [(measured, label) for measured, label in pairs if label is not None]
    return {"labelled": len(labelled), "agree": sum(measured == label for measured, label in labelled)}


def common(judge_walls: Mapping[str, float], yardstick_walls: Mapping[str, float], workers: int) -> dict[str, Any]:
    """Rates over the kernels of both mappings (key -> seconds) alone, from the mean time of one: `workers` at once.

    With kernels that ran out of time left out of the mappings, this says how the two compare where time limits, which
    are not the same, play no part.
    """
    keys = sorted(judge_walls.keys() & yardstick_walls.keys())
    judge_s, yardstick_s = (sum(walls[key] for key in keys) for walls in (judge_walls, yardstick_walls))
    return {
        "kernels": len(keys),
        "judge_per_minute": per_minute(len(keys) * workers, judge_s),
        "yardstick_per_minute": per_minute(len(keys) * workers, yardstick_s),
        "times": yardstick_s / judge_s if judge_s else None,
    }


def against_itself(verdicts: Sequence[Verdict], case_of: Mapping[str, str]) -> dict[str, Any]:
    """The A/A figures: of kernels that are their own reference, in all and by case.

    Args:
        case_of: key -> name of the case.
    """
    cases = sorted(set(case_of.values()))
    return {
        "all": _spread(verdicts),
        "cases": {case: _spread([v for v in verdicts if case_of[v.key] == case]) for case in cases},
        "not_measured": [f"{case_of[v.key]}: {v.verdict}: {v.detail}" for v in verdicts if v.speedup is None],
    }


def _spread(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    measured = [verdict for verdict in verdicts if verdict.speedup is not None]
    speedups = [verdict.speedup for verdict in measured if verdict.speedup is not None]
    widths = [
        v.speedup_high - v.speedup_low for v in measured if v.speedup_high is not None and v.speedup_low is not None
    ]
    times = [verdict.kernel_time_ms for verdict in measured if verdict.kernel_time_ms is not None]
    return {
        "runs": len(verdicts),
        "measured": len(measured),
        "flagged": sum(bool(verdict.fast_1) for verdict in measured),
        "flagged_slower": sum((verdict.speedup_high or 1.0) < 1.0 for verdict in measured),
        "launch_bound": sum(bool(verdict.launch_bound) for verdict in measured),
        "kernel_ms": statistics.median(times) if times else None,
        "speedup": {name: quantile(speedups, share) for name, share in QUANTILES.items()},
        "width": {name: quantile(widths, share) for name, share in QUANTILES.items()},
    }


def repeated(first: Mapping[str, Verdict], second: Mapping[str, Verdict]) -> dict[str, Any]:
    """How far two runs over the same kernels (key -> verdict) agree on fast_1.

    Counted are kernels that are correct and were timed in both. One belongs to the launch bound when both runs say so.
    """
    pairs = {key: (first[key], second[key]) for key in first if key in second}
    timed = {k: p for k, p in pairs.items() if all(v.correctness and v.fast_1 is not None for v in p)}
    free = {k: p for k, p in timed.items() if not all(v.launch_bound for v in p)}
    return {
        "all": _agreement(timed),
        "not_launch_bound": _agreement(free),
        "disagreements": [
            {"key": key, "not_launch_bound": key in free, "runs": [_speed(verdict) for verdict in pair]}
            for key, pair in timed.items()
            if pair[0].fast_1 != pair[1].fast_1
        ],
        "other_verdicts": [
            {"key": key, "verdicts": [pair[0].verdict, pair[1].verdict]}
            for key, pair in pairs.items()
            if pair[0].verdict != pair[1].verdict
        ],
    }


def _agreement(pairs: Mapping[str, tuple[Verdict, Verdict]]) -> dict[str, Any]:
    agree = sum(a.fast_1 == b.fast_1 for a, b in pairs.values())
    return {"kernels": len(pairs), "agree": agree, "share": agree / len(pairs) if pairs else None}


def _speed(verdict: Verdict) -> dict[str, Any]:
    return {
        "fast_1": verdict.fast_1,
        "speedup": verdict.speedup,
        "low": verdict.speedup_low,
        "high": verdict.speedup_high,
        "reference_ms": verdict.reference_time_ms,
        "kernel_ms": verdict.kernel_time_ms,
        "launch_bound": verdict.launch_bound,
    }
