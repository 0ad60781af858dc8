"""Traces judged for a test: by a judge that knows its answer, into a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from triton_sft_pipeline.judgeable import Judgeable, Refused, read_judgeable
from triton_sft_pipeline.judging import JudgeSettings, judge_records
from triton_sft_pipeline.verification import JudgeItem, KernelJudge, Verdict
from triton_sft_pipeline_tests.traces.records import record


class RecordingJudge:
    """Calls every kernel verified, in reverse order, and keeps what it was asked. Dies after `dies_after` verdicts."""

    def __init__(self, dies_after: int | None = None, **verdict: Any) -> None:
        self.asked: list[JudgeItem] = []
        self.dies_after = dies_after
        self.verdict = {"verdict": "verified", "correctness": True, "fast_0": True, "speedup": 1.25, **verdict}

    def verify_many(self, items: Iterable[JudgeItem]) -> Iterator[Verdict]:
        for done, item in enumerate(reversed(list(items))):
            if done == self.dies_after:
                raise KeyboardInterrupt
            self.asked.append(item)
            yield Verdict(key=item.key, **self.verdict)


SETTINGS = JudgeSettings("cuda")


def judged(
    records: list[Judgeable],
    judge: RecordingJudge,
    out: Path,
    settings: JudgeSettings = SETTINGS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Verdict]:
    """The verdicts of `judge_records`: identity -> verdict."""
    return judge_records(records, cast(KernelJudge, judge), out, settings, progress).verdicts


def both(places: list[Path]) -> tuple[list[Judgeable], list[str]]:
    """What can be judged, and the sentences about what cannot."""
    everything = read_judgeable(places)
    found = [item for item in everything if isinstance(item, Judgeable)]
    return found, [item.sentence for item in everything if isinstance(item, Refused)]


def conversation(number: int, codes: list[str | None], final: str | None, **changes: Any) -> dict[str, Any]:
    """A record with a turn for each of the codes, and a final kernel, every one labelled wrong."""
    wrong = {"correctness": False, "error": "old"}
    plain = record(number, triton_code=..., result=...)
    turns = [{"turn": n, "triton_code": code, "result": dict(wrong)} for n, code in enumerate(codes, 1)]
    return {**plain, "final_triton_code": final, "final_result": dict(wrong), "turns": turns, **changes}
