"""Reads how a child ended and what it reported.

A kernel's child may report anything, in any shape: of what it says about itself, only bad news counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton_sft_pipeline.verification.verdict import VERDICTS, Finding

CONTRACTS = ("name", "head", "v1", "ModelNew")


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        exit_code: None when a signal ended it.
        signal: the signal's name, such as "SIGSEGV".
        timed_out: it was killed at its deadline.
        report: what it reported, if that is a JSON object; None otherwise.
        output: the end of what it printed.
    """

    exit_code: int | None
    signal: str | None
    timed_out: bool
    report: dict[str, Any] | None
    output: str


def kernel_failure(outcome: Outcome, timeout_s: float) -> Finding | None:
    """What went wrong in a kernel's process, or None when it left outputs to compare."""
    if outcome.timed_out:
        return Finding("timeout", f"The kernel did not finish all trials in {timeout_s:g} s.")
    if outcome.signal in ("SIGXCPU", "SIGXFSZ"):
        return Finding("resource_limit", f"The kernel's process {describe_end(outcome)}.")
    if outcome.signal:
        return Finding("crash", f"The kernel's process {describe_end(outcome)}; look for out-of-bounds accesses.")
    if outcome.exit_code != 0 or outcome.report is None:
        return Finding("early_exit", f"The kernel's process {describe_end(outcome)} before it answered.")
    if "verdict" not in outcome.report:
        return None
    verdict = outcome.report["verdict"]
    if not isinstance(verdict, str) or verdict not in VERDICTS or verdict == "verified":
        return Finding("forged_result", "The kernel's process reported a verdict that it cannot know.")
    return Finding(verdict, str(outcome.report.get("detail", "")))


def contract_of(outcome: Outcome) -> str | None:
    """The contract by which the kernel was called, if it came to that."""
    contract = (outcome.report or {}).get("contract")
    return contract if contract in CONTRACTS else None


def binding_count(outcome: Outcome) -> int:
    """In how many ways the wrapper's arguments can be bound."""
    bindings = (outcome.report or {}).get("bindings")
    return bindings if isinstance(bindings, int) and 1 <= bindings <= len(CONTRACTS) else 1


def has_launched(outcome: Outcome) -> bool:
    """Whether the kernel's process saw a Triton kernel launched."""
    launches = (outcome.report or {}).get("launches")
    return isinstance(launches, int) and launches > 0


def time_of(outcome: Outcome) -> float | None:
    """The median time that was measured, in milliseconds."""
    time_ms = (outcome.report or {}).get("time_ms")
    return time_ms if isinstance(time_ms, float) and time_ms > 0 else None


def is_short_of_memory(outcome: Outcome) -> bool:
    """Whether memory ran out, which may be another task's fault. The system's memory killer sends SIGKILL."""
    killed = outcome.signal == "SIGKILL" and not outcome.timed_out
    return killed or (outcome.report or {}).get("verdict") == "resource_limit"


def describe_end(outcome: Outcome) -> str:
    """How the process ended, as the predicate of a sentence."""
    if outcome.timed_out:
        return "ran out of time"
    how = f"was killed by {outcome.signal}" if outcome.signal else f"ended with exit code {outcome.exit_code}"
    printed = " ".join(outcome.output.split())[-300:]
    return f"{how} (it printed: {printed})" if printed else how
