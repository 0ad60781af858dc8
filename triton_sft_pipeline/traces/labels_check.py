"""Labels that contradict each other: whichever of them is true, the trace says something false."""

from __future__ import annotations

from triton_sft_pipeline.traces.record import Trace


def contradiction(trace: Trace) -> str | None:
    """The first contradiction among a trace's labels as a sentence, or None.

    What the labels mean: fast_0 is correctness, fast_1 a correct kernel's speedup above 1, fast_2 one of at least 2; a
    correct kernel ran, so it has no error and took some time.
    """
    if not trace.has_result:
        return None
    if not trace.correctness:
        wrong = [
            n for n, flag in (("fast_0", trace.fast_0), ("fast_1", trace.fast_1), ("fast_2", trace.fast_2)) if flag
        ]
        return f"labelled incorrect, but {wrong[0]} is set" if wrong else None
    if trace.error and trace.error.strip():
        return f"labelled correct, with an error: {first_line(trace.error)}"
    if trace.speedup is not None and trace.speedup <= 0:
        return f"labelled correct, with a speedup of {trace.speedup:g}"
    if trace.fast_0 is False:
        return "labelled correct, but fast_0 is not set"
    return _flag_against_speedup(trace)


def first_line(text: str) -> str:
    """The first line of an error message, cut to what a table can show."""
    return text.strip().splitlines()[0][:200]


def _flag_against_speedup(trace: Trace) -> str | None:
    if trace.speedup is None:
        return "fast_2 is set, but fast_1 is not" if trace.fast_2 and trace.fast_1 is False else None
    for name, flag, holds in (
        ("fast_1", trace.fast_1, trace.speedup > 1.0),
        ("fast_2", trace.fast_2, trace.speedup >= 2.0),
    ):
        if flag is not None and flag != holds:
            # Enough digits that the number never seems to agree: 0.99999 is not 1.
            return f"{name} is {'set' if flag else 'not set'}, but the speedup is {trace.speedup:.6g}"
    return None
