"""The parts of the judge's benchmark: each runs something and gives its figures as plain data."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import judge_figures as figures
import judge_kernels
import judge_yardstick
from judge_machine import BusyGpu

from triton_sft_pipeline.judgeable import Judgeable
from triton_sft_pipeline.verification import JudgeItem, KernelJudge, Verdict

HANG_LIMIT_S = 2.0
_SAY_EVERY_S = 5.0


@dataclass(frozen=True)
class Options:
    """What the parts share. `device` is "cuda" or "cpu", `say` prints a line."""

    device: str
    workers: int
    trials: int
    timeout_s: float
    timing: bool
    say: Callable[[str], None]


def open_judge(options: Options, **changes: Any) -> KernelJudge:
    settings = {
        "device": options.device,
        "workers": options.workers,
        "timeout_s": options.timeout_s,
        "trials": options.trials,
        "timing": options.timing,
    }
    return KernelJudge(**{**settings, **changes})


def judge_all(
    options: Options,
    part: str,
    items: Sequence[JudgeItem],
    on_verdict: Callable[[Verdict], None] = lambda verdict: None,
) -> tuple[list[Verdict], float, float, float | None]:
    """Judge items in a judge of their own.

    Returns:
        The verdicts; seconds until the judge was ready; seconds from then to the last verdict; share of that time that
        the GPU was busy, if it is known.
    """
    verdicts: list[Verdict] = []
    progress = Progress(options.say, part, len(items))
    began = time.monotonic()
    with open_judge(options) as judge:
        ready = time.monotonic()
        progress.say(f"judge ready after {ready - began:.1f} s, {judge.workers} at once on {options.device}")
        with BusyGpu() as gpu:
            for verdict in judge.verify_many(items):
                verdicts.append(verdict)
                on_verdict(verdict)
                progress.add(verdict.verdict)
            ended = time.monotonic()
    if len(verdicts) != len(items):
        raise AssertionError(f"{len(items)} kernels were given and {len(verdicts)} verdicts came")
    return verdicts, ready - began, ended - ready, gpu.share


class Progress:
    """Says every few seconds how far a part is."""

    def __init__(self, say: Callable[[str], None], part: str, total: int) -> None:
        self._say, self._part, self._total = say, part, total
        self._counts: Counter[str] = Counter()
        self._began = self._said = time.monotonic()

    def add(self, outcome: str) -> None:
        self._counts[outcome] += 1
        now = time.monotonic()
        if now - self._said >= _SAY_EVERY_S or self._counts.total() == self._total:
            self._said = now
            top = ", ".join(f"{count} {name}" for name, count in self._counts.most_common(3))
            self.say(f"{self._counts.total()}/{self._total} after {now - self._began:.0f} s: {top}")

    def say(self, text: str) -> None:
        self._say(f"[{self._part}] {text}")


def run_rate(
    options: Options, records: Sequence[Judgeable], on_verdict: Callable[[Verdict], None]
) -> tuple[dict[str, Any], dict[str, Verdict]]:
    """Judge the records: the figures, and the verdicts by the records' identity."""
    verdicts, start_s, judging_s, busy = judge_all(options, "rate", [r.item for r in records], on_verdict)
    found = figures.rate(verdicts, start_s, judging_s)
    labels = {record.identity: record.label for record in records}
    found |= {"gpu_busy": busy, "timing": options.timing, "labels": figures.label_agreement(verdicts, labels)}
    return found, {verdict.key: verdict for verdict in verdicts}


