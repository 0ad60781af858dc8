"""Stand-ins for children that answer as a test says, and values as they come over the wire."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np

from triton_sft_pipeline.verification.peer import Peer
from triton_sft_pipeline.verification.references import Reference, Trial
from triton_sft_pipeline.verification.wire import Array, Value

Answer = dict[str, Any]
Serve = Callable[[socket.socket], None]
WAIT_S = 10.0


def array(values: Any, dtype: str = "float32") -> Array:
    """An array of the wire with these elements."""
    elements = np.array(values, dtype=dtype)
    return Array(dtype, elements.shape, elements.tobytes())


def numbers(value: Any) -> Any:
    """The elements of a contiguous array of the wire."""
    return np.frombuffer(bytes(value.data), dtype=value.dtype).reshape(value.shape)


class ScriptedPeer:
    """Answers like a `Peer` with the methods of an object that are named like the questions.

    Attributes:
        asked: the questions so far, with their arguments.
    """

    def __init__(self, child: Any) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._child = child

    def ask(self, do: str, clock: Any, max_bytes: int | None = 0, alone: bool = False, **fields: Any) -> Answer:
        self.asked.append((do, fields))
        answer: Answer = getattr(self._child, do)(**fields)
        return answer

    @contextmanager
    def using_gpu(self, clock: Any) -> Iterator[None]:
        self.asked.append(("enter", {}))
        yield
        self.asked.append(("leave", {}))

    def names(self) -> list[str]:
        """The names of the questions so far."""
        return [name for name, _ in self.asked if name not in ("enter", "leave")]


class FakeTime:
    """The module `time` with a clock that only a test moves on, in seconds from now."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.passed = 0.0

    def monotonic(self) -> float:
        return self._began + self.passed

    def perf_counter(self) -> float:
        return self.passed


def doubling(values: tuple[list[float], ...] = ([1.0, -2.0, 3.0], [-4.0, 5.0, 6.0]), **fields: Any) -> Reference:
    """A problem whose module doubles its input, drawn twice, with a mixture of both draws."""
    trials = tuple(trial(draw) for draw in values)
    mixed = [first if index % 2 else second for index, (first, second) in enumerate(zip(*values[:2], strict=True))]
    derived: dict[str, Any] = {"mixed": trial(mixed), "mixable": True, "compute": 3.0}
    return Reference(trials=trials, **(derived | fields))


def trial(draw: list[float], after: Value = None) -> Trial:
    """A trial of `doubling`."""
    inputs = array(draw)
    return Trial((inputs,), array(2 * numbers(inputs)), after)


class Doubler:
    """An honest kernel's child for `doubling`, as far as `examination` asks it.

    Args:
        change: what a test makes of each answer to a call, by its number from 0 on.
    """

    def __init__(self, change: Callable[[int, Answer], Answer] = lambda number, answer: answer) -> None:
        self._change = change
        self._calls = 0
        self._first: Any = None
        self._inputs: Any = None

    def load(self, **fields: Any) -> Answer:
        return {"contract": "name", "bindings": 1}

    def call(self, inputs: Any, reuse: bool, sizes: tuple[int, ...]) -> Answer:
        self._inputs = inputs
        output = array(2 * numbers(inputs[0]))
        self._first = output if self._first is None else self._first
        work = {"launches": 1, "side_launches": 0, "compute": 0.0, "copy": 0.0, "scalars": 0, "operators": ()}
        answer = {"output": output, "inputs": None, "arguments": (), "aliases": (), **work}
        self._calls += 1
        return self._change(self._calls - 1, answer)

    def recall(self) -> Answer:
        return {"output": self._first}

    def inspect(self) -> Answer:
        return {}

    def ablate(self, inputs: Any, sizes: tuple[int, ...]) -> Answer:
        inputs = self._inputs if inputs is None else inputs
        return {"output": array(np.zeros(numbers(inputs[0]).shape)), "arguments": ()}


@contextmanager
def connected(serve: Serve, traffic: Any = None) -> Iterator[Peer]:
    """A peer whose child is a thread that runs `serve`; its end of the socket is closed when that returns."""
    ours, theirs = socket.socketpair()

    def run() -> None:
        # A child that ends in the middle, or is hung up on, says no more than that.
        with theirs, suppress(SystemExit, ConnectionError):
            serve(theirs)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield Peer(SimpleNamespace(socket=ours, end=lambda timeout_s: None), traffic)  # type: ignore[arg-type]
    finally:
        ours.close()
        thread.join(WAIT_S)
        assert not thread.is_alive()
