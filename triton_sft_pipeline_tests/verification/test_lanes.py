"""A lane has a fresh process for each kernel, the next one in advance, and one for references until it is dropped."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from triton_sft_pipeline.verification import wire
from triton_sft_pipeline.verification.lanes import Lane, Lanes
from triton_sft_pipeline.verification.sandbox.client import End, ZygoteDiedError
from triton_sft_pipeline.verification.sandbox.confine import Limits

LIMITS = {task: Limits(cpu_s=1, file_bytes=size) for task, size in (("kernel", 1), ("reference", 2))}


class FakeChild:
    """What a lane uses of a child; greets at once, or with something else, or hangs up."""

    def __init__(self, task: str, limits: Limits, greeting: dict[str, Any] | None) -> None:
        self.task, self.limits, self.closed = task, limits, 0
        self.socket, theirs = socket.socketpair()
        with theirs:
            if greeting is not None:
                wire.send(theirs, greeting)

    def end(self, timeout_s: float) -> End:
        return End(1, None, "no luck")

    def close(self) -> None:
        self.closed += 1
        self.socket.close()


class FakeZygote:
    """Starts such children."""

    def __init__(self) -> None:
        self.children: list[FakeChild] = []
        self.greeting: dict[str, Any] | None = {"ready": True}
        self.died = False

    def spawn(self, task: str, limits: Limits) -> FakeChild:
        if self.died:
            raise ZygoteDiedError("it died")
        self.children.append(FakeChild(task, limits, self.greeting))
        return self.children[-1]

    def alive(self) -> list[FakeChild]:
        return [child for child in self.children if not child.closed]


@pytest.fixture
def zygote() -> Iterator[FakeZygote]:
    zygote = FakeZygote()
    yield zygote
    for child in zygote.children:
        child.socket.close()


@pytest.fixture
def lane(zygote: FakeZygote) -> Lane:
    return Lane(zygote, LIMITS, None)  # type: ignore[arg-type]


def test_every_kernel_gets_a_process_of_its_own_with_the_limits_of_kernels(lane: Lane, zygote: FakeZygote) -> None:
    used = []
    for _ in range(3):
        with lane.kernel() as peer:
            used.append(peer.child)
            assert peer.child.closed == 0  # type: ignore[attr-defined]
    assert used == zygote.children[:3]
    assert {child.task for child in zygote.children} == {"kernel"}
    assert {child.limits.file_bytes for child in zygote.children} == {1}


def test_the_next_process_is_started_while_a_kernel_is_judged(lane: Lane, zygote: FakeZygote) -> None:
    assert zygote.children == []
    with lane.kernel() as peer:
        assert len(zygote.children) == 2
    with lane.kernel() as following:
        assert following.child is zygote.children[1] and peer.child is zygote.children[0]  # type: ignore[comparison-overlap]
    assert len(zygote.alive()) == 1


def test_a_kernels_process_is_closed_when_its_judgement_fails(lane: Lane, zygote: FakeZygote) -> None:
    with pytest.raises(KeyError), lane.kernel():
        raise KeyError
    assert zygote.children[0].closed and not zygote.children[1].closed


def test_one_process_serves_references_until_it_is_dropped(lane: Lane, zygote: FakeZygote) -> None:
    first = lane.reference()
    assert lane.reference() is first
    assert [child.limits.file_bytes for child in zygote.children] == [2]
    lane.drop_reference()
    lane.drop_reference()
    assert zygote.children[0].closed == 1
    assert lane.reference() is not first
    assert [child.task for child in zygote.children] == ["reference"] * 2


def test_closing_a_lane_ends_all_its_processes_and_it_can_be_used_again(lane: Lane, zygote: FakeZygote) -> None:
    lane.reference()
    with lane.kernel():
        pass
    lane.close()
    lane.close()
    assert zygote.alive() == []
    with lane.kernel():
        assert len(zygote.alive()) == 2


@pytest.mark.parametrize("greeting", [None, {"ready": False}, {"verdict": "verified"}], ids=str)
def test_a_fresh_process_that_does_not_get_ready_is_the_machines_fault(
    lane: Lane, zygote: FakeZygote, greeting: dict[str, Any] | None
) -> None:
    zygote.greeting = greeting
    with pytest.raises(ZygoteDiedError, match="did not get ready"), lane.kernel():
        pass
    with pytest.raises(ZygoteDiedError, match="no luck"):
        lane.reference()
    assert zygote.alive() == []
    zygote.greeting = {"ready": True}
    assert lane.reference().child.task == "reference"  # type: ignore[attr-defined]


def test_a_zygote_that_dies_before_the_next_process_leaves_nothing_open(lane: Lane, zygote: FakeZygote) -> None:
    with lane.kernel():
        pass
    zygote.died = True
    with pytest.raises(ZygoteDiedError), lane.kernel():
        pass
    assert zygote.alive() == []


def test_nobody_gets_a_lane_that_another_uses(zygote: FakeZygote) -> None:
    first, second = (Lane(zygote, LIMITS, None) for _ in range(2))  # type: ignore[arg-type]
    lanes = Lanes([first, second])
    taken: list[Lane] = []
    got = threading.Event()

    def take() -> None:
        with lanes.take() as lane:
            taken.append(lane)
            got.set()

    with lanes.take() as one, lanes.take() as other:
        assert {one, other} == {first, second}
        thread = threading.Thread(target=take)
        thread.start()
        assert not got.is_set()
    thread.join(10)
    assert taken in ([first], [second])


def test_a_lane_is_free_again_after_an_exception(zygote: FakeZygote) -> None:
    lanes = Lanes([Lane(zygote, LIMITS, None)])  # type: ignore[arg-type]
    with suppress(KeyError), lanes.take():
        raise KeyError
    with lanes.take() as lane:
        lane.reference()
    lanes.close()
    assert zygote.alive() == []
