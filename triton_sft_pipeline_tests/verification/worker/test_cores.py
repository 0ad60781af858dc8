"""Measurements have processors to themselves where there are many, and nothing changes where there are few."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from triton_sft_pipeline.verification.worker import cores


class Machine(SimpleNamespace):
    """The module `os` of a machine with so many processors; `moves` are the changes that it was asked for."""

    def __init__(self, processors: int, allows: bool = True) -> None:
        self.processors, self.moves = set(range(processors)), list[list[int]]()

        def move(pid: int, processors: list[int]) -> None:
            assert pid == 0
            self.moves.append(processors)
            if not allows:
                raise PermissionError("not allowed")
            self.processors = set(processors)

        super().__init__(sched_getaffinity=lambda pid: set(self.processors), sched_setaffinity=move)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    def make(processors: int, **settings: Any) -> Machine:
        machine = Machine(processors, **settings)
        monkeypatch.setattr(cores, "os", machine)
        monkeypatch.setattr(cores, "_ALL", frozenset(machine.processors))
        return machine

    return make


def test_who_measures_has_two_processors_that_the_others_leave_alone(on: Callable[..., Machine]) -> None:
    machine = on(16)
    cores.stand_aside()
    others = machine.processors
    cores.come_forward()
    assert machine.processors == {0, 1} and others == set(range(2, 16))
    cores.stand_aside()
    assert machine.processors == others


def test_who_is_in_his_place_already_is_not_moved(on: Callable[..., Machine]) -> None:
    machine = on(8)
    for move in (cores.stand_aside, cores.stand_aside, cores.come_forward, cores.come_forward):
        move()
    assert machine.moves == [[2, 3, 4, 5, 6, 7], [0, 1]]


def test_processors_need_not_be_numbered_from_zero(on: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    machine = on(16)
    monkeypatch.setattr(cores, "_ALL", frozenset(range(20, 40, 2)))
    cores.come_forward()
    assert machine.processors == {20, 22}


@pytest.mark.parametrize("processors", [1, 4, 7])
def test_on_few_processors_nobody_moves(on: Callable[..., Machine], processors: int) -> None:
    machine = on(processors)
    cores.stand_aside()
    cores.come_forward()
    assert machine.moves == []


def test_where_it_is_not_allowed_nothing_fails(on: Callable[..., Machine]) -> None:
    machine = on(16, allows=False)
    cores.come_forward()
    assert machine.moves == [[0, 1]] and machine.processors == set(range(16))


def test_where_the_system_knows_no_such_thing_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "os", SimpleNamespace())
    monkeypatch.setattr(cores, "_ALL", frozenset())
    cores.stand_aside()
    cores.come_forward()


def in_a_child(run: Callable[[], Any]) -> Any:
    """What this gives in a fork of this process."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(sending, json.dumps(run()).encode())
        finally:
            os._exit(0)
    os.close(sending)
    with open(receiving, "rb") as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return json.loads(text)


def test_a_child_moves_itself_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        pytest.skip("this machine has one processor")
    monkeypatch.setattr(cores, "_ALL", frozenset(mine))
    monkeypatch.setattr(cores, "_FEWEST", 2)
    monkeypatch.setattr(cores, "_RESERVED", 1)

    def move() -> list[list[int]]:
        places = []
        for step in (cores.stand_aside, cores.come_forward, cores.stand_aside):
            step()
            places.append(sorted(os.sched_getaffinity(0)))
        return places

    assert in_a_child(move) == [mine[1:], mine[:1], mine[1:]]
    assert sorted(os.sched_getaffinity(0)) == mine
