"""What is said of an evaluation while it runs, by a clock of the test's own."""

from __future__ import annotations

import pytest

from triton_sft_pipeline.evaluation import meter as module
from triton_sft_pipeline.evaluation.meter import Meter


class Told:
    """A `Progress` and the clock that it is told by."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.said: list[tuple[int, int, str]] = []
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        self.said.append((done, total, note))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(monkeypatch)


def test_before_the_first_answer_ends_tokens_and_the_longest_that_it_can_take_are_told(told: Told) -> None:
    meter = Meter(6, 0, 0, 100, told)
    told.now += 10
    meter.running([20, 20])
    # 40 tokens in 10 s; 80 are left of each of the two, and 100 of each of the four that wait.
    assert told.said[-1] == (0, 12, "4 tokens/s, at most 2:20 of asking left, 2 at 20 tokens, 0/6 answers")


def test_short_answers_do_not_speak_for_those_that_are_still_written(told: Told) -> None:
    meter = Meter(4, 0, 0, 100, told)
    told.now += 10
    meter.running([20, 20, 20])
    meter.generated(20)
    # 80 tokens for one that ended: 60 are left of each of three.
    assert told.said[-1] == (1, 8, "8 tokens/s, 0:22 of asking left, 3 at 20 tokens, 1/4 answers")
    told.now += 10
    meter.running([])
    for tokens in (40, 50, 50):
        meter.generated(tokens)
    assert told.said[-1] == (4, 8, "8 tokens/s, 0:00 of asking left, 4/4 answers")


def test_answers_of_a_server_are_told_from_the_shortest_to_the_longest(told: Told) -> None:
    meter = Meter(8, 6, 2, 100, told)
    told.now += 1
    meter.running([7, 30])
    assert told.said[-1] == (8, 16, "37 tokens/s, at most 0:04 of asking left, 2 at 7 to 30 tokens, 6/8 answers")


def test_no_token_is_too_many_for_the_one_who_is_told(told: Told) -> None:
    meter = Meter(2, 0, 0, 100_000, told)
    for tokens in range(1, 1001):
        told.now += 0.01
        meter.running([tokens, tokens])
    assert 15 <= len(told.said) <= 21, "twice a second"
    Meter(2, 0, 0, 100, None).running([1, 1])


def test_verdicts_are_timed_from_when_judging_began(told: Told) -> None:
    meter = Meter(4, 4, 1, 100, told)
    told.now += 1000
    meter.judging()
    told.now += 2
    meter.judged()
    assert told.said[-1] == (6, 8, "0.5 verdicts/s, 0:04 left, 2/4 verdicts")
