"""The clock of a CUDA device, without one: what it takes of torch is made of the scripted device of `test_timing`."""

from __future__ import annotations

import time
import types
from typing import Any

import pytest

from triton_sft_pipeline.verification.worker.timing import Bench, CudaClock
from triton_sft_pipeline_tests.verification.worker.test_timing import Gpu, draws


class Torch:
    """What `CudaClock` takes of torch, made of a `Gpu` with so many cycles a nanosecond."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gigahertz: float = 2.0) -> None:
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
            gpu.sleep(cycles / (1e6 * gigahertz))

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


@pytest.mark.parametrize("gigahertz", [0.3, 1.41, 1.98, 2.9])
def test_the_gpus_sleep_is_never_too_short_however_fast_its_clock(
    monkeypatch: pytest.MonkeyPatch, gigahertz: float
) -> None:
    torch = Torch(monkeypatch, gigahertz)
    # It needs no GPU of its own to find that out: others may use it meanwhile.
    assert torch.gpu.log == []
    torch.clock.sleep(0.25)
    torch.clock.sleep(0.0)
    assert len(torch.gpu.sleeps) == 1 and torch.gpu.sleeps[0] >= 0.25


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
