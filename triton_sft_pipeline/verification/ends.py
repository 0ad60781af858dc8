"""Puts into words how a kernel's process failed to answer. Knows nothing of what it was asked."""

from __future__ import annotations

from triton_sft_pipeline.verification.peer import MovingTimeoutError
from triton_sft_pipeline.verification.sandbox.client import Child, End
from triton_sft_pipeline.verification.verdict import Finding
from triton_sft_pipeline.verification.wire import WireError

_END_TIMEOUT_S = 5.0


def finding_of(error: Exception, child: Child, limit_s: float) -> Finding:
    """The verdict for a kernel that raised this error in a conversation with its process.

    Args:
        error: TimeoutError, wire.WireError or wire.ClosedError.
        child: the process.
        limit_s: the time that it had.

    Raises:
        ZygoteDiedError: the process did not end by itself.
    """
    if isinstance(error, MovingTimeoutError):
        return Finding("timeout", str(error))
    if isinstance(error, TimeoutError):
        return Finding("timeout", f"The kernel did not finish in {limit_s:g} s.")
    if isinstance(error, WireError):
        return Finding("forged_result", f"The kernel's process did not answer as it should: {str(error).rstrip('.')}.")
    return _finding_of_end(child.end(_END_TIMEOUT_S))


def _finding_of_end(end: End | None) -> Finding:
    if end is None:
        return Finding("early_exit", "The kernel's process hung up before it answered.")
    if end.signal in ("SIGXCPU", "SIGXFSZ"):
        return Finding("resource_limit", f"The kernel's process {describe(end)}.")
    if end.signal == "SIGKILL":
        return Finding("resource_limit", f"The kernel's process {describe(end)}; it may have taken too much memory.")
    if end.signal:
        return Finding("crash", f"The kernel's process {describe(end)}; look for out-of-bounds accesses.")
    return Finding("early_exit", f"The kernel's process {describe(end)} before it answered.")


def describe(end: End) -> str:
    """How the process ended, as the predicate of a sentence."""
    how = f"was killed by {end.signal}" if end.signal else f"ended with exit code {end.exit_code}"
    printed = " ".join(end.output.split())[-300:]
    return f"{how} (it printed: {printed})" if printed else how
