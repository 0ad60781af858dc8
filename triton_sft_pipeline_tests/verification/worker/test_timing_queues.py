"""Calls in a row for an outside clock, and calls that are recorded: neither waits for Python."""

from __future__ import annotations

from typing import Any

import pytest

from triton_sft_pipeline.verification.worker import mixing
from triton_sft_pipeline.verification.worker.timing import Bench
from triton_sft_pipeline_tests.verification.worker.clocks import HostClock
from triton_sft_pipeline_tests.verification.worker.test_timing import Gpu, bench, draws


def judged_ms(gpu: Gpu, one: Bench, n: int) -> float:
    """What an outside clock finds for one call."""

    def took(n: int, cover: int) -> float:
        began = gpu.host
        one.queue(n, cover)
        return gpu.host - began

    return (took(n, n) - took(0, n)) / n


def test_an_outside_clock_finds_the_time_of_a_call_from_two_queues() -> None:
    gpu = Gpu()
    one = bench(gpu, 0.1, 0.0067)
    n = one.warm_up().max_queued
    assert n == 100
    assert judged_ms(gpu, one, n) == pytest.approx(0.0067)


def test_an_outside_clock_sees_what_runs_on_a_stream_that_the_marks_do_not_see() -> None:
    gpu = Gpu()
    one = Bench(lambda x: gpu.launch_aside(0.1, 0.5), *draws(), gpu)
    assert max(one.block(range(5))) < 0.001
    assert judged_ms(gpu, one, 50) == pytest.approx(0.5)


def test_a_queue_hands_over_all_calls_before_it_waits() -> None:
    gpu = Gpu()
    one = bench(gpu, 0.1, 0.01)
    one.warm_up()
    gpu.log.clear()
    one.queue(3)
    one.queue(0, cover=3)
    calls = ["call"] * 3
    assert gpu.log == ["synchronize", "sleep", *calls, "synchronize", "synchronize", "sleep", "synchronize"]
    assert gpu.sleeps == [pytest.approx(3 * 0.15 + 0.03)] * 2


def test_the_sleep_of_a_queue_has_a_limit_and_says_how_many_calls_it_covers() -> None:
    gpu = Gpu()
    one = bench(gpu, 4.0, 0.01)
    n = one.warm_up().max_queued
    one.queue(n)
    one.queue(50)
    assert n == 8
    assert gpu.sleeps == [pytest.approx(48.03), 50.0]
    assert bench(Gpu(), 200.0, 0.01).warm_up().max_queued == 1


def test_a_queue_gives_calls_that_write_into_their_inputs_sane_ones() -> None:
    seen: list[float] = []

    def call(x: Any) -> None:
        seen.append(float(x.max()))
        x.add_(1)

    one = Bench(call, *draws(), HostClock())
    for _ in range(3):
        one.queue(8)
    assert set(seen) == {1.0}


def test_a_graph_is_timed_with_fresh_values_in_one_place() -> None:
    import torch

    gpu, addresses = Gpu(), set[int]()

    def call(x: Any) -> Any:
        addresses.add(x.data_ptr())
        gpu.launch(0.0, 0.25)
        return x * 3

    a, b = draws()
    one = Bench(call, a, b, gpu)
    one.warm_up()
    addresses.clear()
    times = one.graph([4, 5, 6], keep=2)
    assert times == [pytest.approx(0.25)] * 3
    assert len(addresses) == 1 and torch.equal(one.kept, mixing.mix(a, b, 6)[0] * 3)
    default = one.graph()
    assert default is not None and len(default) == 20


def test_a_call_that_cannot_be_recorded_has_no_graph_and_can_still_be_timed() -> None:
    gpu = Gpu()
    gpu.refuses_capture = True
    one = bench(gpu, 0.1, 0.25)
    assert one.graph() is None
    assert one.block([1]) == [pytest.approx(0.25)]
    assert Bench(lambda x: x, *draws(), HostClock()).graph() is None


def test_a_graph_that_fails_when_it_runs_gives_no_times() -> None:
    import torch

    gpu, calls = Gpu(), list[None]()

    def call(x: Any) -> Any:
        calls.append(None)
        if len(calls) > 12:
            raise RuntimeError("an illegal memory access was encountered")
        gpu.launch(0.1, 0.25)
        return torch.zeros(1)

    assert Bench(call, *draws(), gpu).graph(keep=0) is None and len(calls) == 13
