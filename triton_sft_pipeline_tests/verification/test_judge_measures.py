"""The judge's way with a GPU, run without one: its children are threads that ask for turns and tell their times."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from triton_sft_pipeline.verification import JudgeItem, KernelJudge, Verdict, measurement
from triton_sft_pipeline.verification import judge as module
from triton_sft_pipeline.verification.lanes import Lanes
from triton_sft_pipeline.verification.peer import Peer
from triton_sft_pipeline.verification.sandbox.client import ZygoteDiedError
from triton_sft_pipeline.verification.traffic import Traffic
from triton_sft_pipeline.verification.worker import session
from triton_sft_pipeline.verification.worker.session import GpuGate
from triton_sft_pipeline_tests.verification.peers import WAIT_S, Answer, Doubler, FakeTime, connected, doubling
from triton_sft_pipeline_tests.verification.test_measurement import REFERENCE_MS, Kernel, Side

_QUESTIONS = [
    *("load", "call", "recall", "inspect", "ablate"),
    *("adopt", "bench", "block", "queue", "graph", "expect", "compile"),
]
KERNEL = "the kernel"


class Whole(Doubler, Kernel):
    """A kernel's child that can be examined and measured."""

    def __init__(self, time: FakeTime, ms: float) -> None:
        Doubler.__init__(self)
        Kernel.__init__(self, [], time, ms)


def serving(child: Any) -> Callable[[socket.socket], None]:
    """Answers with the child's methods, after asking for the GPU."""

    def serve(sock: socket.socket) -> None:
        gate = GpuGate(sock, needed=True)

        def asking(method: Callable[..., Answer]) -> Callable[..., Answer]:
            def answer(**fields: Any) -> Answer:
                gate.enter()
                return method(**fields)

            return answer

        session.serve(sock, gate, {name: asking(getattr(child, name)) for name in _QUESTIONS if hasattr(child, name)})

    return serve


class FakeLane:
    """A lane whose processes are threads."""

    def __init__(self, traffic: Traffic, kernel: Callable[[], Any], reference: Callable[[], Any]) -> None:
        self._traffic, self._kernel, self._reference = traffic, kernel, reference
        self._open = ExitStack()
        self._peer: Peer | None = None

    @contextmanager
    def kernel(self) -> Iterator[Peer]:
        with connected(serving(self._kernel()), self._traffic) as peer:
            peer.wait_ready(WAIT_S)
            yield peer

    def reference(self) -> Peer:
        if self._peer is None:
            self._peer = self._open.enter_context(connected(serving(self._reference()), self._traffic))
            self._peer.wait_ready(WAIT_S)
        return self._peer

    def drop_reference(self) -> None:
        self._peer = None
        self._open.close()

    def close(self) -> None:
        self.drop_reference()


class FakeZygote:
    """Has nothing to close."""

    def close(self) -> None:
        pass


