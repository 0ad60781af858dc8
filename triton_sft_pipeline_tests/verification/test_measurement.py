"""What is measured, and what of it is believed: a kernel's process tells times, the judge looks at its own clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from triton_sft_pipeline.verification import measurement, references
from triton_sft_pipeline.verification.measurement import (
    BLOCK,
    LAUNCH_BOUND_MS,
    LEAST_ROUNDS,
    MOST_ROUNDS,
    Measurement,
    Pair,
    Unmeasurable,
    measure,
)
from triton_sft_pipeline.verification.peer import Clock
from triton_sft_pipeline.verification.speedup import flags
from triton_sft_pipeline.verification.traffic import Traffic
from triton_sft_pipeline.verification.verdict import Finding
from triton_sft_pipeline.verification.wire import ClosedError, WireError
from triton_sft_pipeline_tests.verification.peers import Answer, FakeTime, ScriptedPeer, array, doubling

REFERENCE_MS = 2.0


def output_for(seed: int) -> Any:
    """What kernel and reference make of the inputs mixed with a seed."""
    return array([float(seed)], "float64")


class Side:
    """A child that can be measured; its calls take `ms`, a little more or less.

    Args:
        blocks: collects the sizes of the blocks that both sides are asked for.
    """

    name = "reference"

    def __init__(self, blocks: list[tuple[str, int]], ms: float = REFERENCE_MS) -> None:
        self.blocks = blocks
        self.ms = ms

    def times(self, count: int) -> tuple[float, ...]:
        return tuple(self.ms * (1 + 0.01 * (index % 3)) for index in range(count))

    def adopt(self, code: str, class_name: str) -> Answer:
        return {}

    def bench(self, a: Any, b: Any) -> Answer:
        return {"max_queued": 50}

    def block(self, seeds: tuple[int, ...], keep: int | None) -> Answer:
        self.blocks.append((self.name, len(seeds)))
        return {"ms": self.times(len(seeds)), "launches": len(seeds), "output": None}

    def graph(self, seeds: tuple[int, ...], keep: int) -> Answer:
        return {"ms": tuple(ms / 2 for ms in self.times(len(seeds))), "output": output_for(seeds[keep])}

    def expect(self, seeds: tuple[int, ...], a: Any, b: Any) -> Answer:
        return {"outputs": tuple(map(output_for, seeds))}

    def compile(self) -> Answer:
        self.ms /= 4
        return {}


class Kernel(Side):
    """A kernel's child, honest unless a test overrides something."""

    name = "kernel"

    def __init__(self, blocks: list[tuple[str, int]], time: FakeTime, ms: float) -> None:
        super().__init__(blocks, ms)
        self.time = time
        self.true_ms = ms

    def block(self, seeds: tuple[int, ...], keep: int | None) -> Answer:
        return super().block(seeds, keep) | {"output": None if keep is None else output_for(seeds[keep])}

    def inspect(self) -> Answer:
        return {}

    def queue(self, count: int, room: int) -> Answer:
        # The pause, and the calls.
        self.time.passed += (5.0 + 0.01 * room + count * self.true_ms) / 1e3
        return {}


