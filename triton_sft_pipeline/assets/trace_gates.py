"""What the filter's result must hold to be promoted, and what of it a person should know: numbers in, gates out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg

from triton_sft_pipeline.assets.gates import Gate
from triton_sft_pipeline.assets.plots import table_markdown
from triton_sft_pipeline.traces import Filtered, FilterSettings
from triton_sft_pipeline.traces.funnel import DROPPED_FILE, QUARANTINE_FILE
from triton_sft_pipeline.traces.statistics import KeptSummary

GATES = {
    "accounting": "Every record that was read was kept, dropped or quarantined: nothing is lost.",
    "correctness": "Every kept trace is labelled correct: its kernel's output matched PyTorch.",
    "fast_0": "Every kept trace has fast_0 set: the same bar as correctness, so that a contradiction is caught.",
    "min_traces": "At least `filter.min_traces` traces are kept.",
    "no_overlap": "No kept trace is about a held-out problem.",
}

FELL = 0.2
DRIFT = 0.25
NOISE = 0.01
REPEATED = 0.2
DOMINANT = 0.2
FEW = 5
"""So many traces of one kind dominate nothing, however few the others are."""

WARNINGS = {
    "share_kept": "Warns when less than `filter.min_share_kept` of the records is kept, or "
    f"{FELL:.0%} less than last time.",
    "whole_files": "Warns when a file broke off and only the records before were read.",
    "label_noise": f"Warns when more than {NOISE:.0%} of the records have labels that contradict each other: whoever "
    "labelled them made mistakes that do not show, too.",
    "duplicates": f"Warns when more than {REPEATED:.0%} of the records repeat another's kernel.",
    "length_drift": "Warns when the median length of reasoning and kernel differs from last time's by more than "
    f"{DRIFT:.0%}.",
    "no_dominance": f"Warns when one problem, or one family of operators, makes more than {DOMINANT:.0%} of what is "
    f"kept (and more than {FEW} traces).",
}


@dataclass(frozen=True)
class LastTime:
    """What the current artifact says of the run that made it; None where it says nothing."""

    share_kept: float | None = None
    median_characters: int | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any] | None) -> LastTime:
        """From an artifact's record; there may be none, or one of an older version."""
        found = (record or {}).get("statistics", {})
        return cls(found.get("share_kept"), found.get("median_characters"))


def statistics(filtered: Filtered) -> dict[str, Any]:
    """The numbers that the next run is compared with, and that the UI draws over time."""
    summary = filtered.summary
    return {
        "share_kept": share_kept(filtered),
        "median_characters": summary.median_characters,
        "problems": len(summary.problems),
        "contradictory_labels": _share_lost(filtered, "contradictory_label"),
        "duplicates": _share_lost(filtered, "duplicate", "near_duplicate"),
        "largest_problem": summary.largest_problem[1] / max(1, summary.count),
        "largest_family": summary.largest_family[1] / max(1, summary.count),
    }


def share_kept(filtered: Filtered) -> float:
    """Share of the records read that is kept."""
    return filtered.kept_count / filtered.read if filtered.read else 0.0


def gates(filtered: Filtered, settings: FilterSettings, held_out: Mapping[str, str]) -> list[Gate]:
    """The conditions under which a filter's result may be promoted.

    Args:
        held_out: fingerprint -> name of the held-out problems.
    """
    summary = filtered.summary
    enough = summary.count >= settings.min_traces
    return [
        Gate(
            "accounting",
            filtered.accounted == filtered.read,
            f"{filtered.read} records read, {filtered.accounted} accounted for.",
        ),
        _holds_for_all("correctness", summary, "is not labelled correct"),
        _holds_for_all("fast_0", summary, "does not have fast_0 set"),
        Gate(
            "min_traces",
            enough,
            f"{summary.count} traces are kept, at least {settings.min_traces} are wanted."
            + ("" if enough else _losses(filtered)),
            {
                "kept": summary.count,
                "min_traces": settings.min_traces,
                "dropped_and_quarantined": dg.MetadataValue.md(samples_of_each_reason(filtered)),
            },
        ),
        _no_overlap(summary, held_out),
    ]


def warnings(filtered: Filtered, settings: FilterSettings, before: LastTime) -> list[Gate]:
    """What holds nothing back."""
    return [
        _share_kept(filtered, settings, before),
        _whole_files(filtered),
        _at_most("label_noise", _share_lost(filtered, "contradictory_label"), NOISE, "have contradictory labels"),
        _at_most(
            "duplicates", _share_lost(filtered, "duplicate", "near_duplicate"), REPEATED, "repeat another's kernel"
        ),
        _length_drift(filtered.summary, before),
        _no_dominance(filtered.summary),
    ]


