"""Together and alone exclude each other, and nobody starves or waits for one that hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from triton_sft_pipeline.verification import traffic as module
from triton_sft_pipeline.verification.traffic import Traffic
from triton_sft_pipeline_tests.verification.peers import FakeTime


class User:
    """A thread that takes a turn and keeps it until it is told to go on."""

    def __init__(self, turn: AbstractContextManager[None], order: list[str], name: str) -> None:
        self.inside = threading.Event()
        self._release = threading.Event()
        self._thread = threading.Thread(target=self._use, args=(turn, order, name))
        self._thread.start()

    def _use(self, turn: AbstractContextManager[None], order: list[str], name: str) -> None:
        with turn:
            order.append(name)
            self.inside.set()
            self._release.wait(10)

    def release(self) -> None:
        self._release.set()

    def leave(self) -> None:
        self.release()
        self._thread.join(10)
        assert self.inside.is_set()


def wait_for(traffic: Traffic, condition: Callable[[], bool]) -> None:
    with traffic._changed:
        assert traffic._changed.wait_for(condition, timeout=10)


def test_many_run_together() -> None:
    traffic = Traffic()
    barrier = threading.Barrier(3, timeout=10)

    def member() -> None:
        with traffic.together():
            barrier.wait()

    threads = [threading.Thread(target=member) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not barrier.broken


def test_whoever_is_alone_meets_nobody_and_goes_before_newcomers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 3600.0)
    traffic, order = Traffic(), list[str]()
    first = User(traffic.together(), order, "first")
    assert first.inside.wait(10)
    alone = User(traffic.alone(), order, "alone")
    wait_for(traffic, lambda: len(traffic._waiting) == 1)
    newcomer = User(traffic.together(), order, "newcomer")
    first.leave()
    assert alone.inside.wait(10)
    assert not newcomer.inside.is_set()
    alone.leave()
    newcomer.leave()
    assert order == ["first", "alone", "newcomer"]


def test_newcomers_join_one_that_takes_long_before_whoever_wants_to_be_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    traffic, order = Traffic(), list[str]()
    first = User(traffic.together(), order, "first")
    assert first.inside.wait(10)
    alone = User(traffic.alone(), order, "alone")
    wait_for(traffic, lambda: len(traffic._waiting) == 1)
    newcomer = User(traffic.together(), order, "newcomer")
    assert newcomer.inside.wait(10)
    assert not alone.inside.is_set()
    first.leave()
    assert not alone.inside.is_set()
    newcomer.leave()
    alone.leave()
    assert order == ["first", "newcomer", "alone"]


def test_nobody_joins_whoever_is_alone_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    traffic, order = Traffic(), list[str]()
    with traffic.alone():
        newcomer = User(traffic.together(), order, "newcomer")
        assert order == []
    newcomer.leave()
    assert order == ["newcomer"]


def holds_back(traffic: Traffic) -> bool:
    with traffic._changed:
        return traffic._holds_back()


def test_newcomers_are_held_back_when_enough_wait_to_be_alone() -> None:
    traffic, order = Traffic(batch=2), list[str]()
    first = User(traffic.together(), order, "first")
    assert first.inside.wait(10)
    waiting = [User(traffic.alone(), order, "alone")]
    wait_for(traffic, lambda: len(traffic._waiting) == 1)
    newcomer = User(traffic.together(), order, "newcomer")
    assert newcomer.inside.wait(10)
    waiting.append(User(traffic.alone(), order, "alone"))
    wait_for(traffic, lambda: len(traffic._waiting) == 2)
    assert holds_back(traffic)
    for user in (first, newcomer, *waiting):
        user.release()
    for user in (first, newcomer, *waiting):
        user.leave()
    assert order == ["first", "newcomer", "alone", "alone"]
    assert not holds_back(traffic)


def test_whoever_has_waited_long_to_be_alone_waits_for_no_more_newcomers(monkeypatch: pytest.MonkeyPatch) -> None:
    time = FakeTime()
    monkeypatch.setattr(module, "time", time)
    traffic, order = Traffic(batch=5), list[str]()
    first = User(traffic.together(), order, "first")
    assert first.inside.wait(10)
    alone = User(traffic.alone(), order, "alone")
    wait_for(traffic, lambda: len(traffic._waiting) == 1)
    time.passed = 0.9 * module.PATIENCE_S
    assert not holds_back(traffic)
    second = User(traffic.together(), order, "second")
    assert second.inside.wait(10)
    first.leave()
    time.passed = 1.5 * module.PATIENCE_S
    assert holds_back(traffic)
    # The second one, too, has now taken so long that being alone is far off.
    time.passed = 2.5 * module.PATIENCE_S
    assert not holds_back(traffic)
    second.leave()
    alone.leave()
    assert order == ["first", "second", "alone"]


def test_two_that_want_to_be_alone_take_turns() -> None:
    traffic, order = Traffic(), list[str]()
    first = User(traffic.alone(), order, "first")
    assert first.inside.wait(10)
    second = User(traffic.alone(), order, "second")
    wait_for(traffic, lambda: len(traffic._waiting) == 1)
    assert not second.inside.is_set()
    first.leave()
    second.leave()
    assert order == ["first", "second"]


def test_a_turn_ends_with_an_exception_too() -> None:
    traffic = Traffic()
    for turn in (traffic.together, traffic.alone):
        with pytest.raises(KeyError), turn():
            raise KeyError
    with traffic.alone():
        pass
