"""Finds out how much faster than its reference one right kernel is. Runs in the judge; only ever on a GPU.

Kernel and reference run in processes of their own, one block of calls at a time and nothing else on the GPU, in the
order reference, kernel, kernel, reference, so that a drift of the clocks meets both. Every call has inputs that neither
has seen before. Afterwards some of the kernel's measured calls are checked against the reference.

The times come from CUDA events in the kernel's own process, which could lie. So the judge also looks at its own clock
while the kernel runs many calls in a row: a kernel that claims to be much faster than that is not believed. This sees
work on other streams, too.
"""

from __future__ import annotations

import math
import secrets
import statistics
import time
from dataclasses import dataclass
from typing import Any

from triton_sft_pipeline.verification.compare import compare
from triton_sft_pipeline.verification.examination import reported
from triton_sft_pipeline.verification.peer import Clock, Peer
from triton_sft_pipeline.verification.references import Reference
from triton_sft_pipeline.verification.speedup import Speedup, estimate
from triton_sft_pipeline.verification.traffic import Traffic
from triton_sft_pipeline.verification.verdict import Finding
from triton_sft_pipeline.verification.wire import ClosedError, Value, WireError

LEAST_ROUNDS = 3
MOST_ROUNDS = 8
"""Rounds go on until all of them say the same of fast_1 and fast_2 by a wide margin, or there were this many. What is
bound by its launch gets the least: no number of rounds makes its speedup mean more.
"""

BLOCK = 10
"""Calls of the reference in a row; each round has two such blocks, and twice as many calls of the kernel in between."""

LAUNCH_BOUND_MS = 0.05
"""A reference below this takes less time than its launch; its speedup says little about the kernel."""

_RECHECK_BYTES = 64 << 20
_BLOCK_BUDGET_MS = 50.0
_CLEARLY = 1.25
_QUEUE = 10
# The pause before the calls lasts this many times as long as launching them took when nothing else ran.
_ROOMS = (1, 3, 5)
# Calls in a row find their inputs in the cache; the judge's clock is late at both ends, and less so the more calls.
_QUEUE_FACTOR = 2.0
_QUEUE_NOISE_MS = 0.04


@dataclass(frozen=True)
class Measurement:
    """Times of one kernel and its reference.

    Attributes:
        speedup: with its interval and the times behind it.
        launch_bound: see LAUNCH_BOUND_MS.
        graph_speedup: of CUDA graphs of both, measured when launch_bound; None when one cannot be captured.
        compile_ms: median time of the reference under torch.compile, when asked for.
    """

    speedup: Speedup
    launch_bound: bool
    graph_speedup: float | None = None
    compile_ms: float | None = None

    @property
    def compile_speedup(self) -> float | None:
        """Speedup against torch.compile."""
        return None if self.compile_ms is None else self.compile_ms / self.speedup.kernel_ms


class Unmeasurable(Exception):
    """No time could be measured, for a reason that is not the kernel's."""


@dataclass(frozen=True)
class Pair:
    """The two processes that are measured, and what they are measured on.

    Attributes:
        kernel: the child that was just examined.
        reference: a reference's child.
        problem: the problem, and `pytorch_code` its code.
        clock: the time that all of this may take.
    """

    kernel: Peer
    reference: Peer
    problem: Reference
    pytorch_code: str
    clock: Clock

    @property
    def draws(self) -> dict[str, Any]:
        """The two draws that measured calls are mixed from; one and the same where mixtures make no sense.

        None for what both processes hold already.
        """
        if self.problem.is_huge:
            return {"a": None, "b": None}
        trials = self.problem.trials
        return {"a": trials[0].inputs, "b": trials[1 if self.problem.mixable else 0].inputs}


