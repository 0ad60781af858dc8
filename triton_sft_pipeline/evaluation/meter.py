"""How far an evaluation is, how fast it goes and when it will be done."""

from __future__ import annotations

import time
from collections.abc import Sequence

from triton_sft_pipeline.evaluation.notes import span
from triton_sft_pipeline.progress import Progress

_TELL_EVERY_S = 0.5
"""Of answers under way; a token can come every few milliseconds."""


class Meter:
    """Counts steps, and says how fast they come and when the last of their kind will be there.

    A note begins with what matters most: a narrow terminal cuts its end.

    Args:
        answers: answers in all; each is two steps.
        generated, judged: what earlier runs have done. Rates are this run's alone.
        limit: tokens that an answer has at most.
        progress: is told.
    """

    def __init__(self, answers: int, generated: int, judged: int, limit: int, progress: Progress | None) -> None:
        self._answers, self._generated_before, self._judged_before = answers, generated, judged
        self._limit, self._progress = limit, progress
        self._asked = self._judged = self._tokens = 0
        self._running: Sequence[int] = ()
        self._began = time.monotonic()
        self._tell("")

    def running(self, tokens: Sequence[int]) -> None:
        """How many tokens each answer under way has now."""
        self._running = tokens
        if self._progress and tokens and time.monotonic() >= self._next:
            self._tell(self._asking())

    def generated(self, tokens: int) -> None:
        """One answer more, of so many tokens."""
        self._asked += 1
        self._tokens += tokens
        self._tell(self._asking())

    def judging(self) -> None:
        """From here on verdicts are timed."""
        self._began = time.monotonic()

    def judged(self) -> None:
        """One verdict more."""
        self._judged += 1
        rate, done = self._judged / self._seconds(), self._judged_before + self._judged
        left = _clock((self._answers - done) / rate)
        self._tell(f"{rate:.1f} verdicts/s, {left} left, {done}/{self._answers} verdicts")

    def _asking(self) -> str:
        written = self._tokens + sum(self._running)
        rate = written / self._seconds()
        # Short answers end first: what the unfinished ones have counts too, or the first to end would speak for all.
        mean = min(self._limit, written / self._asked) if self._asked else self._limit
        done = self._generated_before + self._asked
        waiting = max(self._answers - done - len(self._running), 0)
        to_write = waiting * mean + sum(max(mean - tokens, 0) for tokens in self._running)
        at_most = "" if self._asked else "at most "
        left = f", {at_most}{_clock(to_write / rate)} of asking left" if rate else ""
        now = f", {len(self._running)} at {span(self._running)} tokens" if self._running else ""
        return f"{rate:.0f} tokens/s{left}{now}, {done}/{self._answers} answers"

    def _seconds(self) -> float:
        return max(time.monotonic() - self._began, 1e-6)

    def _tell(self, note: str) -> None:
        self._next = time.monotonic() + _TELL_EVERY_S
        if self._progress:
            done = self._generated_before + self._asked + self._judged_before + self._judged
            self._progress(done, 2 * self._answers, note)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
