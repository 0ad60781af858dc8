"""Kernels for one problem, one of which is judged alone: nobody waits for whoever waits for him."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from triton_sft_pipeline.verification import JudgeItem, KernelJudge, Verdict
from triton_sft_pipeline_tests.verification.peers import WAIT_S
from triton_sft_pipeline_tests.verification.test_judge_measures import KERNEL, Room
from triton_sft_pipeline_tests.verification.test_judge_memory import OUT_OF_MEMORY, Scarce, loaded


def test_whoever_is_alone_waits_for_nobody_who_waits_for_him(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(monkeypatch, workers=2)
    answers = [OUT_OF_MEMORY, loaded(), loaded()]
    room.reference = lambda: Scarce(answers)
    decide, attempts, beside = room.judge._decide, list[bool](), threading.Event()
    both = threading.Barrier(2)

    def decided(lane: Any, pytorch_code: str, triton_code: str, alone: bool) -> Any:
        # The second attempt begins when another kernel for the same problem prepares the reference, too.
        beside.wait(WAIT_S) if alone else both.wait(WAIT_S)
        return decide(lane, pytorch_code, triton_code, alone)

    def prepare(lane: Any, pytorch_code: str, alone: bool) -> Any:
        attempts.append(alone)
        if attempts == [False, False]:
            with room.traffic._changed:
                assert room.traffic._changed.wait_for(lambda: room.traffic._alone, WAIT_S)
            beside.set()
        return KernelJudge._prepare(room.judge, lane, pytorch_code, alone)

    monkeypatch.setattr(room.judge, "_decide", decided)
    monkeypatch.setattr(room.judge, "_prepare", prepare)
    verdicts: list[Verdict] = []
    items = [JudgeItem(str(number), "problem", KERNEL) for number in range(2)]
    judging = threading.Thread(target=lambda: verdicts.extend(room.judge.verify_many(items)), daemon=True)
    judging.start()
    judging.join(WAIT_S)
    stuck = judging.is_alive()
    with room.traffic._changed:
        # Lets a judge that blocks itself go, so that this test ends.
        room.traffic._alone = room.traffic._alone and not stuck
        room.traffic._changed.notify_all()
    judging.join(WAIT_S)
    room.judge._lanes.close()
    room.judge._pool.shutdown()
    assert not stuck
    assert [verdict.verdict for verdict in verdicts] == ["verified"] * 2
