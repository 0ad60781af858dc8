"""The errors that a person is meant to read. One sentence or two: what was found, where, and what to do about it."""

from __future__ import annotations


class PipelineError(Exception):
    """Bad input or usage: nothing was run, nothing was changed. The command line prints the message alone and exits
    with `exit_code`.
    """

    exit_code = 2


class GateError(PipelineError):
    """A step ran, but what it made may not be promoted: the previous artifact stays current.

    Args:
        message: what was found and what to do.
        gate: the name of the check that failed, as the Dagster UI shows it.
    """

    exit_code = 1

    def __init__(self, message: str, gate: str = "") -> None:
        super().__init__(message)
        self.gate = gate


class StepError(PipelineError):
    """A step could not finish for a reason outside its input: out of memory, a full disk, a model that does not fit."""

    exit_code = 1