def measure(pair: Pair, traffic: Traffic, compile_baseline: bool = False) -> Measurement | Finding:
    """Measure, or find that the kernel is no good after all.

    Raises:
        Unmeasurable: the reference failed, or time ran out.
        TimeoutError, ClosedError, WireError: the kernel's child did not answer as it should.
    """
    with pair.kernel.using_gpu(pair.clock):
        _ask_reference(pair, "adopt", code=pair.pytorch_code, class_name=pair.problem.class_name)
        # Draws of gigabytes are not sent, but made anew where they are not at hand.
        _ask_reference(pair, "bench", counted=not pair.problem.is_huge, **pair.draws)
        ready = pair.kernel.ask("bench", pair.clock, **pair.draws)
    if problem := reported(ready):
        return problem
    with pair.clock.waiting(traffic.alone()):
        runs = _run_rounds(pair)
        if isinstance(runs, Finding):
            return runs
        launch_bound = _median(runs.reference) < LAUNCH_BOUND_MS
        problem = _look_at_own_clock(pair, _median(runs.kernel), ready.get("max_queued"))
        # The last that is asked of the kernel: a graph that cannot be recorded leaves its process in disorder.
        graph_speedup, graph_kept = _graph_speedup(pair) if launch_bound and not problem else (None, [])
    problem = problem or reported(pair.kernel.ask("inspect", pair.clock))
    if problem or (problem := _recheck(pair, runs.kept)):
        return problem
    if _recheck(pair, graph_kept):
        # A graph replays what was recorded, and not every wrapper can be recorded.
        graph_speedup = None
    compile_ms = _compiled_ms(pair, traffic) if compile_baseline else None
    return Measurement(estimate(runs.reference, runs.kernel), launch_bound, graph_speedup, compile_ms)


@dataclass
class _Runs:
    """Times in ms, a list for each round; and the kept outputs with their seeds."""

    reference: list[list[float]]
    kernel: list[list[float]]
    kept: list[tuple[int, Value]]


def _run_rounds(pair: Pair) -> _Runs | Finding:
    runs = _Runs([], [], [])
    # What takes long is measured less often.
    one_ms = statistics.median(_reference_block(pair, 2))
    block = max(1, min(BLOCK, int(_BLOCK_BUDGET_MS / max(one_ms, 1e-6))))
    before = _reference_block(pair, block)
    for number in range(1, MOST_ROUNDS + 1):
        times = _kernel_block(pair, 2 * block, runs.kept)
        if isinstance(times, Finding):
            return times
        # The second half belongs to the next round.
        after = _reference_block(pair, 2 * block)
        runs.reference.append(before + after[:block])
        runs.kernel.append(times)
        before = after[block:]
        if number >= LEAST_ROUNDS and (_is_clear(runs) or _median(runs.reference) < LAUNCH_BOUND_MS):
            break
    return runs


def _is_clear(runs: _Runs) -> bool:
    """Whether every round puts the speedup on the same side of both thresholds, and far from them."""
    speedups = [statistics.median(r) / statistics.median(k) for r, k in zip(runs.reference, runs.kernel, strict=True)]
    return all(min(speedups) > limit * _CLEARLY or max(speedups) * _CLEARLY < limit for limit in (1.0, 2.0))


def _median(rounds: list[list[float]]) -> float:
    return statistics.median(ms for times in rounds for ms in times)


def _reference_block(pair: Pair, count: int) -> list[float]:
    answer = _ask_reference(pair, "block", seeds=_seeds(count), keep=None)
    return list(answer["ms"])


def _kernel_block(pair: Pair, count: int, kept: list[tuple[int, Value]]) -> list[float] | Finding:
    # The kernel's code is not told which call is looked at.
    keep = None
    # Nothing is kept that nobody would look at.
    if pair.problem.mixed is not None and (pair.problem.output_bytes <= _RECHECK_BYTES or not kept):
        keep = secrets.randbelow(count)
    seeds = _seeds(count)
    answer = pair.kernel.ask("block", pair.clock, _most(pair), alone=True, seeds=seeds, keep=keep)
    if problem := reported(answer):
        return problem
    times, launches = answer.get("ms"), answer.get("launches")
    if not isinstance(times, tuple) or len(times) != count or not all(_is_time(item) for item in times):
        return Finding("forged_result", "The kernel's process sent something else than its times.")
    if not isinstance(launches, int) or launches < count:
        return Finding("no_kernel_launch", "While it was measured the kernel launched no Triton kernel.")
    if keep is not None:
        kept.append((seeds[keep], answer.get("output")))
    return list(times)


