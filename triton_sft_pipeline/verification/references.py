"""What the judge knows of each problem, found out once: kernels for one problem share its draws and expected outputs.

Keeps a bounded amount in memory and forgets the problems used longest ago. Knows nothing of kernels.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from triton_sft_pipeline.files import sha256_bytes
from triton_sft_pipeline.verification.verdict import Finding
from triton_sft_pipeline.verification.wire import Value, nbytes

# Evaluation judges several answers for one problem in a row; more than this is not needed for that.
_MAX_PROBLEMS = 64
_MAX_BYTES = 1 << 30
_HUGE_BYTES = 2 << 30
# Slower than any machine that is worth judging on: what is on its way for longer is stuck.
_LEAST_BYTES_A_SECOND = 100e6
_LEAST_MOVING_S = 30.0
_PLAIN = ("mixable", "class_name", "compute", "copy", "aliases", "uses_bfloat16")


@dataclass(frozen=True)
class Trial:
    """Inputs and what the reference makes of them.

    Attributes:
        inputs: a tuple.
        output: what the reference returns.
        after: the inputs as the reference leaves them; None when it leaves them alone.
        slack: an extra absolute tolerance for each tensor of the output.
    """

    inputs: Value
    output: Value
    after: Value = None
    slack: tuple[float, ...] = ()


@dataclass(frozen=True)
class Reference:
    """A problem as the judge knows it.

    Attributes:
        failure: why it cannot be judged; then nothing else is set.
        trials: independent draws.
        mixed: a trial whose inputs are an element-wise mixture of the first two draws.
        shifted: a trial whose inputs lie on both sides of zero, where all draws are non-negative.
        negative: a trial whose inputs are negative, where all draws are non-negative.
        sparse: a trial with many zeros, where all draws give the same output.
        mixable: the reference runs on any mixture of draws.
        kernel_arguments: the arguments `state`, `available` and `init_inputs` of `KernelSession.load`.
        class_name: the module under test.
        compute, copy: the reference's work, as `operators` counts it.
        aliases: outputs that share memory with an input, by position.
        uses_bfloat16: the problem has something to do with this dtype.
    """

    failure: Finding | None = None
    trials: tuple[Trial, ...] = ()
    mixed: Trial | None = None
    shifted: Trial | None = None
    negative: Trial | None = None
    sparse: Trial | None = None
    mixable: bool = False
    kernel_arguments: dict[str, Any] = field(default_factory=dict)
    class_name: str = ""
    compute: float = 0.0
    copy: float = 0.0
    aliases: tuple[int, ...] = ()
    uses_bfloat16: bool = False

    @property
    def all_trials(self) -> list[Trial]:
        """The draws, and the trials that were derived from them."""
        derived = (self.mixed, self.shifted, self.negative, self.sparse)
        return [*self.trials, *(trial for trial in derived if trial is not None)]

    @property
    def is_huge(self) -> bool:
        """Too large to be sent to a process twice."""
        return len(self.all_trials) == 1 and self.output_bytes > _HUGE_BYTES

    @property
    def output_bytes(self) -> int:
        """Bytes of one trial's outputs and inputs: what an honest answer may hold."""
        return max((nbytes(trial.output) + nbytes(trial.inputs) for trial in self.trials), default=0)

    @property
    def total_bytes(self) -> int:
        """Bytes of everything that is kept."""
        held = sum(nbytes(trial.inputs) + nbytes(trial.output) + nbytes(trial.after) for trial in self.all_trials)
        return held + nbytes(self.kernel_arguments.get("state"))

    @property
    def moving_s(self) -> float:
        """Seconds that it may take to bring all inputs to a kernel and its outputs back, and again to compare them."""
        return round(_LEAST_MOVING_S + self.total_bytes / _LEAST_BYTES_A_SECOND)

    @classmethod
    def from_answer(cls, answer: dict[str, Any]) -> Reference:
        """Read the answer of `ReferenceSession.load`."""
        if "verdict" in answer:
            return cls(failure=Finding(answer["verdict"], answer["detail"]))
        return cls(
            trials=tuple(Trial(**trial) for trial in answer["trials"]),
            mixed=_trial(answer["mixed"]),
            shifted=_trial(answer["shifted"]),
            negative=_trial(answer["negative"]),
            sparse=_trial(answer["sparse"]),
            kernel_arguments={name: answer[name] for name in ("state", "available", "init_inputs")},
            **{name: answer[name] for name in _PLAIN},
        )


def _trial(fields: dict[str, Any] | None) -> Trial | None:
    return None if fields is None else Trial(**fields)


@dataclass
class _Entry:
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    reference: Reference | None = None


class ReferenceCache:
    """References by their exact code. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    @contextmanager
    def borrow(self, pytorch_code: str, prepare: Callable[[str], Reference], wait: bool = True) -> Iterator[Reference]:
        """The reference for this code; prepared now if need be, by one caller while others wait for it.

        Args:
            pytorch_code: the problem.
            prepare: called with the code.
            wait: false for a caller that others wait for: it prepares one for itself while another is at it.
        """
        key = sha256_bytes(pytorch_code.encode("utf-8", "surrogatepass"))
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
            entry.users += 1
        try:
            if entry.lock.acquire(blocking=wait):
                try:
                    if entry.reference is None:
                        entry.reference = prepare(pytorch_code)
                finally:
                    entry.lock.release()
                reference = entry.reference
            else:
                reference = prepare(pytorch_code)
            yield reference
        finally:
            with self._lock:
                entry.users -= 1
                self._forget_oldest()

    def _forget_oldest(self) -> None:
        held = sum(entry.reference.total_bytes for entry in self._entries.values() if entry.reference is not None)
        for key, entry in list(self._entries.items()):
            if len(self._entries) <= _MAX_PROBLEMS and held <= _MAX_BYTES:
                break
            if entry.users == 0:
                del self._entries[key]
                held -= entry.reference.total_bytes if entry.reference is not None else 0
