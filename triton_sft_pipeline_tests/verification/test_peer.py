"""The two ends of a conversation, over a real socket: questions, answers, turns on the GPU and every way to fail."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest

from triton_sft_pipeline.verification import peer as module
from triton_sft_pipeline.verification import wire
from triton_sft_pipeline.verification.peer import Clock, MovingTimeoutError, Share
from triton_sft_pipeline.verification.traffic import Traffic
from triton_sft_pipeline.verification.wire import ClosedError, WireError
from triton_sft_pipeline.verification.worker import session
from triton_sft_pipeline.verification.worker.session import GpuGate
from triton_sft_pipeline_tests.verification.peers import WAIT_S, FakeTime, Serve, array, connected


def serving(needs_gpu: bool = False, **handlers: Callable[..., Any]) -> Serve:
    """An honest child."""
    return lambda sock: session.serve(sock, GpuGate(sock, needs_gpu), handlers)


def entering(gate: GpuGate) -> dict[str, Any]:
    """A handler that does nothing on the GPU."""
    gate.enter()
    return {}


def replying(*replies: Callable[[dict[str, Any]], dict[str, Any]]) -> Serve:
    """A child that answers one question with these messages, which it makes of the question, and waits for the end."""

    def serve(sock: socket.socket) -> None:
        question = wire.receive(sock)
        for reply in replies:
            wire.send(sock, reply(question))
        hang_on(sock)

    return serve


def hang_on(sock: socket.socket) -> None:
    """Wait until the judge closes the connection."""
    while sock.recv(1 << 16):
        pass


class CountingTraffic(Traffic):
    """Counts who is together, and how often anybody was."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = self.present = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        with super().together():
            self.turns += 1
            self.present += 1
            try:
                yield
            finally:
                self.present -= 1


def test_questions_are_answered_one_after_another() -> None:
    with connected(serving(double=lambda x: {"y": 2 * x}, name=lambda: {"name": "child"})) as peer:
        peer.wait_ready(WAIT_S)
        clock = Clock(WAIT_S)
        assert [peer.ask("double", clock, x=x) for x in (1, 2)] == [{"y": 2}, {"y": 4}]
        assert peer.ask("name", clock) == {"name": "child"}


def test_a_question_is_asked_with_a_nonce_that_is_never_the_same() -> None:
    nonces: list[Any] = []

    def note(sock: socket.socket) -> None:
        for _ in range(3):
            question = wire.receive(sock)
            nonces.append(question["nonce"])
            wire.send(sock, {"nonce": question["nonce"]})

    with connected(note) as peer:
        for _ in range(3):
            assert peer.ask("anything", Clock(WAIT_S)) == {}
    assert len(set(nonces)) == 3 and all(len(nonce) == 32 for nonce in nonces)


