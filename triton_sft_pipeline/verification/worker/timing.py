"""Measures how long a call takes on a GPU, in blocks of fresh inputs. Runs in the process that is measured.

Knows nothing of kernels, references and verdicts. Whoever measures two calls asks each process for short blocks in turn
and holds its own clock against `Bench.queue`: what a measured process says of itself is not proof.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from triton_sft_pipeline.verification.worker import mixing

MIN_SETS, MAX_SETS = 2, 8
POOL_BYTES = 1 << 30
_HUGE_SET_BYTES = 4 << 30
_MIN_CALLS, _SETTLED_CALLS, _SETTLED_WITHIN, _SETTLE_S = 3, 5, 1.25, 0.02
# A sleep must outlast Python's way to the GPU, which varies, and the sleep's own launch and the events' beside it.
_COVER_FACTOR, _COVER_MARGIN_MS = 1.5, 0.03
# A launch may take this many times as long as in the warm-up; beyond that it waits for something.
_MOST_SLOWER = 4.0
# A call that takes longer to launch is slow to launch, or waits for the GPU inside; more sleep would not hide that.
_LONG_LAUNCH_MS = 2.0
_MAX_QUEUE_SLEEP_MS = 50.0
# CUDA holds about a thousand launches; then the caller waits for the GPU, and the sleep no longer covers the calls.
_MAX_QUEUED = 100
# Twice the L2 cache: whatever replacement it uses, nothing of the inputs is left in it.
_FLUSH_FACTOR = 2
# More than any GPU's clock: a sleep is never too short. Measuring the clock would need a GPU that nobody else uses.
_CYCLES_PER_MS = 3_000_000


class Clock(Protocol):
    """What `Bench` needs of a device."""

    def mark(self) -> Any:
        """A mark in the device's order of work, behind all that was handed to it so far."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks; only after `synchronize`."""

    def flush(self) -> None:
        """Empty the device's cache."""

    def sleep(self, ms: float) -> None:
        """Let the device do nothing for so long; the caller goes on."""

    def synchronize(self) -> None:
        """Wait until the whole device is idle."""

    def now(self) -> float:
        """The host's time in seconds."""

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record what `call` hands to the device; return a function that does it again, and the output it fills."""


class CudaClock:
    """The clock of the current CUDA device and of its current stream.

    Make it before foreign code is loaded: it keeps the functions that it needs, those of torch's C layer where there is
    one, so that replacing a function or a method of torch.cuda later does not reach it.
    """

    def __init__(self) -> None:
        import torch

        torch.cuda.init()
        self._device = torch.cuda.current_device()
        self._stream = torch.cuda.current_stream()
        event = self._event = torch._C._CudaEventBase
        self._record, self._elapsed, self._zero = event.record, event.elapsed_time, torch._C.TensorBase.zero_
        self._synchronize, self._sleep, self._now = torch._C._cuda_synchronize, torch._C._cuda_sleep, time.perf_counter
        self._capturing = (torch.cuda.graph, torch.cuda.CUDAGraph, torch.cuda.graph_pool_handle)
        self._streams = (torch.cuda.Stream, torch.cuda.stream, torch.cuda.set_stream)
        cache = torch.cuda.get_device_properties(self._device).L2_cache_size
        self._junk = torch.empty(_FLUSH_FACTOR * cache, dtype=torch.int8, device="cuda")

    def mark(self) -> Any:
        event = self._event(enable_timing=True, blocking=False, interprocess=False)
        self._record(event, self._stream)
        return event

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._elapsed(start, end))

    def flush(self) -> None:
        self._zero(self._junk)

    def sleep(self, ms: float) -> None:
        if ms > 0:
            self._sleep(int(ms * _CYCLES_PER_MS))

    def synchronize(self) -> None:
        self._synchronize()

    def now(self) -> float:
        return self._now()

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record a CUDA graph of `call` on a stream of its own.

        Raises:
            Exception: whatever makes it impossible. The current stream and torch's allocator are as before.
        """
        graph_context, graph_class, pool_handle = self._capturing
        new_stream, on_stream, _ = self._streams
        graph, pool, stream = graph_class(), pool_handle(), new_stream()
        self.synchronize()
        # Libraries set themselves up when first used on a stream, which cannot be recorded.
        with on_stream(stream):
            call()
        self.synchronize()
        try:
            # Another thread's calls do not disturb this recording, nor it theirs.
            with graph_context(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                output = call()
        except BaseException:
            self._recover(pool)
            raise
        return graph.replay, output

    def _recover(self, pool: Any) -> None:
        """Undo what torch leaves behind when a recording fails half-way: it stays on the recording's stream, its
        allocator and its random numbers in the recording's mode. Each may be undone already; then undoing it fails."""
        import torch

        self._streams[2](self._stream)
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self._device, pool)
        with contextlib.suppress(Exception):
            fresh = torch.Generator(device="cuda").graphsafe_get_state()
            torch.cuda.default_generators[self._device].graphsafe_set_state(fresh)
        with contextlib.suppress(Exception):
            self.synchronize()


