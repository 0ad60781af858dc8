"""The judge's side of a conversation with one of its children: questions with an answer each, over a socket.

Trusts nothing that a child sends: an answer must carry the question's nonce, come alone and stay within its size; see
`wire` for the rest. The child's side is `session`.
"""

from __future__ import annotations

import enum
import secrets
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from triton_sft_pipeline.verification import wire
from triton_sft_pipeline.verification.sandbox.client import Child
from triton_sft_pipeline.verification.traffic import Traffic
from triton_sft_pipeline.verification.wire import WireError


class MovingTimeoutError(TimeoutError):
    """A child's time ran out for bringing inputs to a kernel and outputs back, which is not its kernel's time."""


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
            clock: the time that the child has left; waiting for the GPU is not counted. What the question and its
                answer take on their way, and the time in which the child says that it moves data, is counted apart.
            max_bytes: the most tensor bytes that the answer may hold; None for any, from children that are trusted.
            alone: the caller holds the GPU alone, so that the child need not be kept waiting.

        Raises:
            TimeoutError: no answer in time; MovingTimeoutError when data was on its way.
            ClosedError: the child is gone.
            WireError: the answer is none.
        """
        try:
            return self._ask(do, clock, max_bytes, alone, fields)
        except TimeoutError as error:
            if clock.counts is not Share.MOVING:
                raise
            detail = f"The kernel's process did not take its inputs and hand over its outputs in {clock.moving_s:g} s"
            raise MovingTimeoutError(f"{detail}, which are not counted as the kernel's time.") from error
        finally:
            clock.count(Share.JUDGE)

    def _ask(self, do: str, clock: Clock, max_bytes: int | None, alone: bool, fields: dict[str, Any]) -> dict[str, Any]:
        nonce = secrets.token_hex(16)
        sock = self.child.socket
        clock.count(Share.MOVING)
        wire.send(sock, {"do": do, "nonce": nonce, **fields}, clock.deadline)
        clock.count(Share.KERNEL)
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
                elif message in ({"moves": True}, {"moves": False}):
                    clock.count(Share.MOVING if message["moves"] else Share.KERNEL)
                elif message.pop("nonce", None) == nonce:
                    if wire.has_more(sock):
                        raise WireError("more than an answer came")
                    return message
                else:
                    raise WireError("an answer to nothing that was asked")


class Share(enum.Enum):
    """Whose time it is that passes."""

    KERNEL = "a child computes"
    MOVING = "data is on its way to a child or back"
    JUDGE = "the judge itself is at work"


class Clock:
    """A limit of time that can be moved.

    What it takes to bring gigabytes to a kernel and to look at what comes back says nothing about the kernel: it has
    limits of its own. A child's word decides which one its time is taken from, so a child that lies has a little more.

    Args:
        seconds: the limit for the child, from now.
        moving_s: the limit for moving data, and again for the judge's own work; None to take all from `seconds`.

    Attributes:
        counts: whose time passes at the moment.
    """

    def __init__(self, seconds: float, moving_s: float | None = None) -> None:
        self.seconds = seconds
        self.moving_s = moving_s
        self.counts = Share.KERNEL if moving_s is None else Share.JUDGE
        apart = 0.0 if moving_s is None else moving_s
        self._left = {Share.KERNEL: seconds, Share.MOVING: apart, Share.JUDGE: apart}
        self._since = time.monotonic()

    @property
    def deadline(self) -> float:
        """When the share that counts at the moment is used up."""
        return self._since + self._left[self.counts]

    @property
    def is_judge_late(self) -> bool:
        """Whether the judge's own work took longer than it may."""
        return self.counts is Share.JUDGE and time.monotonic() > self.deadline

    def count(self, share: Share) -> None:
        """From now on take the time that passes from this share, where it is told apart."""
        if self.moving_s is None:
            return
        now = time.monotonic()
        self._left[self.counts] -= now - self._since
        self.counts, self._since = share, now

    @contextmanager
    def waiting(self, turn: AbstractContextManager[None]) -> Iterator[None]:
        """Enter `turn`; the time until it is ours is not counted."""
        began = time.monotonic()
        with turn:
            self._since += time.monotonic() - began
            yield
