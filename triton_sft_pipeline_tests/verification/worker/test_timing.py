"""What is measured is the device's time for a call on fresh inputs; nothing of Python's, nothing remembered."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

from triton_sft_pipeline.verification.worker import mixing
from triton_sft_pipeline.verification.worker.timing import Bench, pool_size
from triton_sft_pipeline_tests.verification.worker.clocks import HostClock

FLUSH_MS = 0.03


class Gpu:
    """A device that works through a queue while the host goes on; all times in ms, none of them real.

    It is a clock for `Bench` as well, and it writes down what it is asked for.
    """

    def __init__(self) -> None:
        self.host = 0.0
        self.main = self.side = 0.0  # when each stream is done with what it was given
        self.log: list[str] = []
        self.sleeps: list[float] = []
        self.refuses_capture = False

    def launch(self, host_ms: float, device_ms: float) -> None:
        self.host += host_ms
        self.main = max(self.main, self.host) + device_ms
        self.log.append("call")

    def launch_aside(self, host_ms: float, device_ms: float) -> None:
        """On a stream of its own that nothing waits for, as soon as the main one has come here."""
        self.host += host_ms
        self.side = max(self.side, self.main, self.host) + device_ms

    def mark(self) -> float:
        self.log.append("mark")
        self.main = max(self.main, self.host)
        return self.main

    def elapsed_ms(self, start: float, end: float) -> float:
        return end - start

    def flush(self) -> None:
        self.log.append("flush")
        self.main = max(self.main, self.host) + FLUSH_MS

    def sleep(self, ms: float) -> None:
        self.log.append("sleep")
        self.sleeps.append(ms)
        self.main = max(self.main, self.host) + ms

    def synchronize(self) -> None:
        self.log.append("synchronize")
        self.host = max(self.host, self.main, self.side)

    def now(self) -> float:
        return self.host / 1000

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.refuses_capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        output = call()

        def replay() -> None:
            self.host += 0.005
            output.copy_(call())

        return replay, output


def draws(elements: int = 64) -> tuple[Any, Any]:
    import torch

    return (torch.zeros(elements),), (torch.ones(elements),)


def bench(gpu: Gpu, host_ms: float, device_ms: float) -> Bench:
    return Bench(lambda x: gpu.launch(host_ms, device_ms), *draws(), gpu)


def test_a_short_call_with_a_long_launch_takes_what_the_device_takes() -> None:
    gpu = Gpu()
    assert bench(gpu, 0.1, 0.0067).block(range(20)) == [pytest.approx(0.0067)] * 20


def test_a_call_that_waits_for_the_device_inside_takes_its_pauses_too() -> None:
    gpu = Gpu()

    def call(x: Any) -> None:
        gpu.launch(0.1, 0.01)
        gpu.synchronize()
        gpu.launch(0.1, 0.01)

    assert Bench(call, *draws(), gpu).block([1, 2]) == [pytest.approx(0.12)] * 2


def test_a_call_is_timed_between_two_marks_after_a_flush_and_a_sleep_and_nothing_is_awaited_in_a_block() -> None:
    gpu = Gpu()
    one = bench(gpu, 0.1, 0.0067)
    one.warm_up()
    gpu.log.clear()
    one.block([1, 2, 3])
    assert gpu.log == ["flush", "sleep", "mark", "call", "mark"] * 3 + ["synchronize"]


def test_the_sleep_follows_the_launch_up_to_a_limit() -> None:
    for host_ms, expected in ((0.1, 0.18), (1.0, 1.53), (2.0, 3.03), (40.0, 3.03)):
        gpu = Gpu()
        bench(gpu, host_ms, 0.01).block([1])
        assert gpu.sleeps == [pytest.approx(expected)]


def test_every_call_gets_the_mix_of_its_seed_in_new_tensors_at_addresses_that_change() -> None:
    import torch

    a, b = draws()
    seen: list[tuple[Any, int, Any]] = []

    def call(x: Any) -> None:
        seen.append((x, x.data_ptr(), x.clone()))
        x.fill_(7)
        x.resize_(1)

    one = Bench(call, a, b, HostClock())
    one.warm_up()
    seen.clear()
    seeds = list(range(100, 120))
    one.block(seeds)
    for seed, (_, _, values) in zip(seeds, seen, strict=True):
        assert torch.equal(values, mixing.mix(a, b, seed)[0])
    assert len({id(tensor) for tensor, _, _ in seen}) == 20
    addresses = [address for _, address, _ in seen]
    assert len(set(addresses)) == 8 and addresses[:8] == addresses[8:16]
    assert (float(a[0].sum()), float(b[0].sum())) == (0.0, 64.0)


def test_the_output_of_one_call_is_kept_as_it_was_right_after_it() -> None:
    import torch

    a, b = draws()
    buffer = torch.empty(64)

    def call(x: Any) -> Any:
        torch.mul(x, 2, out=buffer)
        return {"y": [buffer, 3]}

    one = Bench(call, a, b, HostClock())
    one.block([5, 6, 7, 8], keep=1)
    assert torch.equal(one.kept["y"][0], mixing.mix(a, b, 6)[0] * 2) and one.kept["y"][1] == 3
    one.block([5, 6])
    assert one.kept is None


def test_the_copy_that_is_kept_is_made_outside_the_timed_part() -> None:
    import torch

    gpu = Gpu()

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            gpu.log.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    output, foreign, other = torch.zeros(3), Watched(torch.zeros(2)), object()

    def call(x: Any) -> Any:
        gpu.launch(0.1, 0.1)
        return output, foreign, other

    one = Bench(call, *draws(), gpu)
    one.warm_up()
    gpu.log.clear()
    one.block([1, 2], keep=0)
    # A subclass runs foreign code when it is copied, so it is handed on as it is.
    assert gpu.log == ["flush", "sleep", "mark", "call", "mark"] * 2 + ["synchronize"]
    assert one.kept[1] is foreign and one.kept[2] is other
    assert one.kept[0] is not output and torch.equal(one.kept[0], output)


def test_no_output_outlives_its_call() -> None:
    class Output:
        alive = 0

        def __init__(self) -> None:
            Output.alive += 1
            most.append(Output.alive)

        def __del__(self) -> None:
            Output.alive -= 1

    most: list[int] = []
    Bench(lambda x: Output(), *draws(), HostClock()).block(range(5))
    assert max(most) == 1


def test_garbage_collection_waits_for_the_end_of_a_block_even_of_one_that_fails() -> None:
    collecting: list[bool] = []

    def call(x: Any) -> None:
        collecting.append(gc.isenabled())
        if len(collecting) == 20:
            raise ArithmeticError("the kernel fails")

    one = Bench(call, *draws(), Gpu())
    one.warm_up()
    collecting.clear()
    with pytest.raises(ArithmeticError, match="the kernel fails"):
        one.block(range(30))
    assert collecting == [False] * 20 and gc.isenabled()


def slowing(gpu: Gpu, host: Callable[[int], float]) -> Bench:
    """A call whose launch takes `host(number of the call)` ms."""
    calls: list[None] = []

    def call(x: Any) -> None:
        gpu.launch(host(len(calls)), 0.01)
        calls.append(None)

    return Bench(call, *draws(), gpu)


def test_a_call_that_compiles_first_settles_soon_after() -> None:
    settled = slowing(Gpu(), lambda number: 900.0 if number == 0 else 0.1).warm_up()
    assert (settled.enqueue_ms, settled.call_ms) == (pytest.approx(0.1), pytest.approx(0.11))
    assert settled.calls == 6


def test_a_call_that_tunes_itself_for_several_calls_is_called_until_it_has() -> None:
    settled = slowing(Gpu(), lambda number: 900.0 if number == 0 else 5.0 if number < 4 else 0.1).warm_up()
    assert settled.enqueue_ms == pytest.approx(0.1) and settled.calls == 9


def test_a_slow_call_is_called_three_times_to_warm_up() -> None:
    assert slowing(Gpu(), lambda number: 900.0).warm_up().calls == 3


def test_a_call_that_never_settles_is_given_up_on_soon() -> None:
    gpu = Gpu()
    settled = slowing(gpu, lambda number: 1.0 + number % 5).warm_up()
    assert 5 < settled.calls < 20 and 15 < gpu.host < 40


def test_the_launch_is_measured_without_waiting_for_the_device() -> None:
    settled = bench(Gpu(), 0.05, 8.0).warm_up()
    assert (settled.enqueue_ms, settled.call_ms) == (pytest.approx(0.05), pytest.approx(8.05))


def busier(gpu: Gpu, later_ms: Callable[[int], float]) -> tuple[Bench, list[float]]:
    """A call whose launch takes 0.1 ms while it warms up and `later_ms(number)` after that; and what it was given."""
    calls, given = list[None](), list[float]()

    def call(x: Any) -> Any:
        gpu.launch(0.1 if len(calls) < 6 else later_ms(len(calls) - 6), 0.01)
        calls.append(None)
        given.append(float(x.sum()))
        return x.clone()

    one = Bench(call, *draws(), gpu)
    assert one.warm_up().calls == 6
    given.clear()
    return one, given


def test_a_block_on_a_processor_that_has_become_busier_is_measured_again_behind_longer_sleeps() -> None:
    import torch

    gpu = Gpu()
    one, given = busier(gpu, lambda number: 0.3 + 0.05 * (number % 2))
    assert one.block([1, 2, 3, 4], keep=2) == [pytest.approx(0.01)] * 4
    assert gpu.sleeps == [pytest.approx(0.18)] * 4 + [pytest.approx(0.555)] * 4
    # On the same inputs, and the output that is kept is one of those that count.
    assert given[:4] == given[4:] and torch.equal(one.kept, mixing.mix(*draws(), 3)[0])
    gpu.sleeps.clear()
    assert one.block([5, 6]) == [pytest.approx(0.01)] * 2
    assert gpu.sleeps == [pytest.approx(0.555)] * 2


def test_a_single_launch_that_was_slow_is_no_reason_to_measure_again() -> None:
    gpu = Gpu()
    one, _ = busier(gpu, lambda number: 50.0 if number == 1 else 0.1)
    times = one.block([1, 2, 3])
    assert (times[0], times[2]) == (pytest.approx(0.01), pytest.approx(0.01)) and times[1] > 49
    assert gpu.sleeps == [pytest.approx(0.18)] * 3


def test_a_launch_that_waits_for_something_is_given_four_times_as_long_and_no_more() -> None:
    gpu = Gpu()
    one, _ = busier(gpu, lambda number: 30.0)
    for _ in range(3):
        assert min(one.block([1, 2])) > 29
    # Measured again once, in the first block.
    assert gpu.sleeps == [pytest.approx(0.18)] * 2 + [pytest.approx(0.63)] * 6


def test_a_processor_that_becomes_less_busy_changes_nothing() -> None:
    gpu = Gpu()
    one, _ = busier(gpu, lambda number: 0.01)
    assert one.block([1, 2]) == [pytest.approx(0.01)] * 2
    assert gpu.sleeps == [pytest.approx(0.18)] * 2


def test_a_new_warm_up_forgets_how_busy_the_processor_was() -> None:
    gpu = Gpu()
    one, _ = busier(gpu, lambda number: 0.3 if number < 4 else 0.1)
    one.block([1, 2])
    one.warm_up()
    gpu.sleeps.clear()
    one.block([1])
    assert gpu.sleeps == [pytest.approx(0.18)]


@pytest.mark.parametrize(
    ("set_bytes", "sets"),
    [(0, 8), (1 << 20, 8), (128 << 20, 8), (200 << 20, 5), (600 << 20, 2), (4 << 30, 2), ((4 << 30) + 1, 1)],
)
def test_the_pool_is_two_to_eight_sets_in_a_gibibyte_and_one_when_a_set_is_huge(set_bytes: int, sets: int) -> None:
    assert pool_size(set_bytes) == sets


def test_a_call_without_tensors_can_be_timed_by_the_host() -> None:
    one = Bench(lambda n, table: n + table["k"], (2, {"k": 3}), (4, {"k": 5}), HostClock())
    times = one.block([1, 2, 3], keep=0)
    one.queue(2)
    assert one.kept == 5 and len(times) == 3 and all(0 <= ms < 1000 for ms in times)
