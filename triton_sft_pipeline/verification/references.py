"""Prepares each problem once: several kernels for one problem share its drawn inputs and expected outputs.

Keeps a bounded number of problems on disk and forgets the ones used longest ago.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from triton_sft_pipeline.files import sha256_bytes
from triton_sft_pipeline.verification.verdict import Finding

_MAX_KEPT = 32


@dataclass
class Reference:
    """A problem as the judge knows it.

    Attributes:
        folder: where its code and its expected outputs lie; kernels' processes are not told of it.
        given: where its inputs and weights lie, which kernels' processes read.
        failure: why it cannot be judged, if so.
        trials: number of input draws.
        bytes: size of all inputs and outputs together.
        class_name: the module under test.
        uses_bfloat16: an input, weight or output has this dtype.
        time_ms: the reference's median time, once it was measured.
    """

    folder: Path
    given: Path
    failure: Finding | None = None
    trials: int = 0
    bytes: int = 0
    class_name: str = ""
    uses_bfloat16: bool = False
    time_ms: float | None = None


@dataclass
class _Entry:
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    reference: Reference | None = None


class ReferenceCache:
    """References by their exact code.

    Args:
        prepare: makes a reference from its code; called once for each.
        discard: removes what a reference left on disk.
    """

    def __init__(self, prepare: Callable[[str], Reference], discard: Callable[[Reference], None]) -> None:
        self._prepare = prepare
        self._discard = discard
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    @contextmanager
    def borrow(self, pytorch_code: str) -> Iterator[Reference]:
        """The reference for this code, prepared now if need be, and kept on disk until the block ends."""
        key = sha256_bytes(pytorch_code.encode("utf-8", "surrogatepass"))
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
            entry.users += 1
        try:
            with entry.lock:
                if entry.reference is None:
                    entry.reference = self._prepare(pytorch_code)
            yield entry.reference
        finally:
            with self._lock:
                entry.users -= 1
                forgotten = self._forget_oldest()
            for reference in forgotten:
                self._discard(reference)

    def _forget_oldest(self) -> list[Reference]:
        forgotten: list[Reference] = []
        for key, entry in list(self._entries.items()):
            if len(self._entries) <= _MAX_KEPT:
                break
            if entry.users == 0:
                del self._entries[key]
                if entry.reference is not None:
                    forgotten.append(entry.reference)
        return forgotten
