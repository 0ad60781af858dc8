"""Progress on a terminal: a bar with rate and time left, on standard error so that standard output stays clean for
pipes.
"""

from __future__ import annotations

import sys
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


def on_a_terminal() -> bool:
    """Whether a person is watching: bars in a log file are noise."""
    return sys.stderr.isatty()


@contextmanager
def progress_bar(what: str, show: bool | None = None, resumes: bool = False, unit: str = "it") -> Iterator[Progress]:
    """A function to call with (done, total) or (done, total, note).

    Args:
        what: what is counted, shown before the bar.
        unit: of the rate; "B" is shown in kB, MB and GB.
        show: None shows it when standard error is a terminal.
        resumes: the first call tells what earlier runs have done, before this one does anything: rate and time left go
            by this run alone.
    """
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
            bar.update(done - bar.n)

        yield update