@dataclass(frozen=True)
class Settled:
    """How a call behaves once it is warm: host time until it returns, and until the device is done, in ms."""

    enqueue_ms: float
    call_ms: float
    calls: int

    @property
    def max_queued(self) -> int:
        """How many calls the longest sleep of `Bench.queue` covers: 1 to 100."""
        spare = (_MAX_QUEUE_SLEEP_MS - _COVER_MARGIN_MS) / _COVER_FACTOR
        return max(1, min(_MAX_QUEUED, int(spare / max(1e-9, self.enqueue_ms))))


class Bench:
    """Measures one call on inputs mixed from two draws.

    `call` takes the inputs as positional arguments. `a` and `b` are two draws: tuples of plain values with tensors on
    the device that `clock` times. Each call gets tensors made for it alone, so it may write into them and keep them.
    """

    def __init__(self, call: Callable[..., Any], a: tuple[Any, ...], b: tuple[Any, ...], clock: Clock) -> None:
        self._call, self._a, self._b, self._clock = call, a, b, clock
        self._sets = [mixing.duplicate(a) for _ in range(pool_size(mixing.nbytes(a)))]
        self._settled: Settled | None = None
        self._enqueue_ms = 0.0
        # How often the last block was run.
        self.passes = 1
        # A copy of the output of the iteration that was to be kept in the last block.
        self.kept: Any = None

    def warm_up(self) -> Settled:
        """Call at least 3 times, and on until the time of a call has settled, for at most about 20 ms more.

        The first calls compile and tune. Measures how long a call takes to return, without waiting for the device.
        """
        clock, enqueued, done, deadline = self._clock, list[float](), list[float](), 0.0
        while True:
            inputs = self._filled(len(done), len(done))
            clock.flush()
            clock.synchronize()
            began = clock.now()
            self._call(*inputs)
            enqueued.append(1000 * (clock.now() - began))
            clock.synchronize()
            ended = clock.now()
            done.append(1000 * (ended - began))
            if len(done) == _MIN_CALLS:
                deadline = ended + _SETTLE_S
            if len(done) >= _MIN_CALLS and (_has_settled(done) or ended + done[-1] / 1000 > deadline):
                break
        enqueue_ms, call_ms = (statistics.median(times[-_SETTLED_CALLS:]) for times in (enqueued, done))
        self._settled = Settled(enqueue_ms, call_ms, len(done))
        self._enqueue_ms = self._settled.enqueue_ms
        return self._settled

    def block(self, seeds: Sequence[int], keep: int | None = None) -> list[float]:
        """Milliseconds on the device for one call with each seed's inputs, with a cold cache.

        Before each call the device is given a sleep that outlasts the launch, so that it never waits for Python while
        it is timed. A call that takes more than 2 ms to return is not covered in full. A copy of the output of call
        number `keep` is in `kept` afterwards, and nothing of any other.
        """
        settled = self._warm()

        def prepare(index: int, seed: int) -> Callable[[], Any]:
            return partial(self._call, *self._filled(index, seed))

        cover = _cover_ms(min(self._enqueue_ms, _LONG_LAUNCH_MS))
        times, launched_ms = self._measure(prepare, seeds, keep, cover)
        self.passes = 1
        slowest = min(max(launched_ms), _MOST_SLOWER * settled.enqueue_ms)
        longer = _cover_ms(min(slowest, _LONG_LAUNCH_MS))
        if statistics.median(launched_ms) > cover and longer > cover:
            # The processor is busier than it was in the warm-up: sleep longer from now on.
            self._enqueue_ms = slowest
            self.passes = 2
            times, _ = self._measure(prepare, seeds, keep, longer)
        return times

    def queue(self, n: int, cover: int | None = None) -> None:
        """Call `n` times back to back and wait until the whole device is idle; times nothing.

        The device sleeps first, long enough for Python to hand over `cover` calls (`n` unless told). An outside clock
        that times `queue(n)` and `queue(0, cover=n)` finds `n` times the device's time for a call as the difference,
        whatever streams it runs on: all but the calls is the same. `cover` should be at most `Settled.max_queued`.
        """
        cover = n if cover is None else cover
        enqueue_ms = self._warm().enqueue_ms
        for index in range(len(self._sets)):
            self._filled(index, index)
        inputs = [mixing.views(self._sets[index % len(self._sets)]) for index in range(n)]
        self._clock.synchronize()
        with _no_collection():
            self._clock.sleep(min(_cover_ms(enqueue_ms * cover), _MAX_QUEUE_SLEEP_MS))
            for arguments in inputs:
                self._call(*arguments)
            self._clock.synchronize()

    def graph(self, seeds: Sequence[int] = range(20), keep: int | None = None) -> list[float] | None:
        """As `block`, but the call is recorded as a CUDA graph once and replayed: without any launch by Python.

        None when it cannot be recorded or replayed. Torch need not recover fully from a recording that failed, so
        this is best asked last of a process.
        """
        self._warm()
        fixed = self._filled(0, 0)
        try:
            replay, output = self._clock.capture(lambda: self._call(*fixed))

            def replayed() -> Any:
                replay()
                return output

            def prepare(index: int, seed: int) -> Callable[[], Any]:
                mixing.refill(self._sets[0], self._a, self._b, seed)
                return replayed

            return self._measure(prepare, seeds, keep, _cover_ms(0.0))[0]
        # Foreign code and three libraries: whatever they raise, there is no number.
        except Exception:
            self.kept = None
            return None

    def _measure(
        self,
        prepare: Callable[[int, int], Callable[[], Any]],
        seeds: Sequence[int],
        keep: int | None,
        cover_ms: float,
    ) -> tuple[list[float], list[float]]:
        """Times on the device, and times that handing the calls over took on the host."""
        clock, marks, launched_ms = self._clock, list[tuple[Any, Any]](), list[float]()
        self.kept = None
        with _no_collection():
            for index, seed in enumerate(seeds):
                run = prepare(index, seed)
                clock.flush()
                clock.sleep(cover_ms)
                began = clock.now()
                start = clock.mark()
                output = run()
                marks.append((start, clock.mark()))
                launched_ms.append(1000 * (clock.now() - began))
                if index == keep:
                    self.kept = _copy(output)
                # Its memory must be free for the next output, as it is between two calls of a model.
                del output
        clock.synchronize()
        return [clock.elapsed_ms(start, end) for start, end in marks], launched_ms

    def _filled(self, index: int, seed: int) -> Any:
        """Input set number `index`, round the pool, with the values of `seed`."""
        chosen = self._sets[index % len(self._sets)]
        mixing.refill(chosen, self._a, self._b, seed)
        return mixing.views(chosen)

    def _warm(self) -> Settled:
        return self._settled or self.warm_up()


def pool_size(set_bytes: int) -> int:
    """How many input sets to keep, all at addresses of their own: 2 to 8, within 1 GiB; one if a set is over 4 GiB."""
    if set_bytes > _HUGE_SET_BYTES:
        return 1
    return max(MIN_SETS, min(MAX_SETS, POOL_BYTES // max(1, set_bytes)))


def _cover_ms(launch_ms: float) -> float:
    return _COVER_FACTOR * launch_ms + _COVER_MARGIN_MS


def _has_settled(times: list[float]) -> bool:
    """Whether the last calls took about as long as the fastest so far."""
    return len(times) > _SETTLED_CALLS and max(times[-_SETTLED_CALLS:]) <= _SETTLED_WITHIN * min(times)


def _copy(value: Any) -> Any:
    """An output with its tensors copied, so that a later call that writes into the same buffer does not change it.

    Other objects, tensor subclasses among them, stay what they are: foreign code is not run here.
    """
    import torch

    if type(value) in (list, tuple):
        return tuple(_copy(item) for item in value)
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    return value.detach().clone() if type(value) in (torch.Tensor, torch.nn.Parameter) else value


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without garbage collection: it stops Python for longer than a sleep covers."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
