"""Launches on another stream are held up on purpose, those on the stream that everybody reads from are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from triton_sft_pipeline.verification.worker.streams import SideStreams


class FakeDefault(str):
    """A stream that can be waited for."""

    def synchronize(self) -> None:
        pass


class Cuda(SimpleNamespace):
    """What is used of torch.cuda; the stream `current` is the one that work goes to."""

    def __init__(self) -> None:
        self.current, self.slept = FakeDefault("default"), list[tuple[str, int]]()
        self.done = {"done"}
        super().__init__(
            current_stream=lambda: self.current,
            default_stream=lambda: FakeDefault("default"),
            _sleep=lambda cycles: self.slept.append((self.current, cycles)),
            Stream=SimpleNamespace(query=lambda stream: stream in self.done),
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

    cuda.current_stream = cuda.default_stream = cuda._sleep = cuda.Stream.query = lie
    cuda.current = "side"
    streams.hold_up()
    assert streams.late == 1 and len(cuda.slept) == 1
    assert streams.left_behind()


def test_torchs_own_functions_are_used_unless_told() -> None:
    import torch

    streams = SideStreams()
    taken = (streams._current, streams._default, streams._sleep)
    assert taken == (torch.cuda.current_stream, torch.cuda.default_stream, torch.cuda._sleep)
    assert streams._is_done == torch.cuda.Stream.query


def test_a_call_that_leaves_work_on_another_stream_behind_is_found_once() -> None:
    cuda = Cuda()
    streams = SideStreams(cuda)
    cuda.current = "busy"
    streams.hold_up()
    assert streams.left_behind()
    assert not streams.left_behind()


def test_work_on_another_stream_that_was_waited_for_is_not_left_behind() -> None:
    cuda = Cuda()
    streams = SideStreams(cuda)
    for stream in ("done", "default"):
        cuda.current = stream
        streams.hold_up()
    assert not streams.left_behind()
