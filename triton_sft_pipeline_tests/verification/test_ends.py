"""Every way in which a kernel's process can end has a verdict and a sentence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from triton_sft_pipeline.verification import VERDICTS, ends
from triton_sft_pipeline.verification.peer import MovingTimeoutError
from triton_sft_pipeline.verification.sandbox.client import End
from triton_sft_pipeline.verification.verdict import Finding
from triton_sft_pipeline.verification.wire import ClosedError, WireError

ENDS = {
    "hung up and lives on": (None, "early_exit", "hung up before it answered"),
    "exit code 0": (End(0, None, ""), "early_exit", "ended with exit code 0 before it answered"),
    "exit code 70": (End(70, None, "a trace"), "early_exit", "exit code 70 (it printed: a trace)"),
    "segmentation fault": (End(None, "SIGSEGV", ""), "crash", "killed by SIGSEGV; look for out-of-bounds"),
    "abort": (End(None, "SIGABRT", "free(): invalid pointer"), "crash", "SIGABRT (it printed: free(): invalid"),
    "a signal without a use": (End(None, "SIGUSR1", ""), "crash", "SIGUSR1"),
    "memory": (End(None, "SIGKILL", ""), "resource_limit", "too much memory"),
    "processor time": (End(None, "SIGXCPU", ""), "resource_limit", "SIGXCPU."),
    "file size": (End(None, "SIGXFSZ", ""), "resource_limit", "SIGXFSZ."),
}


def finding_of(error: Exception, end: End | None) -> Finding:
    child: Any = SimpleNamespace(end=lambda timeout_s: end)
    return ends.finding_of(error, child, 2.5)


def test_silence_and_nonsense_have_verdicts_of_their_own() -> None:
    silence = finding_of(TimeoutError("No message."), None)
    assert silence.verdict == "timeout" and "in 2.5 s" in silence.detail
    stuck = finding_of(MovingTimeoutError("Its data did not come in 158 s."), None)
    assert (stuck.verdict, stuck.detail) == ("timeout", "Its data did not come in 158 s.")
    nonsense = finding_of(WireError("too long"), None)
    assert nonsense.verdict == "forged_result" and "too long" in nonsense.detail


@pytest.mark.parametrize("name", ENDS)
def test_an_end_is_put_into_words(name: str) -> None:
    end, verdict, mentioned = ENDS[name]
    finding = finding_of(ClosedError("gone"), end)
    assert finding.verdict == verdict and verdict in VERDICTS
    assert mentioned in finding.detail
    assert finding.detail.startswith("The kernel's process ") and finding.detail.endswith(".")


def test_of_a_flood_of_output_a_line_is_shown() -> None:
    words = ends.describe(End(3, None, "first\n" * 1000 + "the\n\n  last"))
    assert words.endswith("first the last)") and "\n" not in words
    assert len(words) < 400