class Bench:
    """Both sides of one measurement."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = FakeTime()
        monkeypatch.setattr(measurement, "time", self.time)
        self.blocks: list[tuple[str, int]] = []
        self.reference: Any = Side(self.blocks)
        self.kernel: Any = Kernel(self.blocks, self.time, ms=1.0)
        self.problem = doubling()
        self.peers: dict[str, ScriptedPeer] = {}

    def take(self, ms: float) -> None:
        """Let the kernel take so long, and say so."""
        self.kernel.ms = self.kernel.true_ms = ms

    def run(self, compile_baseline: bool = False) -> Measurement | Finding:
        self.peers = {"kernel": ScriptedPeer(self.kernel), "reference": ScriptedPeer(self.reference)}
        pair = Pair(**self.peers, problem=self.problem, pytorch_code="code", clock=Clock(60.0))  # type: ignore[arg-type]
        return measure(pair, Traffic(), compile_baseline)

    def measured(self, compile_baseline: bool = False) -> Measurement:
        result = self.run(compile_baseline)
        assert isinstance(result, Measurement), result
        return result

    def finding(self) -> Finding:
        result = self.run()
        assert isinstance(result, Finding), result
        return result


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_a_kernel_that_takes_half_the_time_is_twice_as_fast(bench: Bench) -> None:
    result = bench.measured()
    assert result.speedup.point == pytest.approx(2.0)
    assert result.speedup.low < 2.0 < result.speedup.high
    assert flags(result.speedup.low) == (True, False)
    assert (result.launch_bound, result.graph_speedup, result.compile_ms, result.compile_speedup) == (
        False,
        *[None] * 3,
    )


def test_the_reference_against_itself_is_not_faster(bench: Bench) -> None:
    bench.take(REFERENCE_MS)
    speedup = bench.measured().speedup
    assert speedup.point == pytest.approx(1.0)
    assert speedup.low < 1.0 < speedup.high and flags(speedup.low) == (False, False)


@pytest.mark.parametrize(("share", "rounds"), [(4.0, LEAST_ROUNDS), (0.5, LEAST_ROUNDS), (1.0, MOST_ROUNDS)])
def test_blocks_take_turns_and_more_of_them_are_run_where_it_is_close(bench: Bench, share: float, rounds: int) -> None:
    bench.take(REFERENCE_MS / share)
    bench.measured()
    # The first tells how long a block may be; a drift of the clocks meets both sides of a round.
    assert bench.blocks[:2] == [("reference", 2), ("reference", BLOCK)]
    assert bench.blocks[2:] == [("kernel", 2 * BLOCK), ("reference", 2 * BLOCK)] * rounds


@pytest.mark.parametrize(("reference_ms", "block"), [(0.2, BLOCK), (9.0, 5), (20.0, 2), (5000.0, 1)])
def test_what_takes_long_is_measured_less_often(bench: Bench, reference_ms: float, block: int) -> None:
    bench.reference.ms = reference_ms
    bench.take(reference_ms)
    bench.measured()
    assert min(count for _, count in bench.blocks[1:]) == block


def test_every_call_that_is_measured_has_inputs_of_its_own(bench: Bench) -> None:
    bench.measured()
    for peer in bench.peers.values():
        seeds = [seed for name, fields in peer.asked if name == "block" for seed in fields["seeds"]]
        assert len(set(seeds)) == len(seeds)
    # Nor do kernel and reference share them: what one learns is of no use to the other.
    assert (
        len({seed for peer in bench.peers.values() for n, f in peer.asked if n == "block" for seed in f["seeds"]}) > 200
    )


def test_mixtures_are_made_of_two_draws_only_where_the_reference_runs_on_them(bench: Bench) -> None:
    for mixable, second in ((True, 1), (False, 0)):
        bench.problem = replace(doubling(), mixable=mixable)
        bench.measured()
        fields = next(fields for name, fields in bench.peers["kernel"].asked if name == "bench")
        assert fields["a"] is bench.problem.trials[0].inputs and fields["b"] is bench.problem.trials[second].inputs


@pytest.mark.parametrize("claimed", [0.01, 0.1, 0.3])
def test_times_that_the_judges_clock_contradicts_are_no_times(bench: Bench, claimed: float) -> None:
    bench.kernel.ms, bench.kernel.true_ms = claimed, REFERENCE_MS
    finding = bench.finding()
    assert finding.verdict == "timing_tamper"
    assert "2.0000 ms" in finding.detail


def test_work_that_the_events_do_not_see_is_seen(bench: Bench) -> None:
    # On another stream: the events say nothing, and the device is busy for as long as the reference.
    bench.reference.ms = 10.0
    bench.kernel.ms, bench.kernel.true_ms = 0.01, 10.0
    assert bench.finding().verdict == "timing_tamper"


def test_one_look_at_a_busy_machine_is_not_held_against_a_kernel(bench: Bench) -> None:
    slow = iter([0.0, 0.5, 0.0, 0.5])
    honest = bench.kernel.queue

    def queue(count: int, room: int) -> Answer:
        bench.time.passed += next(slow, 0.0)
        answer: Answer = honest(count, room)
        return answer

    bench.kernel.queue = queue
    assert bench.measured().speedup.point == pytest.approx(2.0)


@pytest.mark.parametrize("max_queued", [1, 0, -7, 10**12, None, "many", math.nan, (3,)])
def test_whatever_a_child_says_of_its_queue_the_judge_looks(bench: Bench, max_queued: Any) -> None:
    bench.kernel.bench = lambda a, b: {"max_queued": max_queued}
    bench.measured()
    counts = [fields["count"] for name, fields in bench.peers["kernel"].asked if name == "queue"]
    assert 0 in counts and 1 <= max(counts) <= 100
    bench.kernel.ms = 0.01
    bench.take(REFERENCE_MS)
    bench.kernel.ms = 0.01
    assert bench.finding().verdict == "timing_tamper"


FORGED: dict[str, Callable[[tuple[float, ...]], Any]] = {
    "one too few": lambda times: times[1:],
    "one too many": lambda times: (*times, 1.0),
    "none": lambda times: (),
    "NaN": lambda times: (math.nan, *times[1:]),
    "infinity": lambda times: (*times[1:], math.inf),
    "ages": lambda times: (1e9, *times[1:]),
    "nothing at all": lambda times: (0.0, *times[1:]),
    "less than nothing": lambda times: (-1.0, *times[1:]),
    "whole numbers": lambda times: (1, *times[1:]),
    "truth": lambda times: (True, *times[1:]),
    "texts": lambda times: ("1.0", *times[1:]),
    "an array": lambda times: array(times, "float64"),
    "a number": lambda times: 1.0,
    "None": lambda times: None,
    "nested": lambda times: (times,),
}


@pytest.mark.parametrize("name", FORGED)
def test_times_that_are_none_are_forged(bench: Bench, name: str) -> None:
    honest = bench.kernel.times
    bench.kernel.times = lambda count: FORGED[name](honest(count))
    assert bench.finding().verdict == "forged_result"


@pytest.mark.parametrize("launches", [0, BLOCK, -1, None, "20", math.inf])
def test_a_kernel_that_launches_less_than_it_is_called_launches_none(bench: Bench, launches: Any) -> None:
    honest = bench.kernel.block
    bench.kernel.block = lambda seeds, keep: honest(seeds, keep) | {"launches": launches}
    assert bench.finding().verdict == "no_kernel_launch"


@pytest.mark.parametrize("question", ["bench", "block", "queue", "inspect"])
def test_what_the_kernel_reports_while_it_is_measured_counts(bench: Bench, question: str) -> None:
    for verdict, expected in (("runtime_error", "runtime_error"), ("verified", "forged_result")):
        setattr(bench.kernel, question, lambda verdict=verdict, **fields: {"verdict": verdict, "detail": "why"})
        assert bench.finding().verdict == expected


@pytest.mark.parametrize("question", ["adopt", "bench", "block", "expect"])
def test_a_reference_that_fails_makes_it_unmeasurable(bench: Bench, question: str) -> None:
    def fail(**fields: Any) -> Answer:
        raise error

    errors = (ClosedError("gone"), TimeoutError("late"), WireError("nonsense"))
    for error in errors:
        setattr(bench.reference, question, fail)
        with pytest.raises(Unmeasurable, match=str(error)):
            bench.run()
    setattr(bench.reference, question, lambda **fields: {"verdict": "reference_error", "detail": "no luck"})
    with pytest.raises(Unmeasurable, match="no luck"):
        bench.run()


@pytest.mark.parametrize("question", ["bench", "block", "queue", "inspect"])
def test_a_kernel_that_does_not_answer_is_for_the_caller_to_judge(bench: Bench, question: str) -> None:
    def fail(**fields: Any) -> Answer:
        raise error

    for error in (ClosedError("gone"), TimeoutError("late"), WireError("nonsense")):
        setattr(bench.kernel, question, fail)
        with pytest.raises(type(error)):
            bench.run()


WRONG: dict[str, tuple[Any, str]] = {
    "another value": (array([-1.0], "float64"), "incorrect_numerical"),
    "NaN": (array([math.nan], "float64"), "incorrect_nan"),
    "another shape": (array([], "float64"), "incorrect_shape"),
    "nothing": (None, "incorrect_structure"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_measured_call_must_give_the_right_output(bench: Bench, name: str) -> None:
    output, verdict = WRONG[name]
    honest = bench.kernel.block
    bench.kernel.block = lambda seeds, keep: honest(seeds, keep) | ({} if keep is None else {"output": output})
    finding = bench.finding()
    assert finding.verdict == verdict and finding.detail.startswith("In a call that was measured: ")


def test_one_wrong_output_in_the_last_block_is_enough(bench: Bench) -> None:
    honest, kept = bench.kernel.block, list[int]()

    def block(seeds: tuple[int, ...], keep: int | None) -> Answer:
        kept.extend([] if keep is None else [keep])
        answer: Answer = honest(seeds, keep)
        return answer | ({"output": output_for(-1)} if len(kept) == MOST_ROUNDS else {})

    bench.kernel.block = block
    assert bench.finding().verdict == "incorrect_numerical"


def test_outputs_are_not_looked_at_where_the_reference_is_imprecise_on_mixtures(bench: Bench) -> None:
    bench.problem = replace(doubling(), mixed=None)
    bench.measured()
    assert "expect" not in bench.peers["reference"].names()


def test_of_large_outputs_one_is_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "_RECHECK_BYTES", 1)
    bench.measured()
    kept = [fields["keep"] for name, fields in bench.peers["kernel"].asked if name == "block"]
    assert [keep is None for keep in kept] == [False] + [True] * (len(kept) - 1)


def test_a_reference_shorter_than_a_launch_is_measured_by_graphs_too(bench: Bench) -> None:
    bench.reference.ms = 0.99 * LAUNCH_BOUND_MS / 1.02
    bench.take(bench.reference.ms / 4)
    bench.kernel.graph = lambda seeds, keep: {"ms": (1.0,) * len(seeds), "output": output_for(seeds[keep])}
    result = bench.measured()
    assert result.launch_bound
    assert result.graph_speedup == pytest.approx(bench.reference.ms / 2, rel=0.02)


GRAPHS: dict[str, tuple[str, Any]] = {
    "the kernel's cannot be recorded": ("kernel", lambda seeds, keep: {"ms": None, "output": None}),
    "the reference's cannot be recorded": ("reference", lambda seeds, keep: {"ms": None, "output": None}),
    "the kernel's gives another output": ("kernel", lambda seeds, keep: {"ms": (1.0,), "output": output_for(-1)}),
    "the kernel's gives none": ("kernel", lambda seeds, keep: {"ms": (1.0,)}),
    "the kernel's takes no time": ("kernel", lambda seeds, keep: {"ms": (0.0,), "output": output_for(seeds[keep])}),
    "the kernel's has no times": ("kernel", lambda seeds, keep: {"ms": (), "output": output_for(seeds[keep])}),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_is_none_or_wrong_gives_no_number_and_is_not_held_against_the_kernel(
    bench: Bench, name: str
) -> None:
    side, graph = GRAPHS[name]
    bench.reference.ms = LAUNCH_BOUND_MS / 2
    bench.take(LAUNCH_BOUND_MS / 4)
    getattr(bench, side).graph = graph
    result = bench.measured()
    assert result.launch_bound and result.graph_speedup is None
    assert result.speedup.point == pytest.approx(2.0)


def test_the_compiled_reference_is_measured_when_asked_for(bench: Bench) -> None:
    result = bench.measured(compile_baseline=True)
    assert result.compile_ms == pytest.approx(REFERENCE_MS / 4, rel=0.02)
    assert result.compile_speedup == pytest.approx(0.5, rel=0.02)


def test_a_reference_that_cannot_be_compiled_costs_only_that_number(bench: Bench) -> None:
    bench.reference.compile = lambda: {"verdict": "reference_error", "detail": "no compiler"}
    result = bench.measured(compile_baseline=True)
    assert result.compile_ms is None and result.speedup.point == pytest.approx(2.0)


def test_nothing_else_runs_while_blocks_are_measured(bench: Bench) -> None:
    traffic = Traffic()
    watched = SimpleNamespace(alone=[])
    honest = Kernel.block

    def block(seeds: tuple[int, ...], keep: int | None) -> Answer:
        watched.alone.append(traffic._alone)
        return honest(bench.kernel, seeds, keep)

    bench.kernel.block = block
    pair = Pair(ScriptedPeer(bench.kernel), ScriptedPeer(bench.reference), bench.problem, "code", Clock(60.0))  # type: ignore[arg-type]
    measure(pair, traffic)
    assert watched.alone and all(watched.alone)
    assert not traffic._alone


def test_nothing_is_kept_that_could_not_be_checked(bench: Bench) -> None:
    bench.problem = doubling(mixed=None)
    bench.measured()
    assert all(fields["keep"] is None for name, fields in bench.peers["kernel"].asked if name == "block")
    assert "expect" not in bench.peers["reference"].names()


@pytest.mark.parametrize("huge", [True, False])
def test_only_draws_of_gigabytes_are_made_anew_in_time_of_their_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, huge: bool
) -> None:
    monkeypatch.setattr(references, "_HUGE_BYTES", 1 if huge else 1 << 40)
    clocks: dict[str, Any] = {}

    class Watched(ScriptedPeer):
        def ask(self, do: str, clock: Any, *rest: Any, **fields: Any) -> Answer:
            clocks.setdefault(do, clock)
            return super().ask(do, clock, *rest, **fields)

    problem = doubling(mixed=None, mixable=False)
    problem = replace(problem, trials=problem.trials[:1])
    clock = Clock(60.0, 300.0)
    pair = Pair(ScriptedPeer(bench.kernel), Watched(bench.reference), problem, "code", clock)  # type: ignore[arg-type]
    assert isinstance(measure(pair, Traffic()), Measurement)
    assert (clocks["bench"] is not clock) is huge and clocks["adopt"] is clock is clocks["block"]
    assert not huge or clocks["bench"].seconds == 300.0