def _look_at_own_clock(pair: Pair, claimed_ms: float, max_queued: Any) -> Finding | None:
    """Compare what the kernel's process claims with the judge's own clock.

    Whatever else the processor is busy with makes a kernel look slower, never faster: what looks slow is looked at
    again.
    """
    most = max_queued if isinstance(max_queued, int) else _QUEUE
    seen_ms = math.inf
    for room in _ROOMS:
        again = _seen_ms(pair, most, room)
        if isinstance(again, Finding):
            return again
        seen_ms = min(seen_ms, again)
        if seen_ms <= _QUEUE_FACTOR * claimed_ms + _QUEUE_NOISE_MS:
            return None
    detail = (
        f"Its events say {claimed_ms:.4f} ms, the judge's clock {seen_ms:.4f} ms a call: "
        "a patched timer, or work on another stream that nobody waits for."
    )
    return Finding("timing_tamper", detail)


def _seen_ms(pair: Pair, most: int, room: int) -> float | Finding:
    """Time of a call by the judge's own clock, behind a pause long enough to launch `room` times as many."""
    count = max(1, min(_QUEUE, most // room))
    took: list[float] = []
    for calls in (0, count):
        began = time.perf_counter()
        answer = pair.kernel.ask("queue", pair.clock, alone=True, count=calls, room=room * count)
        took.append((time.perf_counter() - began) * 1e3)
        if problem := reported(answer):
            return problem
    return (took[1] - took[0]) / count


def _graph_speedup(pair: Pair) -> tuple[float | None, list[tuple[int, Value]]]:
    """The speedup of CUDA graphs of both, and what the kernel's gave."""
    kernel_seeds, keep = _seeds(BLOCK), secrets.randbelow(BLOCK)
    answers = (
        _ask_reference(pair, "graph", seeds=_seeds(BLOCK), keep=0),
        pair.kernel.ask("graph", pair.clock, _most(pair), alone=True, seeds=kernel_seeds, keep=keep),
    )
    for times in (answer.get("ms") for answer in answers):
        if not isinstance(times, tuple) or not times or not all(_is_time(item) for item in times):
            return None, []
    reference_ms, kernel_ms = (statistics.median(answer["ms"]) for answer in answers)
    return reference_ms / kernel_ms, [(kernel_seeds[keep], answers[1].get("output"))]


def _most(pair: Pair) -> int:
    """Bytes that an answer may hold."""
    return 2 * pair.problem.output_bytes + (1 << 20)


def _recheck(pair: Pair, kept: list[tuple[int, Value]]) -> Finding | None:
    """Whether calls that were measured gave right answers. Only where the reference is precise on mixtures."""
    if pair.problem.mixed is None or not kept:
        return None
    seeds = tuple(seed for seed, _ in kept)
    expected = _ask_reference(pair, "expect", alone=False, seeds=seeds, **pair.draws)["outputs"]
    for right, (_, output) in zip(expected, kept, strict=True):
        wrong = compare(right, output, pair.problem.trials[0].slack)
        if wrong:
            return Finding(wrong.verdict, f"In a call that was measured: {wrong.detail}")
    return None


def _compiled_ms(pair: Pair, traffic: Traffic) -> float | None:
    """The median time of the reference under torch.compile; None when that fails."""
    try:
        _ask_reference(pair, "compile", alone=False)
        _ask_reference(pair, "bench", alone=False, **pair.draws)
        with pair.clock.waiting(traffic.alone()):
            return statistics.median(_reference_block(pair, BLOCK) + _reference_block(pair, BLOCK))
    except Unmeasurable:
        return None


def _ask_reference(pair: Pair, do: str, alone: bool = True, counted: bool = True, **fields: Any) -> dict[str, Any]:
    """The reference's answer; its time is taken from the measurement's if `counted`, else from that for moving data."""
    moving_s = pair.clock.moving_s
    clock = pair.clock if counted or moving_s is None else Clock(moving_s)
    try:
        answer = pair.reference.ask(do, clock, None, alone, **fields)
    except (TimeoutError, ClosedError, WireError) as error:
        raise Unmeasurable(f"the reference's process did not answer ({error})") from error
    if "verdict" in answer:
        raise Unmeasurable(str(answer.get("detail", "")).rstrip("."))
    return answer


def _seeds(count: int) -> tuple[int, ...]:
    return tuple(secrets.randbits(31) for _ in range(count))


def _is_time(value: Any) -> bool:
    return isinstance(value, float) and 0.0 < value < 1e9
