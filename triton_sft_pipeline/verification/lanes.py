"""The processes that one of the judge's workers has at hand: a reference's, kept, and a kernel's, always a fresh one.

The next kernel's process is started while the last one is still being judged, so that nobody waits for a fork or a CUDA
context. Knows nothing of verdicts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

from triton_sft_pipeline.verification.peer import Peer
from triton_sft_pipeline.verification.sandbox.client import Child, ZygoteClient, ZygoteDiedError
from triton_sft_pipeline.verification.sandbox.confine import Limits
from triton_sft_pipeline.verification.traffic import Traffic

_READY_TIMEOUT_S = 120.0


class Lane:
    """One worker's processes. For one thread at a time.

    Args:
        zygote: starts them.
        limits: what a kernel's process and a reference's may use.
        traffic: who may use the GPU; None without one.
    """

    def __init__(self, zygote: ZygoteClient, limits: dict[str, Limits], traffic: Traffic | None) -> None:
        self._zygote = zygote
        self._limits = limits
        self._traffic = traffic
        self._reference: Peer | None = None
        self._spare: Child | None = None

    @contextmanager
    def kernel(self) -> Iterator[Peer]:
        """A fresh process for a kernel, killed with all that it started when the block ends.

        Raises:
            ZygoteDiedError: there is none to be had; may be tried again.
        """
        child = self._spare or self._zygote.spawn("kernel", self._limits["kernel"])
        self._spare = None
        try:
            peer = self._ready(child)
            self._spare = self._zygote.spawn("kernel", self._limits["kernel"])
            yield peer
        finally:
            child.close()

    def reference(self) -> Peer:
        """The process for references, started when there is none.

        Raises:
            ZygoteDiedError: as above.
        """
        if self._reference is None:
            child = self._zygote.spawn("reference", self._limits["reference"])
            try:
                self._reference = self._ready(child)
            except BaseException:
                child.close()
                raise
        return self._reference

    def drop_reference(self) -> None:
        """Use another process for the next problem."""
        if self._reference is not None:
            self._reference.child.close()
            self._reference = None

    def close(self) -> None:
        """End all processes."""
        self.drop_reference()
        if self._spare is not None:
            self._spare.close()
            self._spare = None

    def _ready(self, child: Child) -> Peer:
        peer = Peer(child, self._traffic)
        try:
            peer.wait_ready(_READY_TIMEOUT_S)
        # No code of others has run in it yet: whatever is wrong is the machine's fault or the zygote's end.
        except Exception as error:
            end = child.end(1.0)
            raise ZygoteDiedError(f"a fresh process did not get ready ({error}; {end})") from error
        return peer


class Lanes:
    """As many lanes as there are workers."""

    def __init__(self, lanes: list[Lane]) -> None:
        self._all = lanes
        self._free: SimpleQueue[Lane] = SimpleQueue()
        for lane in lanes:
            self._free.put(lane)

    @contextmanager
    def take(self) -> Iterator[Lane]:
        """A lane that nobody else uses until the block ends."""
        lane = self._free.get()
        try:
            yield lane
        finally:
            self._free.put(lane)

    def close(self) -> None:
        """End all processes. Nobody may be using a lane."""
        for lane in self._all:
            lane.close()
