"""How far an evaluation is, how fast it goes and when it will be done."""

from __future__ import annotations

import time

from triton_sft_pipeline.progress import Progress


class Meter:
    """Counts steps, and says how fast they come and when the last of their kind will be there.

    Args:
        answers: answers in all; each is two steps.
        generated, judged: what earlier runs have done. Rates are this run's alone.
        progress: is told.
    """

    def __init__(self, answers: int, generated: int, judged: int, progress: Progress | None) -> None:
        self._total, self._done = 2 * answers, generated + judged
        self._to_ask, self._to_judge = answers - generated, answers - judged
        self._asked = self._judged = self._tokens = 0
        self._progress = progress
        self._began = time.monotonic()
        self._tell("")

    def generated(self, tokens: int) -> None:
        """One answer more, of so many tokens."""
        self._asked += 1
        self._tokens += tokens
        seconds = self._seconds()
        left = _clock(seconds / self._asked * (self._to_ask - self._asked))
        self._step(f"{self._tokens / seconds:.0f} tokens/s, {left} of asking left")

    def judging(self) -> None:
        """From here on verdicts are timed."""
        self._began = time.monotonic()

    def judged(self) -> None:
        """One verdict more."""
        self._judged += 1
        rate = self._judged / self._seconds()
        self._step(f"{rate:.1f} verdicts/s, {_clock((self._to_judge - self._judged) / rate)} left")

    def _seconds(self) -> float:
        return max(time.monotonic() - self._began, 1e-6)

    def _step(self, note: str) -> None:
        self._done += 1
        self._tell(note)

    def _tell(self, note: str) -> None:
        if self._progress:
            self._progress(self._done, self._total, note)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
