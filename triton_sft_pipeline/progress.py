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
def progress_bar(what: str, show: bool | None = None) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (done, total).

    Args:
        what: what is counted, shown before the bar.
        show: None shows it when standard error is a terminal.
    """
    hidden = not (on_a_terminal() if show is None else show)
    with tqdm(desc=what, disable=hidden, dynamic_ncols=True, leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
