"""Keeps some processors free for what is being measured: its launches must not wait for other kernels' compilers.

Changes the calling process only, in a child of the zygote. Does nothing on a machine with few processors. Knows nothing
of measuring.
"""

from __future__ import annotations

import contextlib
import os

_RESERVED = 2
_FEWEST = 8
_ALL = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def stand_aside() -> None:
    """Run where measurements do not."""
    _run_on(sorted(_ALL)[_RESERVED:])


def come_forward() -> None:
    """Run on the reserved processors."""
    _run_on(sorted(_ALL)[:_RESERVED])


def _run_on(processors: list[int]) -> None:
    if len(_ALL) >= _FEWEST and os.sched_getaffinity(0) != set(processors):
        # Where it is not allowed there is nothing to lose but quiet.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, processors)
