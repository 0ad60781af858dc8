"""Launches on another stream are held up on purpose, those on the stream that everybody reads from are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from triton_sft_pipeline.verification.worker.streams import SideStreams


class Cuda(SimpleNamespace):
    """What is used of torch.cuda; the stream `current` is the one that work goes to."""

    def __init__(self) -> None:
        self.current, self.slept = "default", list[tuple[str, int]]()
        super().__init__(
            current_stream=lambda: self.current,
            default_stream=lambda: "default",
            _sleep=lambda cycles: self.slept.append((self.current, cycles)),
        )


def test_a_launch_on_the_default_stream_is_not_held_up() -> None:
    cuda = Cuda()
    streams = SideStreams(cuda)
    streams.hold_up()
    assert (streams.late, cuda.slept) == (0, [])


def test_every_launch_on_another_stream_is_held_up_there_and_counted() -> None:
    cuda = Cuda()
    streams = SideStreams(cuda)
    for stream in ("side", "default", "another", "side"):
        cuda.current = stream
        streams.hold_up()
    assert streams.late == 3
    assert [stream for stream, _ in cuda.slept] == ["side", "another", "side"]


def test_work_on_another_stream_is_late_by_milliseconds_on_the_fastest_gpu() -> None:
    cuda = Cuda()
    cuda.current = "side"
    SideStreams(cuda).hold_up()
    assert cuda.slept[0][1] / 3e6 > 5


def test_functions_that_kernel_code_replaces_are_not_asked() -> None:
    cuda = Cuda()
    streams = SideStreams(cuda)

    def lie(*_: Any) -> Any:
        raise AssertionError("a replaced function was called")

    cuda.current_stream = cuda.default_stream = cuda._sleep = lie
    cuda.current = "side"
    streams.hold_up()
    assert streams.late == 1 and len(cuda.slept) == 1


def test_torchs_own_functions_are_used_unless_told() -> None:
    import torch

    streams = SideStreams()
    taken = (streams._current, streams._default, streams._sleep)
    assert taken == (torch.cuda.current_stream, torch.cuda.default_stream, torch.cuda._sleep)
