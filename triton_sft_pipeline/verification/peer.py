"""The judge's side of a conversation with one of its children: questions with an answer each, over a socket.

Trusts nothing that a child sends: an answer must carry the question's nonce, come alone and stay within its size; see
`wire` for the rest. The child's side is `session`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from triton_sft_pipeline.verification import wire
from triton_sft_pipeline.verification.sandbox.client import Child
from triton_sft_pipeline.verification.traffic import Traffic
from triton_sft_pipeline.verification.wire import WireError


class Peer:
    """The judge's side: one child and what is asked of it.

    Args:
        child: a child that serves.
        traffic: who may use the GPU; None where there is none.

    Attributes:
        alone: whoever asks holds the GPU alone, so that the child need not wait for it.
    """

    def __init__(self, child: Child, traffic: Traffic | None) -> None:
        self.child = child
        self._traffic = traffic
        self._uses_gpu = False
        self.alone = False

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the child has set itself up; before that no time of a kernel passes.

        Raises:
            TimeoutError, ClosedError, WireError: it did not come to that.
        """
        if wire.receive(self.child.socket, time.monotonic() + timeout_s, max_bytes=0) != {"ready": True}:
            raise WireError("the child did not greet")

    @contextmanager
    def using_gpu(self, clock: Clock) -> Iterator[None]:
        """Within this block the child may use the GPU without asking each time, beside others."""
        if self._traffic is None or self.alone:
            yield
            return
        with clock.waiting(self._traffic.together()):
            self._uses_gpu = True
            try:
                yield
            finally:
                self._uses_gpu = False

    def ask(
        self, do: str, clock: Clock, max_bytes: int | None = 0, alone: bool = False, **fields: Any
    ) -> dict[str, Any]:
        """Ask one question and wait for its answer.

        Args:
            do: the handler's name; `fields` are its arguments.
            clock: the time that the child has left; waiting for the GPU is not counted.
            max_bytes: the most tensor bytes that the answer may hold; None for any, from children that are trusted.
            alone: the caller holds the GPU alone, so that the child need not be kept waiting.

        Raises:
            TimeoutError: no answer in time.
            ClosedError: the child is gone.
            WireError: the answer is none.
        """
        nonce = secrets.token_hex(16)
        sock = self.child.socket
        wire.send(sock, {"do": do, "nonce": nonce, **fields}, clock.deadline)
        in_use = False
        with ExitStack() as held:
            while True:
                message = wire.receive(sock, clock.deadline, max_bytes)
                if message == {"want": "gpu"}:
                    if in_use:
                        raise WireError("the GPU was asked for twice")
                    in_use = True
                    if self._traffic is not None and not (alone or self.alone or self._uses_gpu):
                        held.enter_context(clock.waiting(self._traffic.together()))
                    wire.send(sock, {"go": True}, clock.deadline)
                elif message == {"done": "gpu"}:
                    in_use = False
                    held.close()
                elif message.pop("nonce", None) == nonce:
                    if wire.has_more(sock):
                        raise WireError("more than an answer came")
                    return message
                else:
                    raise WireError("an answer to nothing that was asked")


class Clock:
    """A limit of time that can be moved.

    Args:
        seconds: the limit, from now.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds

    @contextmanager
    def waiting(self, turn: AbstractContextManager[None]) -> Iterator[None]:
        """Enter `turn`; the time until it is ours is not counted."""
        began = time.monotonic()
        with turn:
            self.deadline += time.monotonic() - began
            yield
