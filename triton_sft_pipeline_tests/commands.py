"""The command line as tests see it: what a call of it left, and what every message of it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Outcome(NamedTuple):
    """What a command left: its exit code, and what it wrote to standard output and standard error."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]
"""`run("filter", path, "--out", "out")`: the fixture of that name."""


def one_message(outcome: Outcome) -> str:
    """What standard error holds, which must be one message meant for a person."""
    assert "Traceback" not in outcome.err and "This is a bug" not in outcome.err
    assert outcome.err.startswith("triton-sft: ") and outcome.err.count("triton-sft: ") == 1
    return outcome.err