def run_yardstick(
    options: Options, records: Sequence[Judgeable], judged: Mapping[str, Verdict], timeout_s: float
) -> dict[str, Any]:
    """Run a process a kernel, for the kernels that the judge executed (`judged`, by identity); all if it judged none.

    What the judge refused without running it would cost the yardstick a process each, or minutes, and count nowhere.
    """
    ran = {verdict.key for verdict in figures.executed(list(judged.values()))}
    chosen = [record for record in records if not judged or record.identity in ran]
    tasks = [judge_yardstick.Task(r.identity, r.record.value["pytorch_code"], r.code) for r in chosen]
    progress = Progress(options.say, "yardstick", len(tasks))
    progress.say(f"{len(tasks)} kernels, a process each, {options.workers} at once on {options.device}")
    began = time.monotonic()
    with BusyGpu() as gpu:
        outcomes = judge_yardstick.run_all(
            tasks,
            options.device,
            options.workers,
            options.trials,
            options.timing,
            lambda outcome: progress.add(outcome.outcome),
            timeout_s,
        )
        seconds = time.monotonic() - began
    executed = [outcome for outcome in outcomes if outcome.executed]
    finished = {outcome.key: outcome.wall_s for outcome in executed if outcome.outcome != "timeout"}
    walls = {key: verdict.wall_s for key, verdict in judged.items() if key in ran and verdict.verdict != "timeout"}
    return {
        "kernels": len(outcomes),
        "executed": len(executed),
        "seconds": seconds,
        "kernels_per_minute": figures.per_minute(len(executed), seconds),
        "median_wall_s": figures.quantile([outcome.wall_s for outcome in executed], 0.5),
        "timeouts": sum(outcome.outcome == "timeout" for outcome in outcomes),
        "outcomes": dict(Counter(outcome.outcome for outcome in outcomes).most_common()),
        "gpu_busy": gpu.share,
        "common": figures.common(walls, finished, options.workers),
        "kernels_one_by_one": [asdict(outcome) for outcome in outcomes],
    }


def run_against_itself(options: Options, runs: int) -> dict[str, Any]:
    """Judge kernels that are their own reference, `runs` in all, the cases in turn."""
    twins = judge_kernels.twins()
    names = [name for _, name in zip(range(runs), _endless(twins), strict=False)]
    items = [JudgeItem(f"{number}", *twins[name]) for number, name in enumerate(names)]
    verdicts, start_s, judging_s, busy = judge_all(options, "aa", items)
    found = figures.against_itself(verdicts, {str(number): name for number, name in enumerate(names)})
    return found | {"start_s": start_s, "judging_s": judging_s, "gpu_busy": busy}


def _endless(names: Iterable[str]) -> Iterable[str]:
    kept = list(names)
    while True:
        yield from kept


def run_repeat(options: Options, records: Sequence[Judgeable], first: Mapping[str, Verdict]) -> dict[str, Any]:
    """Judge the records again, or twice when there is no first run yet, and compare what is fast.

    Beside them large kernels, twice: those of real traces are nearly all bound by their launch.
    """
    items = [record.item for record in records]
    large = [JudgeItem(name, *sources) for name, sources in judge_kernels.large().items()]
    before = large if first else [*items, *large]
    known = dict(first) | {verdict.key: verdict for verdict in judge_all(options, "repeat 1", before)[0]}
    second = {verdict.key: verdict for verdict in judge_all(options, "repeat 2", [*items, *large])[0]}
    found = figures.repeated(known, second)
    names = {record.identity: record.name for record in records} | {item.key: item.key for item in large}
    for item in (*found["disagreements"], *found["other_verdicts"]):
        item["name"] = names[item["key"]]
    return found


def run_hang(options: Options, runs: int) -> dict[str, Any]:
    """Judge kernels that never end, one at a time, and see how long after its limit each has its verdict.

    The problem is prepared beforehand, by an honest kernel; what is left of a verdict's time besides the limit is the
    start of the kernel's process and its end.
    """
    found: list[dict[str, Any]] = []
    with open_judge(options, workers=1, timeout_s=HANG_LIMIT_S, timing=False) as judge:
        honest = judge.verify(judge_kernels.HANG_PROBLEM, judge_kernels.HONEST)
        for name, code in judge_kernels.hangs().items():
            for _ in range(runs):
                verdict = judge.verify(judge_kernels.HANG_PROBLEM, code)
                late = verdict.wall_s - HANG_LIMIT_S
                found.append({"where": name, "verdict": verdict.verdict, "late_s": late, "detail": verdict.detail})
            options.say(f"[hang] {name}: {verdict.verdict}, {late:.2f} s after the limit")
        after = judge.verify(judge_kernels.HANG_PROBLEM, judge_kernels.HONEST)
    return {
        "limit_s": HANG_LIMIT_S,
        "runs": found,
        "worst_late_s": max(run["late_s"] for run in found),
        "not_timeout": [run for run in found if run["verdict"] != "timeout"],
        "honest": [honest.verdict, after.verdict],
        "honest_detail": after.detail,
        "honest_wall_s": after.wall_s,
    }
