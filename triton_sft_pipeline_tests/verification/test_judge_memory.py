"""Problems of gigabytes, made of a few hundred bytes, and references for which there is no memory beside others."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import pytest

from triton_sft_pipeline.verification import JudgeItem, KernelJudge, examination, references
from triton_sft_pipeline.verification import judge as module
from triton_sft_pipeline.verification.peer import MovingTimeoutError, Peer
from triton_sft_pipeline.verification.sandbox.client import ZygoteClient
from triton_sft_pipeline_tests.verification.peers import WAIT_S, Answer, doubling
from triton_sft_pipeline_tests.verification.snippets import DOUBLE, DOUBLE_KERNEL, LAUNCH, kernel, pointwise_kernel
from triton_sft_pipeline_tests.verification.snippets import problem as problem_of
from triton_sft_pipeline_tests.verification.test_judge_measures import Room, room
from triton_sft_pipeline_tests.verification.test_measurement import Side
from triton_sft_pipeline_tests.verification.worker import huge_tasks

__all__ = ["room"]
HUGE = problem_of("x * 2", inputs="[torch.rand(8, 8)]")
_TASKS = {
    "kernel": "triton_sft_pipeline.verification.worker.kernel_session:serve",
    "reference": f"{huge_tasks.__name__}:reference",
}


@pytest.fixture(scope="module")
def huge_judge() -> Iterator[KernelJudge]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "_HUGE_BYTES", huge_tasks.HUGE_BYTES)
        patch.setattr(examination, "_MANY", 32)
        patch.setattr(module, "inspect_source", lambda code: None)
        options = ["--tasks", json.dumps(_TASKS)]
        with ExitStack() as stack:
            # Undone at once: other judges of this process shall have the real tasks.
            with pytest.MonkeyPatch.context() as at_start:
                at_start.setattr(module, "ZygoteClient", functools.partial(ZygoteClient, options=options))
                judge = stack.enter_context(KernelJudge(device="cpu", workers=2, trials=5))
            yield judge


def test_a_right_kernel_for_huge_inputs_is_verified_in_one_trial(huge_judge: KernelJudge) -> None:
    verdict = huge_judge.verify(HUGE, DOUBLE_KERNEL)
    assert (verdict.verdict, verdict.trials) == ("verified", 1), verdict.detail
    assert verdict.detail.endswith("in 1 trial.")


def test_a_problem_of_the_usual_size_has_all_its_trials(huge_judge: KernelJudge) -> None:
    verdict = huge_judge.verify(problem_of("x * 2", inputs="[torch.rand(5)]"), DOUBLE_KERNEL)
    assert (verdict.verdict, verdict.trials) == ("verified", 5), verdict.detail
    assert "in 5 trials and 3 derived from them." in verdict.detail, "mixed, on both sides of zero, negated"


DUMMY = kernel(
    f"y = torch.empty_like(x)\n{LAUNCH}\nreturn torch.from_numpy(np.multiply(x.numpy(), 2))",
    prelude="import numpy as np\n",
)
WRONG = {
    "wrong values": (pointwise_kernel("x * 3"), "incorrect_numerical"),
    "wrong in the last element": (pointwise_kernel("tl.where(offsets == 63, x, x * 2)"), "incorrect_numerical"),
    "another computes it": (DUMMY, "dummy_kernel"),
    "another writes into what a kernel is given": (
        kernel(
            "y = torch.from_numpy(np.multiply(x.numpy(), 2))\nz = torch.empty_like(x)\n"
            "pointwise[(2,)](y, z, 64, BLOCK=32)\nreturn y.clone()",
            prelude="import numpy as np\n",
        ),
        "torch_fallback",
    ),
    "no launch": (kernel("return torch.from_numpy(x.numpy() * 2)"), "no_kernel_launch"),
    "PyTorch": (kernel(f"y = torch.empty_like(x)\n{LAUNCH}\nreturn x * 2"), "torch_fallback"),
    "a thread": (
        pointwise_kernel("x * 2", before="import threading\nthreading.Timer(1000, print).start()"),
        "thread_leak",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_for_huge_inputs_is_refused_by_name(huge_judge: KernelJudge, name: str) -> None:
    code, expected = WRONG[name]
    verdict = huge_judge.verify(HUGE, code)
    assert verdict.verdict == expected, verdict.detail


def test_a_kernel_that_writes_to_a_huge_input_as_its_reference_does_is_right(huge_judge: KernelJudge) -> None:
    verdict = huge_judge.verify(
        problem_of("x.mul_(2)", inputs="[torch.rand(8, 8)]"), pointwise_kernel("x * 2", output="x")
    )
    assert verdict.verdict == "verified", verdict.detail


@pytest.mark.parametrize(("size", "most"), [(64, 1), (5, 2)])
def test_only_one_kernel_for_huge_inputs_is_judged_at_a_time(
    huge_judge: KernelJudge, monkeypatch: pytest.MonkeyPatch, size: int, most: int
) -> None:
    examine, inside, seen = module.examine, threading.Semaphore(0), list[int]()
    # Two that meet here are judged at the same time; where they may not, nobody is waited for.
    meeting = threading.Barrier(2)

    def watched(*arguments: Any) -> Any:
        inside.release()
        if most > 1:
            meeting.wait(WAIT_S)
        seen.append(inside._value)
        if most > 1:
            meeting.wait(WAIT_S)
        found = examine(*arguments)
        inside.acquire()
        return found

    monkeypatch.setattr(module, "examine", watched)
    pytorch_code = problem_of("x * 2", inputs=f"[torch.rand({size})]")
    items = [JudgeItem(str(number), pytorch_code, DOUBLE_KERNEL) for number in range(4)]
    assert {verdict.verdict for verdict in huge_judge.verify_many(items)} == {"verified"}
    assert len(seen) == 4 and max(seen) == most


class Scarce(Side):
    """A reference's child that has too little memory for the first problems that it loads."""

    def __init__(self, answers: list[Answer]) -> None:
        super().__init__([])
        self._answers = answers

    def load(self, code: str, trials: int) -> Answer:
        return self._answers.pop(0)


