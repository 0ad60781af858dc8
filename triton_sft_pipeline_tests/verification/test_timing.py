"""What is measured is the device's time for a call on fresh inputs; nothing of Python's, nothing remembered."""

from __future__ import annotations

import gc
import time
import types
from collections.abc import Callable
from typing import Any

import pytest

from triton_sft_pipeline.verification import mixing
from triton_sft_pipeline.verification.timing import Bench, CudaClock, HostClock, pool_size

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
    assert settled.is_covered and not bench(Gpu(), 2.5, 8.0).warm_up().is_covered


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


class Torch:
    """What `CudaClock` takes of torch, made of a `Gpu`: 2000 cycles are a microsecond, the first ones half as fast."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        gpu = self.gpu = Gpu()
        self.undone: list[Any] = []

        class Event:
            def __init__(self, **_: Any) -> None:
                pass

            def record(self, stream: Any) -> None:
                assert stream == "stream 0"
                self.time = gpu.mark()

            def elapsed_time(self, end: Any) -> float:
                return float(end.time - self.time)

        def sleep(cycles: int) -> None:
            gpu.sleep(cycles / 2e6 * (1 if gpu.sleeps else 2))

        empty = torch.empty

        def fake_empty(*args: Any, device: Any = None, **kwargs: Any) -> Any:
            return empty(*args, **kwargs)

        fakes = {
            (torch, "empty"): fake_empty,
            (time, "perf_counter"): gpu.now,
            (torch.cuda, "init"): lambda: None,
            (torch.cuda, "current_device"): lambda: 0,
            (torch.cuda, "current_stream"): lambda: "stream 0",
            (torch.cuda, "get_device_properties"): lambda device: types.SimpleNamespace(L2_cache_size=1000),
            (torch.cuda, "graph"): Recording,
            (torch.cuda, "CUDAGraph"): lambda: types.SimpleNamespace(replay=lambda: None),
            (torch.cuda, "graph_pool_handle"): lambda: (0, 1),
            (torch.cuda, "Stream"): lambda: "side stream",
            (torch.cuda, "stream"): Recording,
            (torch.cuda, "set_stream"): self.undone.append,
            (torch._C, "_CudaEventBase"): Event,
            (torch._C, "_cuda_synchronize"): gpu.synchronize,
            (torch._C, "_cuda_sleep"): sleep,
            (torch._C, "_cuda_endAllocateToPool"): lambda device, pool: self.undone.append(pool),
        }
        for (owner, name), fake in fakes.items():
            monkeypatch.setattr(owner, name, fake, raising=False)
        self.clock = CudaClock()
        self.patched = [place for place in fakes if place != (torch, "empty")]


class Recording:
    """A context that ends like torch.cuda.graph: whoever failed inside is left as he was."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


def test_the_gpus_sleep_is_set_by_the_highest_clock_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = Torch(monkeypatch)
    before = len(torch.gpu.sleeps)
    torch.clock.sleep(0.25)
    torch.clock.sleep(0.0)
    assert torch.gpu.sleeps[before:] == [pytest.approx(0.25)]


def test_the_gpus_clock_does_not_notice_when_torchs_functions_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    stand_in = Torch(monkeypatch)
    gpu = stand_in.gpu

    def lie(*_: Any, **__: Any) -> Any:
        raise AssertionError("a replaced function was called")

    for owner, name in stand_in.patched:
        monkeypatch.setattr(owner, name, lie, raising=False)
    monkeypatch.setattr(torch.Tensor, "zero_", lie)
    one = Bench(lambda x: gpu.launch(0.1, 0.0067), *draws(), stand_in.clock)
    assert one.block(range(5)) == [pytest.approx(0.0067)] * 5
    one.queue(4)


def test_a_recording_that_fails_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = Torch(monkeypatch)
    calls: list[None] = []

    def call() -> str:
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return "output"

    with pytest.raises(RuntimeError, match="not permitted"):
        stand_in.clock.capture(call)
    assert stand_in.undone == ["stream 0", (0, 1)]
    assert stand_in.clock.capture(call)[1] == "output"