BROKEN: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "no nonce": lambda question: {"output": 1},
    "another nonce": lambda question: {"nonce": "0" * 32},
    "a nonce of another type": lambda question: {"nonce": array([1.0])},
    "a turn with something else in it": lambda question: {"want": "gpu", "verdict": "verified"},
    "the greeting again": lambda question: {"ready": True},
    "an end of something": lambda question: {"done": "cpu"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_answer_that_is_none_breaks_the_protocol(name: str) -> None:
    with connected(replying(BROKEN[name])) as peer, pytest.raises(WireError):
        peer.ask("call", Clock(WAIT_S), max_bytes=1000)


def test_what_comes_with_an_answer_breaks_the_protocol() -> None:
    def serve(sock: socket.socket) -> None:
        nonce = wire.receive(sock)["nonce"]
        ours, theirs = socket.socketpair()
        with ours, theirs:
            wire.send(ours, {"nonce": nonce})
            frame = theirs.recv(1 << 16)
        # In one piece, so that it is there when the answer is.
        sock.sendall(frame + b"x")
        hang_on(sock)

    with connected(serve) as peer, pytest.raises(WireError, match="more than an answer"):
        peer.ask("call", Clock(WAIT_S))


def test_an_answer_may_hold_no_more_bytes_than_were_allowed() -> None:
    answer = {"output": array([1.0] * 8)}
    with connected(serving(call=lambda: answer)) as peer:
        peer.wait_ready(WAIT_S)
        assert len(peer.ask("call", Clock(WAIT_S), max_bytes=32)["output"].data) == 32
        assert len(peer.ask("call", Clock(WAIT_S), max_bytes=None)["output"].data) == 32
        with pytest.raises(WireError, match="more bytes"):
            peer.ask("call", Clock(WAIT_S), max_bytes=31)


def test_a_greeting_must_be_one() -> None:
    for greeting in ({"ready": False}, {"ready": True, "verdict": "verified"}, {}):

        def greet(sock: socket.socket, greeting: dict[str, Any] = greeting) -> None:
            wire.send(sock, greeting)
            hang_on(sock)

        with connected(greet) as peer, pytest.raises(WireError, match="greet"):
            peer.wait_ready(WAIT_S)


def test_silence_is_a_timeout_and_an_end_is_an_end() -> None:
    with connected(hang_on) as peer, pytest.raises(TimeoutError):
        peer.ask("call", Clock(0.05))
    with connected(hang_on) as peer, pytest.raises(TimeoutError):
        peer.wait_ready(0.05)
    with connected(hang_on) as peer, pytest.raises(TimeoutError):
        peer.ask("call", Clock(-1.0))
    with connected(lambda sock: None) as peer, pytest.raises(ClosedError):
        peer.ask("call", Clock(WAIT_S))
    with connected(lambda sock: None) as peer, pytest.raises(ClosedError):
        peer.wait_ready(WAIT_S)


def test_half_an_answer_is_a_timeout_while_it_hangs_and_an_end_when_it_ends() -> None:
    def half(sock: socket.socket) -> None:
        wire.receive(sock)
        sock.sendall((100).to_bytes(8, "little") + b"{")

    def half_and_hang(sock: socket.socket) -> None:
        half(sock)
        hang_on(sock)

    with connected(half) as peer, pytest.raises(ClosedError):
        peer.ask("call", Clock(WAIT_S))
    with connected(half_and_hang) as peer, pytest.raises(TimeoutError):
        peer.ask("call", Clock(0.05))


def test_a_child_that_fails_hangs_up() -> None:
    def fail(sock: socket.socket) -> None:
        with pytest.raises(KeyError):
            serving()(sock)

    with connected(fail) as peer:
        peer.wait_ready(WAIT_S)
        with pytest.raises(ClosedError):
            peer.ask("nothing that it knows", Clock(WAIT_S))


def test_a_child_holds_the_gpu_from_its_wish_to_its_answer() -> None:
    traffic = CountingTraffic()
    present: list[int] = []

    def serve(sock: socket.socket) -> None:
        gate = GpuGate(sock, needed=True)

        def use() -> dict[str, Any]:
            present.append(traffic.present)
            gate.enter()
            gate.enter()
            present.append(traffic.present)
            return {}

        session.serve(sock, gate, {"use": use})

    with connected(serve, traffic) as peer:
        peer.wait_ready(WAIT_S)
        for _ in range(2):
            peer.ask("use", Clock(WAIT_S))
            assert traffic.present == 0
    assert present == [0, 1, 0, 1]
    assert traffic.turns == 2


def test_a_child_that_leaves_the_gpu_lets_others_be_alone_and_comes_back_after_them() -> None:
    traffic = CountingTraffic()
    left, others_done = threading.Event(), threading.Event()

    def serve(sock: socket.socket) -> None:
        gate = GpuGate(sock, needed=True)

        def use() -> dict[str, Any]:
            gate.enter()
            gate.leave()
            left.set()
            others_done.wait(WAIT_S)
            gate.enter()
            return {"entered": gate.entered}

        session.serve(sock, gate, {"use": use})

    def measure() -> None:
        left.wait(WAIT_S)
        with traffic.alone():
            others_done.set()

    other = threading.Thread(target=measure)
    other.start()
    with connected(serve, traffic) as peer:
        peer.wait_ready(WAIT_S)
        assert peer.ask("use", Clock(WAIT_S)) == {"entered": True}
    other.join(WAIT_S)
    assert others_done.is_set() and traffic.turns == 2


def test_nobody_waits_for_a_turn_where_the_caller_is_alone_or_there_is_no_gpu() -> None:
    traffic = CountingTraffic()

    def serve(sock: socket.socket) -> None:
        gate = GpuGate(sock, needed=True)
        session.serve(sock, gate, {"use": lambda: entering(gate)})

    with connected(serve, traffic) as peer:
        peer.wait_ready(WAIT_S)
        with traffic.alone():
            assert peer.ask("use", Clock(WAIT_S), alone=True) == {}
    with connected(serve, None) as peer:
        peer.wait_ready(WAIT_S)
        assert peer.ask("use", Clock(WAIT_S)) == {}
    gate = GpuGate(None, needed=False)  # type: ignore[arg-type]
    gate.enter()
    gate.leave()
    assert traffic.turns == 0 and not gate.entered


def test_a_child_that_is_alone_is_never_kept_waiting_and_takes_no_turn_of_others() -> None:
    traffic = CountingTraffic()

    def serve(sock: socket.socket) -> None:
        gate = GpuGate(sock, needed=True)
        session.serve(sock, gate, {"use": lambda: entering(gate)})

    with connected(serve, traffic) as peer:
        peer.wait_ready(WAIT_S)
        peer.alone = True
        with traffic.alone():
            assert peer.ask("use", Clock(WAIT_S)) == {}
            with peer.using_gpu(Clock(WAIT_S)):
                assert peer.ask("use", Clock(WAIT_S)) == {}
        assert traffic.turns == 0
        peer.alone = False
        with peer.using_gpu(Clock(WAIT_S)):
            assert traffic.present == 1
            assert peer.ask("use", Clock(WAIT_S)) == {}
        peer.ask("use", Clock(WAIT_S))
        assert (traffic.turns, traffic.present) == (2, 0)


@pytest.mark.parametrize("alone", [False, True])
def test_asking_for_the_gpu_twice_breaks_the_protocol(alone: bool) -> None:
    wish = lambda question: {"want": "gpu"}  # noqa: E731
    traffic = CountingTraffic()
    with connected(replying(wish, wish), traffic) as peer:
        peer.alone = alone
        with pytest.raises(WireError, match="asked for twice"):
            peer.ask("call", Clock(WAIT_S))
    assert (traffic.turns, traffic.present) == (0 if alone else 1, 0)


def test_the_gpu_may_be_asked_for_again_after_it_was_given_back() -> None:
    wish, end = (lambda question: {"want": "gpu"}), (lambda question: {"done": "gpu"})
    traffic = CountingTraffic()
    with connected(replying(wish, end, wish, lambda question: {"nonce": question["nonce"]}), traffic) as peer:
        assert peer.ask("call", Clock(WAIT_S)) == {}
    assert (traffic.turns, traffic.present) == (2, 0)


def test_the_gpu_is_given_back_when_a_child_dies_or_cheats_while_it_has_it() -> None:
    def die(sock: socket.socket) -> None:
        wire.receive(sock)
        wire.send(sock, {"want": "gpu"})
        wire.receive(sock)

    def cheat(sock: socket.socket) -> None:
        die(sock)
        wire.send(sock, {"nonce": "mine"})
        hang_on(sock)

    for serve, error in ((die, ClosedError), (cheat, WireError)):
        traffic = CountingTraffic()
        with connected(serve, traffic) as peer, pytest.raises(error):
            peer.ask("call", Clock(WAIT_S))
        assert (traffic.turns, traffic.present) == (1, 0)


def test_an_end_of_a_turn_that_never_began_does_no_harm() -> None:
    reply = replying(lambda question: {"done": "gpu"}, lambda question: {"nonce": question["nonce"]})
    with connected(reply, CountingTraffic()) as peer:
        assert peer.ask("call", Clock(WAIT_S)) == {}


@contextmanager
def slow_turn(time: FakeTime, seconds: float) -> Iterator[None]:
    """A turn that has to be waited for, and that is used as long."""
    time.passed += seconds
    yield
    time.passed += seconds


def test_the_clock_counts_the_use_of_a_turn_and_not_the_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    time = FakeTime()
    monkeypatch.setattr(module, "time", time)
    clock = Clock(60.0)
    with clock.waiting(slow_turn(time, 100.0)):
        assert clock.deadline - time.monotonic() == pytest.approx(60.0)
    assert clock.deadline - time.monotonic() == pytest.approx(-40.0)


def test_a_child_gets_the_time_back_that_it_waited_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    time = FakeTime()
    monkeypatch.setattr(module, "time", time)

    def serve(sock: socket.socket) -> None:
        gate = GpuGate(sock, needed=True)
        session.serve(sock, gate, {"use": lambda: entering(gate)})

    traffic = SimpleNamespace(together=lambda: slow_turn(time, 1000.0))
    with connected(serve, traffic) as peer:
        peer.wait_ready(WAIT_S)
        clock = Clock(WAIT_S)
        before = clock.deadline
        assert peer.ask("use", clock) == {}
    assert clock.deadline - before == pytest.approx(1000.0)


def test_moving_data_and_the_judges_own_work_are_no_time_of_a_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    time = FakeTime()
    monkeypatch.setattr(module, "time", time)
    clock = Clock(60.0, 100.0)
    for share, took, left in (
        (Share.JUDGE, 90.0, 10.0),
        (Share.MOVING, 70.0, 30.0),
        (Share.KERNEL, 50.0, 10.0),
        (Share.MOVING, 20.0, 10.0),
        (Share.KERNEL, 5.0, 5.0),
    ):
        clock.count(share)
        time.passed += took
        assert clock.deadline - time.monotonic() == pytest.approx(left)
    clock.count(Share.JUDGE)
    assert not clock.is_judge_late
    with clock.waiting(slow_turn(time, 1000.0)):
        assert not clock.is_judge_late
    assert clock.is_judge_late


def test_without_a_limit_for_moving_all_time_is_the_childs(monkeypatch: pytest.MonkeyPatch) -> None:
    time = FakeTime()
    monkeypatch.setattr(module, "time", time)
    clock = Clock(60.0)
    for share in Share:
        clock.count(share)
        time.passed += 10.0
        assert clock.counts is Share.KERNEL and not clock.is_judge_late
    assert clock.deadline - time.monotonic() == pytest.approx(30.0)


LONG_S, SHORT_S = 0.4, 0.1


def moving(sock: socket.socket) -> None:
    """A child that moves much data in each of its answers."""
    gate = GpuGate(sock, needed=False)

    def work() -> dict[str, Any]:
        gate.moves(1 << 30)
        time.sleep(LONG_S)
        gate.computes()
        gate.moves(1 << 30)
        time.sleep(LONG_S)
        return {}

    # The judge may have lost its patience.
    with suppress(ClosedError):
        session.serve(sock, gate, {"work": work})


def test_a_child_that_says_that_it_moves_data_has_time_of_its_own_for_it() -> None:
    with connected(moving) as peer:
        peer.wait_ready(WAIT_S)
        clock = Clock(SHORT_S, WAIT_S)
        assert peer.ask("work", clock) == {} == peer.ask("work", clock)
        assert clock.counts is Share.JUDGE
    with connected(moving) as peer, pytest.raises(TimeoutError) as caught:
        peer.wait_ready(WAIT_S)
        peer.ask("work", Clock(SHORT_S))
    assert not isinstance(caught.value, MovingTimeoutError)


def test_moving_has_an_end_for_those_who_say_it_while_they_compute() -> None:
    with connected(moving) as peer, pytest.raises(MovingTimeoutError, match=r"hand over its outputs in 0\.5 s"):
        peer.wait_ready(WAIT_S)
        peer.ask("work", Clock(WAIT_S, LONG_S + SHORT_S))


def test_changing_sides_without_an_end_gains_no_time() -> None:
    def serve(sock: socket.socket) -> None:
        wire.receive(sock)
        with suppress(ClosedError):
            while True:
                wire.send(sock, {"moves": True})
                wire.send(sock, {"moves": False})

    with connected(serve) as peer, pytest.raises(TimeoutError):
        peer.ask("work", Clock(SHORT_S, SHORT_S))


def test_a_child_that_moves_little_does_not_say_so() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        gate = GpuGate(theirs, needed=False)
        gate.moves(1 << 20)
        gate.computes()
        assert not wire.has_more(ours)
        gate.moves(1 << 21)
        gate.moves(1 << 21)
        gate.computes()
        assert [wire.receive(ours), wire.receive(ours)] == [{"moves": True}, {"moves": False}]
        assert not wire.has_more(ours)