OUT_OF_MEMORY: Answer = {"verdict": "resource_limit", "detail": "Out of memory: 80 GiB", "dirty": True}


def loaded() -> Answer:
    """What a reference's child answers for `doubling`."""
    reference = doubling()
    trials = [asdict(trial) | {"inputs": trial.inputs, "output": trial.output} for trial in reference.all_trials]
    derived = {"mixed": trials[-1], "shifted": None, "negative": None, "sparse": None, "mixable": True}
    arguments: Answer = {"state": {}, "available": {}, "init_inputs": None, "class_name": "Model", "aliases": ()}
    work = {"compute": 3.0, "copy": 0.0, "uses_bfloat16": False, "dirty": False}
    return {"trials": tuple(trials[:-1]), **derived, **arguments, **work}


@pytest.fixture
def attempts(room: Room, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each preparation of a reference had the GPU alone; they are the judge's own."""
    seen: list[bool] = []

    def prepare(lane: Any, pytorch_code: str, alone: bool) -> Any:
        seen.append(alone)
        assert room.traffic._alone is alone
        return KernelJudge._prepare(room.judge, lane, pytorch_code, alone)

    monkeypatch.setattr(room.judge, "_prepare", prepare)
    return seen


def test_a_reference_without_memory_beside_others_is_prepared_alone(room: Room, attempts: list[bool]) -> None:
    answers = [OUT_OF_MEMORY, loaded()]
    room.reference = lambda: Scarce(answers)
    verdict = room.verify()
    assert verdict.verdict == "verified" and verdict.speedup == pytest.approx(4.0), verdict.detail
    assert attempts == [False, True] and not answers
    # It is known by now, and nobody is kept waiting.
    assert room.verify().verdict == "verified" and attempts == [False, True]


def test_a_reference_without_memory_even_alone_is_the_problems_fault(room: Room, attempts: list[bool]) -> None:
    answers = [dict(OUT_OF_MEMORY) for _ in range(2)]
    room.reference = lambda: Scarce(answers)
    verdict = room.verify()
    assert (verdict.verdict, verdict.detail) == ("reference_error", "Out of memory: 80 GiB")
    assert attempts == [False, True] and not answers
    assert room.verify().verdict == "reference_error" and attempts == [False, True]


def test_a_reference_that_fails_in_another_way_is_not_tried_again(room: Room, attempts: list[bool]) -> None:
    room.reference = lambda: Scarce([{"verdict": "reference_error", "detail": "It fails.", "dirty": True}])
    assert room.verify().verdict == "reference_error"
    assert attempts == [False]


def test_memory_that_a_real_reference_asks_for_in_vain_is_asked_for_twice(
    judge: KernelJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, seen = judge._prepare, list[bool]()

    def counted(lane: Any, pytorch_code: str, alone: bool) -> Any:
        seen.append(alone)
        return prepare(lane, pytorch_code, alone)

    monkeypatch.setattr(judge, "_prepare", counted)
    verdict = judge.verify(problem_of("x * 2 + torch.zeros(1 << 44)[0]"), DOUBLE_KERNEL)
    assert verdict.verdict == "reference_error" and "The reference fails" in verdict.detail
    assert seen == [False, True]
    assert judge.verify(DOUBLE, DOUBLE_KERNEL).verdict == "verified"


def test_data_that_does_not_arrive_from_a_reference_says_nothing_about_the_kernel(
    room: Room, attempts: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = Peer.ask

    def ask(self: Any, do: str, *arguments: Any, **fields: Any) -> Any:
        if "trials" in fields:
            raise MovingTimeoutError("stuck")
        return genuine(self, do, *arguments, **fields)

    monkeypatch.setattr(Peer, "ask", ask)
    verdict = room.verify()
    assert verdict.verdict == "infra_error" and "no kernel was run" in verdict.detail
    assert attempts == [False]
