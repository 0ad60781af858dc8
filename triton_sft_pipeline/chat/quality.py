"""The gates of a chat dataset as plain conditions, shared by the asset, the command line and `main`."""

from __future__ import annotations

from collections.abc import Mapping

from triton_sft_pipeline.chat.dataset import format_faults, overlaps
from triton_sft_pipeline.chat.examples import ChatDataset


def dataset_faults(dataset: ChatDataset, budget: int, held_out: Mapping[str, str]) -> dict[str, str]:
    """Name of each gate -> what is wrong, or an empty text when it holds.

    Args:
        budget: most tokens a row may have.
        held_out: fingerprint -> name of the held-out problems.
    """
    return {
        "format": _format_fault(dataset),
        "token_budget": _budget_fault(dataset, budget),
        "no_overlap": _overlap_fault(dataset, held_out),
    }


def _format_fault(dataset: ChatDataset) -> str:
    faults = [(e.sample_key, fault) for e in dataset.examples for fault in format_faults(e)]
    return f"{faults[0][0]}: {faults[0][1]} ({len(faults)} faults in all)." if faults else ""


def _budget_fault(dataset: ChatDataset, budget: int) -> str:
    long = [e for e in dataset.examples if e.tokens > budget]
    if long:
        first = f"{long[0].sample_key} has {long[0].tokens:,} tokens"
        return f"{first}, over the budget of {budget:,} ({len(long)} such rows)."
    if not dataset.split("train"):
        return (
            f"the train split is empty: {len(dataset.over_budget)} samples are over the budget of {budget:,} tokens. "
            "Raise training.max_length or bring shorter traces."
        )
    return ""


def _overlap_fault(dataset: ChatDataset, held_out: Mapping[str, str]) -> str:
    shared = {side: problems for side, problems in overlaps(dataset.examples, held_out).items() if problems}
    if not shared:
        return ""
    side, problems = next(iter(shared.items()))
    names = [e.sample_key for e in dataset.examples if e.problem in problems]
    names += [held_out[p] for p in sorted(problems) if p in held_out]
    return f"{side} share {len(problems)} problems: {', '.join(names[:6])}."