def samples_of_each_reason(filtered: Filtered) -> str:
    """The first few records of each reason, as a table."""
    refused = [
        row
        for losses in (filtered.losses_dropped, filtered.losses_quarantined)
        for reason in losses.by_frequency
        for row in losses.samples[reason]
    ]
    rows = [[r.reason, r.sample_key, f"{r.file.rsplit('/', 1)[-1]} #{r.position}", r.detail] for r in refused]
    if not rows:
        return "Nothing was dropped."
    table = table_markdown(["reason", "trace", "where", "why"], rows)
    return f"The first few of each reason. All of them: `{DROPPED_FILE}` and `{QUARANTINE_FILE}`.\n\n{table}"


def _holds_for_all(name: str, summary: KeptSummary, fault: str) -> Gate:
    if not summary.count:
        return Gate(name, False, "No trace is kept, so there is nothing that it could hold for.")
    bad = summary.faults[name]
    if not bad.count:
        return Gate(name, True, f"It holds for all {summary.count} kept traces.")
    detail = f"{bad.count} of {summary.count} kept traces fail it; the first: {bad.first[0]} {fault}."
    return Gate(name, False, detail, {"failing": list(bad.first)})


def _no_overlap(summary: KeptSummary, held_out: Mapping[str, str]) -> Gate:
    shared = sorted(held_out[problem] for problem in summary.problems if problem in held_out)
    detail = f"Kept traces are about held-out problems: {', '.join(shared[:6])}." if shared else "None is."
    return Gate("no_overlap", not shared, detail)


def _share_kept(filtered: Filtered, settings: FilterSettings, before: LastTime) -> Gate:
    share = share_kept(filtered)
    detail = f"{share:.0%} of {filtered.read} records are kept; the bar is {settings.min_share_kept:.0%}."
    fell = before.share_kept is not None and share < (1 - FELL) * before.share_kept
    if before.share_kept is not None:
        detail += f" Last time it was {before.share_kept:.0%}."
    return Gate("share_kept", share >= settings.min_share_kept and not fell, detail, {"share_kept": share})


def _whole_files(filtered: Filtered) -> Gate:
    detail = "Every file was read to its end." if not filtered.breaks else " ".join(f"{b}." for b in filtered.breaks)
    return Gate("whole_files", not filtered.breaks, detail)


def _at_most(name: str, share: float, bar: float, what: str) -> Gate:
    return Gate(name, share <= bar, f"{share:.1%} of the records {what}; the bar is {bar:.0%}.", {"share": share})


def _length_drift(summary: KeptSummary, before: LastTime) -> Gate:
    now, then = summary.median_characters, before.median_characters
    if not then:
        return Gate(
            "length_drift", True, f"The median is {now:,} characters; there is no last time to compare it with."
        )
    detail = f"The median of reasoning and kernel is {now:,} characters, last time {then:,}."
    return Gate("length_drift", abs(now - then) <= DRIFT * then, detail, {"median_characters": now})


def _no_dominance(summary: KeptSummary) -> Gate:
    if not summary.count:
        return Gate("no_dominance", True, "No trace is kept.")
    (problem, most), (family, largest) = summary.largest_problem, summary.largest_family
    detail = (
        f"The problem with the most traces, {problem}, makes {most / summary.count:.0%} of what is kept; the largest "
        f"family of operators, {family}, {largest / summary.count:.0%}. The bar is {DOMINANT:.0%}."
    )
    rows = sorted(summary.families.items(), key=lambda item: (-item[1], item[0]))
    table = table_markdown(["family", "traces"], rows[:12])
    dominates = max(most, largest) > max(FEW, DOMINANT * summary.count)
    return Gate("no_dominance", not dominates, detail, {"families": dg.MetadataValue.md(table)})


def _share_lost(filtered: Filtered, *reasons: str) -> float:
    return sum(filtered.losses_dropped.counts[reason] for reason in reasons) / max(1, filtered.read)


def _losses(filtered: Filtered) -> str:
    funnel = filtered.funnel
    dropped, quarantined = _counts(funnel["dropped"]), _counts(funnel["quarantined"])
    return f" Of {filtered.read} read, dropped: {dropped}; quarantined: {quarantined}."


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"
