"""Keeping the libraries' own progress bars off unless somebody asked for them. Knows nothing of what is in progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def library_bars(show: bool) -> Iterator[None]:
    """Show or hide transformers' bars (loading weights, writing shards) inside the block, and leave the switch as it
    was."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    _switch(show)
    try:
        yield
    finally:
        _switch(before)


def _switch(on: bool) -> None:
    from transformers.utils import logging

    if on:
        logging.enable_progress_bar()
    else:
        logging.disable_progress_bar()
