"""Makes work on other streams late on purpose, so that a kernel that does not wait for it is found and not lucky.

Sits in the kernel's own process, on a GPU. Knows nothing of what is launched.
"""

from __future__ import annotations

from typing import Any

# Some milliseconds on any GPU: longer than it takes to copy a tensor's first values to the host.
_LATE_CYCLES = 20_000_000


class SideStreams:
    """Looks at the current stream. Make it before kernel code is loaded: it keeps the functions that it needs.

    Attributes:
        late: launches on other streams than the default one so far, each of which was held up.
    """

    def __init__(self, cuda: Any = None) -> None:
        if cuda is None:
            import torch

            cuda = torch.cuda
        self.late = 0
        self._used: list[Any] = []
        self._current, self._default, self._sleep = cuda.current_stream, cuda.default_stream, cuda._sleep
        self._is_done = cuda.Stream.query

    def hold_up(self) -> None:
        """Before a launch: let the current stream sleep, unless it is the one on which results are read."""
        if self._current() != self._default():
            self.late += 1
            self._used.append(self._current())
            self._sleep(_LATE_CYCLES)

    def left_behind(self) -> bool:
        """After a call, and after waiting for the stream that results are read on: whether work of the call on another
        one is not done. Whoever waits for it, on the host or on the GPU, has none left. Forgets the streams.
        """
        self._default().synchronize()
        used, self._used = self._used, []
        return not all(self._is_done(stream) for stream in used)
