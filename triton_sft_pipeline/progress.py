"""Progress on a terminal: a bar with rate and time left, on standard error so that standard output stays clean for
pipes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


def on_a_terminal() -> bool:
    """Whether a person is watching: bars in a log file are noise."""
    return sys.stderr.isatty()


@contextmanager
def progress_bar(
    what: str, show: bool | None = None, resumes: bool = False, unit: str = "it"
) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (done, total).

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

        def update(done: int, total: int) -> None:
            nonlocal started
            if not started:
                started = True
                bar.initial = done
                # Starts the clock again, and counts from `initial`.
                bar.reset(total)
            bar.total = total
            bar.update(done - bar.n)

        yield update
