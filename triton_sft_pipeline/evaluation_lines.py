"""What `triton-sft evaluate` and `triton-sft infer` say on a terminal: what will be asked, and what became of answers.

Lines of at most 80 columns. Pure: problems and candidates in, lines out; knows nothing of files, models or judges.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton_sft_pipeline.evaluation.contamination import TrainedOn
    from triton_sft_pipeline.evaluation.infer import Candidate
    from triton_sft_pipeline.evaluation.settings import EvaluationSettings
    from triton_sft_pipeline.problems import Problem, Unusable

WIDTH = 80
MOST_SHOWN = 20
"""Problems that are named one by one before a run; the report and `--dry-run` have all of them."""

_LABEL = 11
_NAMES = {"seen": "seen", "test": "test", "held_out": "held-out", "touched": "touched"}


def problem_lines(
    location: str, splits: Mapping[str, Sequence[Problem]], family_of: Callable[[str], str]
) -> Iterator[str]:
    """The problems of each split by level, where any is known, and by operator family, most frequent first."""
    yield f"{'problems':{_LABEL}}{location}"
    for split, problems in splits.items():
        if not problems:
            continue
        levels = Counter("unknown" if p.level is None else str(p.level) for p in problems)
        families = Counter(family_of(p.pytorch_code) for p in problems)
        by_level = "level " + ", ".join(f"{level}: {count}" for level, count in sorted(levels.items()))
        by_family = ", ".join(f"{name} {count}" for name, count in sorted(families.items(), key=_most_first))
        start = f"  {_NAMES[split]:<{_LABEL - 2}}{len(problems):>5}  "
        if set(levels) != {"unknown"}:
            yield from _wrapped(start, by_level)
            start = " " * len(start)
        yield from _wrapped(start, by_family)


def unusable_lines(unusable: Sequence[Unusable], most: int | None = None) -> Iterator[str]:
    """Every problem that cannot be asked, with what is wrong with it."""
    if unusable:
        kinds = Counter(item.kind for item in unusable)
        yield f"{'unusable':{_LABEL}}" + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    yield from _named(((item.key, item.reason) for item in unusable), len(unusable), most)


def touched_lines(touched: Sequence[tuple[Problem, str]], most: int | None = None) -> Iterator[str]:
    """Every problem that the training data touches, with what touches it."""
    if touched:
        yield f"{'touched':{_LABEL}}{len(touched)} by the training data; reported apart"
    yield from _named(((problem.key, what) for problem, what in touched), len(touched), most)


def against_lines(trained_on: TrainedOn) -> Iterator[str]:
    """What the problems were compared with."""
    known = _count(len(trained_on.problems), "training problem")
    yield from _wrapped(f"{'against':{_LABEL}}", f"{known} of {trained_on.dataset}")


def asking_lines(who: str, models: Sequence[str], problems: int, settings: EvaluationSettings) -> Iterator[str]:
    """Who is asked how often, and how.

    Args:
        who: for a person: the adapter and its base model, or a server.
        models: "base", "tuned".
        problems: how many are asked.
    """
    answers = problems * settings.samples * len(models)
    how = "greedy" if settings.greedy else f"temperature {settings.resolved_temperature:g}, top-p {settings.top_p:g}"
    yield from _wrapped(f"{'asked':{_LABEL}}", f"{' and '.join(models)}: {who}")
    yield from _wrapped(
        f"{'answers':{_LABEL}}",
        f"{answers:,}: {_count(problems, 'problem')}, {_count(settings.samples, 'sample')}, "
        f"{_count(len(models), 'model')}; {how}, at most {settings.max_new_tokens:,} tokens",
    )
    timed = "" if settings.timing else ", without speeds"
    yield from _wrapped(
        f"{'judge':{_LABEL}}",
        f"device {settings.judge_device}, {settings.judge_trials} trials, {settings.judge_timeout_s:g} s each{timed}",
    )


def candidate_lines(candidates: Iterable[Candidate]) -> Iterator[str]:
    """A table of several answers, counted from 1: verdict, speedup where one was measured, and the judge's sentence."""
    yield f"{'answer':>6}  {'verdict':<20}{'speedup':>8}  what the judge says"
    for candidate in candidates:
        verdict = candidate.verdict
        speedup = "-" if verdict.speedup is None else f"{verdict.speedup:.2f}"
        yield from _wrapped(f"{candidate.sample + 1:>6}  {verdict.verdict:<20}{speedup:>8}  ", verdict.detail)


def chosen_line(chosen: Candidate, of: int) -> str:
    """The verdict on the kernel that is returned."""
    verdict = chosen.verdict
    speed = "its speed was not measured"
    if verdict.speedup is not None:
        speed = f"speedup {verdict.speedup:.2f}"
        if verdict.speedup_low is not None and verdict.speedup_high is not None:
            speed += f" ({verdict.speedup_low:.2f} to {verdict.speedup_high:.2f})"
    return f"{verdict.verdict}: answer {chosen.sample + 1} of {of}, {speed}"


def _named(items: Iterable[tuple[str, str]], count: int, most: int | None) -> Iterator[str]:
    shown = count if most is None or count <= most else most
    for _, (key, text) in zip(range(shown), items, strict=False):
        yield from _wrapped(f"  {_plain(key)}  ", text)
    if shown < count:
        yield f"  ... and {count - shown} more (--dry-run names them all)"


def _wrapped(start: str, text: str) -> Iterator[str]:
    """`text` after `start`, with what does not fit below it; below a long start it is indented less."""
    indent = " " * (len(start) if len(start) <= WIDTH // 2 else 6)
    if len(start) > WIDTH // 2:
        yield start.rstrip()
        start = indent
    lines = textwrap.wrap(_plain(text), WIDTH - len(indent), break_on_hyphens=False) or [""]
    yield (start + lines[0]).rstrip()
    yield from (indent + line for line in lines[1:])


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _most_first(counted: tuple[str, int]) -> tuple[int, str]:
    return -counted[1], counted[0]


def _plain(text: str) -> str:
    """One line that a terminal can show: names and sentences come from files."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
