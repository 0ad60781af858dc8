"""The child's side of a conversation with the judge: one answer to each question, over a socket.

A child that is about to use the GPU asks first, so that measurements run alone. It says when it moves much data, which
is not its kernel's time. Knows nothing of what is asked. The judge's side is `peer`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from triton_sft_pipeline.verification import wire
from triton_sft_pipeline.verification.wire import Value

Handler = Callable[..., dict[str, Value]]
# Moving less than this takes no time worth telling.
_SMALL = 1 << 20


class GpuGate:
    """The child's side of asking for the GPU. Without a GPU nobody has to ask."""

    def __init__(self, sock: socket.socket, needed: bool) -> None:
        self._socket = sock
        self._needed = needed
        self.entered = False
        self._moves = False

    def enter(self) -> None:
        """Wait until the GPU may be used, unless it may already."""
        if self._needed and not self.entered:
            wire.send(self._socket, {"want": "gpu"})
            wire.receive(self._socket)
            self.entered = True

    def leave(self) -> None:
        """Let measurements of others begin."""
        if self.entered:
            self.entered = False
            wire.send(self._socket, {"done": "gpu"})

    def moves(self, size: int) -> None:
        """Say that from now on so many bytes are moved, which is the judge's concern, and nothing is computed."""
        if size > _SMALL and not self._moves:
            self._moves = True
            wire.send(self._socket, {"moves": True})

    def computes(self) -> None:
        """Say that moving data is over."""
        if self._moves:
            self._moves = False
            wire.send(self._socket, {"moves": False})

    def answers(self) -> None:
        """Forget what was said in the course of a question: its answer ends all of it."""
        self.entered = self._moves = False


def serve(sock: socket.socket, gate: GpuGate, handlers: dict[str, Handler]) -> None:
    """Answer questions until the judge closes the connection."""
    wire.send(sock, {"ready": True})
    while True:
        try:
            question = wire.receive(sock)
        except wire.ClosedError:
            return
        nonce, handler = question.pop("nonce"), handlers[str(question.pop("do"))]
        gate.answers()
        answer = handler(**question)
        # The answer itself ends the use of the GPU.
        gate.answers()
        wire.send(sock, {**answer, "nonce": nonce})