class Room:
    """A judge that believes in a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.time = FakeTime()
        # The judge's own clock sees what the kernels' threads say that they take.
        monkeypatch.setattr(measurement, "time", self.time)
        monkeypatch.setattr(module, "inspect_source", lambda code: None)
        self.ms = REFERENCE_MS / 4
        self.kernel: Callable[[], Any] = lambda: Whole(self.time, self.ms)
        self.reference: Callable[[], Any] = lambda: Side([])
        self.judge = judge = KernelJudge(device="cuda", timeout_s=WAIT_S, **({"workers": 1} | settings))
        self.traffic = judge._traffic
        judge.backend = judge.device = "cuda"
        judge.isolation, judge.isolation_reason, judge._versions = "namespaces", "", {"gpu": "none"}
        judge._zygote = FakeZygote()  # type: ignore[assignment]
        judge._pool = ThreadPoolExecutor(judge.workers)
        children = (lambda: self.kernel(), lambda: self.reference())
        lanes = [FakeLane(judge._traffic, *children) for _ in range(judge.workers)]
        judge._lanes = Lanes(lanes)  # type: ignore[arg-type]
        monkeypatch.setattr(judge, "_prepare", lambda *arguments, **more: doubling())

    def verify(self) -> Verdict:
        """The verdict; an error when it takes for ever, which it must not even when the judge blocks itself."""
        found: list[Verdict] = []
        thread = threading.Thread(target=lambda: found.append(self.judge.verify("problem", KERNEL)), daemon=True)
        thread.start()
        thread.join(WAIT_S)
        assert found, "the judge does not come to an end"
        return found[0]


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    room = Room(monkeypatch)
    yield room
    room.judge._lanes.close()
    room.judge._pool.shutdown()


def test_a_right_kernel_is_measured(room: Room) -> None:
    verdict = room.verify()
    assert (verdict.verdict, verdict.correctness, verdict.device) == ("verified", True, "cuda"), verdict.detail
    assert verdict.speedup == pytest.approx(4.0)
    assert verdict.speedup_low is not None and verdict.speedup_high is not None
    assert verdict.speedup_low < 4.0 < verdict.speedup_high
    assert (verdict.fast_0, verdict.fast_1, verdict.fast_2) == (True, True, True)
    assert verdict.reference_time_ms == pytest.approx(REFERENCE_MS, rel=0.02)
    assert verdict.kernel_time_ms == pytest.approx(REFERENCE_MS / 4, rel=0.02)
    assert (verdict.launch_bound, verdict.graph_speedup, verdict.compile_time_ms) == (False, None, None)
    assert (verdict.trials, verdict.torch_share, verdict.contract) == (2, 0.0, "name")


@pytest.mark.parametrize(("share", "flags"), [(1.0, (False, False)), (0.7, (True, False)), (2.0, (False, False))])
def test_a_flag_needs_the_whole_interval(room: Room, share: float, flags: tuple[bool, bool]) -> None:
    room.ms = share * REFERENCE_MS
    verdict = room.verify()
    assert verdict.correctness and (verdict.fast_1, verdict.fast_2) == flags


def test_a_wrong_kernel_is_not_measured_and_not_fast(room: Room) -> None:
    room.kernel = lambda: Doubler(lambda number, answer: answer | {"output": None})
    verdict = room.verify()
    assert verdict.verdict == "incorrect_structure"
    assert (verdict.fast_0, verdict.fast_1, verdict.fast_2, verdict.speedup) == (False, False, False, None)


class Liar(Whole):
    """Says that it takes a hundredth of the time."""

    def times(self, count: int) -> tuple[float, ...]:
        return (self.true_ms / 100,) * count


def test_a_right_kernel_that_lies_about_its_time_is_refused(room: Room) -> None:
    room.kernel = lambda: Liar(room.time, REFERENCE_MS)
    verdict = room.verify()
    assert (verdict.verdict, verdict.correctness, verdict.fast_1) == ("timing_tamper", False, False)
    assert verdict.speedup is None


class Vanishing(Side):
    """A reference's child that goes away when it is measured."""

    def block(self, seeds: tuple[int, ...], keep: int | None) -> Answer:
        raise SystemExit


def test_a_right_kernel_whose_reference_cannot_be_measured_is_right_of_unknown_speed(room: Room) -> None:
    room.reference = lambda: Vanishing([])
    verdict = room.verify()
    assert verdict.verdict == "verified" and "could not be measured" in verdict.detail
    assert (verdict.fast_0, verdict.fast_1, verdict.fast_2, verdict.speedup) == (True, None, None, None)


class Dying(Whole):
    """Goes away when it is measured."""

    def block(self, seeds: tuple[int, ...], keep: int | None) -> Answer:
        raise SystemExit


def test_a_kernel_that_ends_while_it_is_measured_is_judged_by_that(room: Room) -> None:
    room.kernel = lambda: Dying(room.time, 1.0)
    verdict = room.verify()
    assert (verdict.verdict, verdict.correctness, verdict.fast_1) == ("early_exit", False, False)


@pytest.mark.parametrize("cause", ["the zygote died", "memory ran out"])
def test_a_second_attempt_is_measured_too_and_blocks_nobody(
    room: Room, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    examine, attempts = module.examine, list[str]()

    def examine_at_last(*arguments: Any) -> Any:
        attempts.append(cause)
        if len(attempts) > 1:
            return examine(*arguments)
        if cause == "the zygote died":
            raise ZygoteDiedError("it died")
        return module.Examination(module.Finding("resource_limit", "Out of memory."))

    monkeypatch.setattr(module, "examine", examine_at_last)
    verdict = room.verify()
    assert len(attempts) == 2
    assert verdict.verdict == "verified" and verdict.speedup == pytest.approx(4.0)
    # Nobody is kept waiting afterwards.
    assert room.verify().verdict == "verified"


def test_several_kernels_are_measured_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(monkeypatch, workers=3)
    measuring: list[int] = []
    most: list[int] = []

    class Watched(Whole):
        def block(self, seeds: tuple[int, ...], keep: int | None) -> Answer:
            measuring.append(1)
            most.append(len(measuring))
            answer = super().block(seeds, keep)
            measuring.pop()
            return answer

    room.kernel = lambda: Watched(room.time, room.ms)
    items = [JudgeItem(str(number), f"problem {number % 2}", KERNEL) for number in range(6)]
    verdicts = list(room.judge.verify_many(items))
    assert [verdict.verdict for verdict in verdicts] == ["verified"] * 6
    assert all(verdict.speedup == pytest.approx(4.0) for verdict in verdicts)
    assert set(most) == {1}
    room.judge._lanes.close()
    room.judge._pool.shutdown()
