"""The child's side of a measurement, the same for a kernel and for its reference: run blocks as the judge says.

Knows nothing of what is measured. The judge's side is `measurement`; the measuring itself is `timing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from triton_sft_pipeline.verification.wire import Value, nbytes
from triton_sft_pipeline.verification.worker import cores, tensors
from triton_sft_pipeline.verification.worker.session import GpuGate, Handler
from triton_sft_pipeline.verification.worker.timing import Bench, Clock, CudaClock


class BenchSession:
    """Handlers for measuring a call.

    Args:
        backend: "cuda", or "interpreter", where nothing is ever measured.
        gate: asks for the GPU.
        call: what is measured; takes a trial's inputs as positional arguments.
        failure: puts an exception in an answer's words.
        held: inputs that the process already holds, for a measurement that brings none.
        launches: how many Triton kernels were launched so far.
    """

    def __init__(
        self,
        backend: str,
        gate: GpuGate,
        call: Callable[..., Any],
        failure: Callable[[BaseException], dict[str, Value]],
        held: Callable[[], Any],
        launches: Callable[[], int] = lambda: 0,
    ) -> None:
        # Made now: it takes hold of CUDA's functions before any code that is not trusted is loaded.
        self._clock = CudaClock() if backend == "cuda" else None
        self._gate = gate
        self._call = call
        self._failure = failure
        self._held = held
        self._launches = launches
        self._bench: Any = None

    def rehearse(self) -> None:
        """Do once, on a few bytes, what measuring does: CUDA loads the code of each operation when it is first used."""
        import torch

        if self._clock is None:
            return
        draws = [(torch.randn(64), torch.arange(64)) for _ in range(2)]
        a, b = (tensors.from_wire(tensors.to_wire(draw), "cuda") for draw in draws)
        bench = Bench(lambda x, y: x.clone(), a, b, self._clock)
        bench.block([1, 2], keep=1)
        bench.queue(1)
        tensors.to_wire(bench.kept)

    def handlers(self) -> dict[str, Handler]:
        """The questions that are answered here."""
        return {"bench": self.bench, "block": self.block, "queue": self.queue, "graph": self.graph}

    def bench(self, a: Value, b: Value) -> dict[str, Value]:
        """Get ready to measure on mixtures of two draws: {"max_queued"}, see `queue`. None for what is held here."""

        def run() -> dict[str, Value]:
            cores.stand_aside()
            self._gate.moves(nbytes(a) + nbytes(b))
            first = self._held() if a is None else tensors.from_wire(a, "cuda")
            second = first if b is None else tensors.from_wire(b, "cuda")
            self._gate.computes()
            self._bench = Bench(self._call, first, second, cast(Clock, self._clock))
            return {"max_queued": self._bench.warm_up().max_queued}

        return self._guarded(run)

    def block(self, seeds: tuple[int, ...], keep: int | None) -> dict[str, Value]:
        """Measure one call for each seed: {"ms", "launches", "output"}; `output` is the kept call's."""

        def run() -> dict[str, Value]:
            cores.come_forward()
            before = self._launches()
            times = self._bench.block(list(seeds), keep)
            launches = (self._launches() - before) // self._bench.passes
            output = None if keep is None else tensors.to_plain(self._bench.kept, tensors.same)
            self._gate.moves(tensors.nbytes(output))
            output = tensors.to_wire(output)
            return {"ms": tuple(times), "launches": launches, "output": output}

        return self._guarded(run)

    def queue(self, count: int, room: int) -> dict[str, Value]:
        """Run `count` calls back to back, behind a pause that is long enough to launch `room` of them."""

        def run() -> dict[str, Value]:
            cores.come_forward()
            self._bench.queue(count, cover=room)
            return {}

        return self._guarded(run)

    def graph(self, seeds: tuple[int, ...], keep: int) -> dict[str, Value]:
        """As `block`, with replays of a CUDA graph of the call; "ms" is None when it cannot be captured."""

        def run() -> dict[str, Value]:
            cores.come_forward()
            times = self._bench.graph(list(seeds), keep)
            if times is None:
                return {"ms": None, "output": None}
            return {"ms": tuple(times), "output": tensors.to_wire(self._bench.kept)}

        return self._guarded(run)

    def _guarded(self, run: Callable[[], dict[str, Value]]) -> dict[str, Value]:
        import torch

        self._gate.enter()
        try:
            with torch.no_grad():
                return run()
        except BaseException as error:
            return self._failure(error)
