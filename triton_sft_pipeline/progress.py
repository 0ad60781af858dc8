"""Progress: a bar with rate and time left on a terminal, a line now and then in a log. On standard error, so that
standard output stays clean for pipes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm


class Progress(Protocol):
    """What is called with how far a step is."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        """`note` is shown in place of rate and time left, for steps that know these better than a bar can; empty leaves
        the last one standing.
        """
        ...


_WITH_NOTE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


LINE_EVERY_S = 15.0
"""Seconds between two lines in a log."""


def on_a_terminal() -> bool:
    """Whether a person is watching: bars in a log file are noise."""
    return sys.stderr.isatty()


@contextmanager
def progress_bar(what: str, show: bool | None = None, resumes: bool = False, unit: str = "it") -> Iterator[Progress]:
    """A function to call with (done, total) or (done, total, note).

    Args:
        what: what is counted, shown before the bar.
        unit: of the rate; "B" is shown in kB, MB and GB.
        show: None shows it when standard error is a terminal. True also shows something where it is none: a line every
            `LINE_EVERY_S` seconds.
        resumes: the first call tells what earlier runs have done, before this one does anything: rate and time left go
            by this run alone.
    """
    if show and not on_a_terminal():
        yield Lines(what)
        return
    hidden = not (on_a_terminal() if show is None else show)
    with tqdm(desc=what, disable=hidden, dynamic_ncols=True, leave=False, unit=unit, unit_scale=unit == "B") as bar:
        started = not resumes

        def update(done: int, total: int, note: str = "") -> None:
            nonlocal started
            if not started:
                started = True
                bar.initial = done
                # Starts the clock again, and counts from `initial`.
                bar.reset(total)
            if note:
                bar.bar_format = _WITH_NOTE
                bar.set_postfix_str(note, refresh=False)
            bar.total = total
            if done == bar.n:
                # tqdm draws only what moves; here the note has.
                bar.refresh()
            bar.update(done - bar.n)

        yield update


class Lines:
    """A `Progress` for a log: the first call is a line, and then whatever is the latest, every `LINE_EVERY_S` seconds.

    Args:
        what: the beginning of each line.
    """

    def __init__(self, what: str) -> None:
        self._what, self._note = what, ""
        self._began = self._next = time.monotonic()

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        """See `Progress`."""
        self._note = note or self._note
        self.say(f"{done}/{total}" + (f", {self._note}" if self._note else ""))

    def say(self, text: str) -> None:
        """The same for steps whose end is not known."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LINE_EVERY_S
            after = tqdm.format_interval(now - self._began)
            print(f"{self._what}: {text} [{after}]", file=sys.stderr, flush=True)
