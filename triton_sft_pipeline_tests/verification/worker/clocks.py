"""A clock of the host, with which all that measures runs without a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class HostClock:
    """The clock of the host, for a device that is the host itself: marks are times."""

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed_ms(self, start: float, end: float) -> float:
        return 1000 * (end - start)

    def flush(self) -> None:
        pass

    def sleep(self, ms: float) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def now(self) -> float:
        return time.perf_counter()

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        raise NotImplementedError("the host has no graphs")
