"""Lets many tasks run together, or one alone: measurements and second attempts must not be disturbed by others.

Like a readers-writer lock that changes sides seldom. Each change costs the time in which the last of those together
end and nobody else may begin, so those who want to be alone are let in a few at a time, one after the other.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 1.0
"""How long one may wait to be alone before newcomers are held back for it; and how long one of those together may take
before nobody is held back any more, because being alone is far off anyway."""


class Traffic:
    """Who may run.

    Args:
        batch: newcomers are held back at once when so many wait to be alone.
    """

    def __init__(self, batch: int = 1) -> None:
        self._batch = batch
        self._changed = threading.Condition()
        self._together: dict[object, float] = {}
        self._waiting: dict[object, float] = {}
        self._alone = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run beside others."""
        me = object()
        with self._changed:
            while self._alone or self._holds_back():
                self._changed.wait(PATIENCE_S / 4)
            self._together[me] = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                del self._together[me]
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run with nothing beside."""
        me = object()
        with self._changed:
            self._waiting[me] = time.monotonic()
            try:
                self._changed.wait_for(lambda: not self._alone and not self._together)
                self._alone = True
            finally:
                del self._waiting[me]
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()

    def _holds_back(self) -> bool:
        """Whether those who want to be alone go first."""
        now = time.monotonic()
        if now - min(self._together.values(), default=math.inf) > PATIENCE_S:
            return False
        waited = now - min(self._waiting.values(), default=math.inf)
        # Once nobody is left, those who wait take their turns before anybody joins.
        return len(self._waiting) >= self._batch or waited > PATIENCE_S or (bool(self._waiting) and not self._together)
