"""Which traces are kept, and the first reason of each that is not. Pure: traces in, kept and dropped out.

A step is a name and a function that says what is wrong with a trace, or nothing. The name is the reason that the funnel
counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from triton_sft_pipeline.traces.record import Trace
from triton_sft_pipeline.traces.settings import FilterSettings

Step = tuple[str, Callable[[Trace], str | None]]


@dataclass(frozen=True)
class Dropped:
    """A trace that was not kept: the step that refused it first, and a sentence about this very trace."""

    trace: Trace
    reason: str
    detail: str


def filter_traces(traces: Iterable[Trace], steps: list[Step]) -> tuple[list[Trace], list[Dropped]]:
    """Split traces into kept and dropped, both in the order of the input."""
    kept: list[Trace] = []
    dropped: list[Dropped] = []
    for trace in traces:
        refusal = _first_refusal(trace, steps)
        if refusal is None:
            kept.append(trace)
        else:
            dropped.append(Dropped(trace, *refusal))
    return kept, dropped


def label_steps(settings: FilterSettings) -> list[Step]:
    """The steps that read the labels: the filters of `load_and_filter_traces`, in the order of their strictness."""
    steps: list[Step] = [("no_result", _no_result)]
    if settings.require_correctness:
        steps.append(("correctness", _incorrect))
    if settings.require_fast_0:
        steps.append(
            (
                "fast_0",
                lambda t: (
                    None if t.fast_0 else f"fast_0 is not set (labelled {'correct' if t.correctness else 'incorrect'})"
                ),
            )
        )
    if settings.require_fast_1:
        steps.append(
            (
                "fast_1",
                lambda t: None if t.fast_1 else f"fast_1 is not set: speedup {_shown(t.speedup)}, wanted above 1.0",
            )
        )
    if settings.require_fast_2:
        steps.append(
            (
                "fast_2",
                lambda t: None if t.fast_2 else f"fast_2 is not set: speedup {_shown(t.speedup)}, wanted at least 2.0",
            )
        )
    if settings.min_speedup is not None:
        bar = settings.min_speedup
        steps.append(("min_speedup", lambda t: _too_slow(t, bar)))
    return steps


def training_steps(held_out: Mapping[str, str]) -> list[Step]:
    """The steps that ask whether a trace may be trained on.

    Args:
        held_out: fingerprint -> name of each held-out problem.
    """

    def seen_by_evaluation(trace: Trace) -> str | None:
        name = held_out.get(trace.problem)
        return f"the same module as the held-out problem {name}" if name else None

    return [
        ("no_reasoning", lambda t: None if t.reasoning else "no model_reasoning, reasoning or thinking"),
        ("held_out_problem", seen_by_evaluation),
    ]


def _first_refusal(trace: Trace, steps: list[Step]) -> tuple[str, str] | None:
    for reason, judge in steps:
        detail = judge(trace)
        if detail is not None:
            return reason, detail
    return None


def _no_result(trace: Trace) -> str | None:
    return None if trace.has_result else "the kernel was never judged: result is missing or null"


def _incorrect(trace: Trace) -> str | None:
    if trace.correctness:
        return None
    return f"labelled incorrect: {trace.error.splitlines()[0][:200]}" if trace.error else "labelled incorrect"


def _too_slow(trace: Trace, bar: float) -> str | None:
    if trace.speedup is not None and trace.speedup >= bar:
        return None
    return f"speedup {_shown(trace.speedup)} is under min_speedup {bar:g}"


def _shown(speedup: float | None) -> str:
    return "(none)" if speedup is None else f"{speedup:.3g}"
