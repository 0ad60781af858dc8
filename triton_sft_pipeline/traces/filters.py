"""Which traces are kept, and the first reason of each that is not. Pure: a trace in, a reason or nothing out.

A step is a name and a function that says what is wrong with a trace, or nothing. The name is the reason that the funnel
counts. Each step here looks at one trace alone; what compares traces is in `duplicates`, `selection` and
`decontamination`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from triton_sft_pipeline.traces.answers import loop, refusal, unreadable
from triton_sft_pipeline.traces.labels_check import contradiction, first_line
from triton_sft_pipeline.traces.reasoning import MODEL_CLASS, PROSE, WRAPPER
from triton_sft_pipeline.traces.record import Trace
from triton_sft_pipeline.traces.schemas import is_code
from triton_sft_pipeline.traces.settings import FilterSettings
from triton_sft_pipeline.traces.static import fallback_of, kernel_facts, module_work

Step = tuple[str, Callable[[Trace], str | None]]


@dataclass(frozen=True)
class Dropped:
    """A trace that was not kept: the step that refused it first, and a sentence about this very trace."""

    trace: Trace
    reason: str
    detail: str


def first_refusal(trace: Trace, steps: list[Step]) -> tuple[str, str] | None:
    """(reason, detail) of the first step that refuses a trace, or None."""
    for reason, judge in steps:
        detail = judge(trace)
        if detail is not None:
            return reason, detail
    return None


def label_steps(settings: FilterSettings) -> list[Step]:
    """The steps that read the labels: the filters of `load_and_filter_traces`, in the order of their strictness. A
    trace without code or result has no label to read.
    """
    steps: list[Step] = [("no_kernel", _no_kernel)] if settings.require_kernel else []
    steps.append(("no_result", _no_result))
    if settings.require_correctness:
        steps.append(("correctness", _incorrect))
    if settings.require_fast_0:
        steps.append(("fast_0", _not_fast_0))
    if settings.require_fast_1:
        steps.append(("fast_1", lambda t: None if t.fast_1 else _not_fast("fast_1", t, "above 1.0")))
    if settings.require_fast_2:
        steps.append(("fast_2", lambda t: None if t.fast_2 else _not_fast("fast_2", t, "at least 2.0")))
    if settings.min_speedup is not None:
        bar = settings.min_speedup
        steps.append(("min_speedup", lambda t: _too_slow(t, bar)))
    asks_for_speed = settings.require_fast_1 or settings.require_fast_2 or settings.min_speedup is not None
    if settings.ignore_launch_bound and asks_for_speed:
        steps.append(("launch_bound_speed", _launch_bound))
    return steps


def quality_steps(settings: FilterSettings) -> list[Step]:
    """The steps that ask whether labels, code and reasoning of a trace are worth training on; cheap ones first."""
    steps: list[tuple[bool, str, Callable[[Trace], str | None]]] = [
        (settings.check_labels, "contradictory_label", contradiction),
        (settings.check_syntax, "syntax_error", _syntax_error),
        (settings.require_wrapper, "no_wrapper", _no_wrapper),
        (settings.require_launch, "no_kernel_launch", _no_kernel_launch),
        (settings.forbid_fallback, "torch_fallback", _torch_fallback),
        (settings.require_reasoning, "no_reasoning", lambda t: _no_reasoning(t, settings.prose_is_reasoning)),
        (settings.drop_refusals, "refusal", lambda t: refusal(t.reasoning) if t.reasoning else None),
        (settings.drop_loops, "reasoning_loop", lambda t: loop(t.reasoning) if t.reasoning else None),
        (settings.require_readable, "unreadable_answer", unreadable),
    ]
    return [(reason, judge) for is_on, reason, judge in steps if is_on]


def _no_kernel(trace: Trace) -> str | None:
    if is_code(trace.triton_code):
        return None
    if trace.triton_code.strip():
        return f"the code is a literal {trace.triton_code.strip()[:20]!r}"
    error = (trace.error or "").strip()
    return f"there is no code: {first_line(error)}" if error else "there is no code"


def _no_result(trace: Trace) -> str | None:
    return None if trace.has_result else "the kernel was never judged: result is missing or null"


def _incorrect(trace: Trace) -> str | None:
    if trace.correctness:
        return None
    error = (trace.error or "").strip()
    return f"labelled incorrect: {first_line(error)}" if error else "labelled incorrect"


def _not_fast_0(trace: Trace) -> str | None:
    labelled = "correct" if trace.correctness else "incorrect"
    return None if trace.fast_0 else f"fast_0 is not set (labelled {labelled})"


def _not_fast(name: str, trace: Trace, wanted: str) -> str:
    return f"{name} is not set: speedup {_shown(trace.speedup)}, wanted {wanted}"


def _too_slow(trace: Trace, bar: float) -> str | None:
    if trace.speedup is not None and trace.speedup >= bar:
        return None
    return f"speedup {_shown(trace.speedup)} is under min_speedup {bar:g}"


def _launch_bound(trace: Trace) -> str | None:
    if not trace.launch_bound:
        return None
    return f"speedup {_shown(trace.speedup)} is over a reference that is shorter than its launch"


def _syntax_error(trace: Trace) -> str | None:
    error = kernel_facts(trace.triton_code).syntax_error
    return f"the kernel is not valid Python: {error}" if error else None


def _no_wrapper(trace: Trace) -> str | None:
    if kernel_facts(trace.triton_code).has_wrapper:
        return None
    return f"the code defines neither {WRAPPER} nor {MODEL_CLASS}"


def _no_kernel_launch(trace: Trace) -> str | None:
    facts = kernel_facts(trace.triton_code)
    if not facts.has_kernel:
        return "the code has no @triton.jit function"
    return None if facts.launches else "the wrapper reaches no @triton.jit function"


def _torch_fallback(trace: Trace) -> str | None:
    facts = kernel_facts(trace.triton_code)
    if not facts.work.calls and not facts.compiler:
        return None
    return fallback_of(facts, module_work(trace.pytorch_code))


def _no_reasoning(trace: Trace, prose_counts: bool) -> str | None:
    if trace.reasoning and not prose_counts and (trace.reasoning_field or "").endswith(PROSE):
        return "nothing but the prose before the code"
    return None if trace.reasoning else "no model_reasoning, reasoning or thinking, and none in full_completion"


def _shown(speedup: float | None) -> str:
    return "(none)" if speedup is None else f"{speedup:.3g}"
