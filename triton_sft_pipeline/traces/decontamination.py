"""Keeps what the evaluation asks out of the training data: traces about a held-out problem, or nearly about one.

What makes two modules alike is said in `problems.likeness`; this asks it about traces, and knows nothing of files or
labels.
"""

from __future__ import annotations

from collections.abc import Callable

from triton_sft_pipeline.problems.likeness import HeldOut
from triton_sft_pipeline.traces.record import Trace

HELD_OUT = "held_out_problem"


def decontamination_step(held_out: HeldOut) -> tuple[str, Callable[[Trace], str | None]]:
    """A per-trace step (see `filters.Step`): "held_out_problem" and what asks a trace. Answers are remembered by
    problem, since the traces of one problem share its module.
    """
    answers: dict[str, str | None] = {}

    def ask(trace: Trace) -> str | None:
        if trace.problem not in answers:
            contact = held_out.touched_by(trace.pytorch_code, trace.problem)
            answers[trace.problem] = str(contact) if contact else None
        return answers[trace.problem]

    return HELD_OUT, ask
