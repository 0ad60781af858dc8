"""Reads every problem that can be asked, from files or from the Hub, and names those that cannot.

A bad problem stops nothing: it comes back as `Unusable`, with its place and the reason. Code is parsed and never
executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from triton_sft_pipeline import hub
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.problems.entries import KERNELBENCH, TABLES, Entry, entries_of, layout_of
from triton_sft_pipeline.problems.loading import Problem, judged, local_entries, problem_of
from triton_sft_pipeline.problems.weights import missing_weights

KERNELBENCH_REPO = "ScalingIntelligence/KernelBench"
KERNELBENCH_LEVELS = (3, 4)
"""Levels of KernelBench that are asked when none are named: whole architectures."""

_NAMED = 3


@dataclass(frozen=True)
class Unusable:
    """A problem that cannot be asked.

    Attributes:
        key: its name; where it has none, the file's and where in it.
        place: the file, and the line or row in it.
        kind: "invalid": it is no problem; "unsupported": it is one, but needs what is not here.
        reason: a sentence that says what to do about it.
    """

    key: str
    place: str
    kind: Literal["invalid", "unsupported"]
    reason: str


@dataclass(frozen=True)
class ProblemSet:
    """What a location holds: problems to ask, in order, and those that cannot be."""

    problems: list[Problem]
    unusable: list[Unusable]


def read_problems(location: str | Path, levels: Sequence[int] | None = None) -> ProblemSet:
    """Read the problems of a location.

    Args:
        location: a folder of KernelBench-format *.py files, also in level folders (level1, level2, ...); one .py; a
            .jsonl or .parquet file with `key` (or `sample_key`) and `pytorch_code`, or with KernelBench's columns code,
            level, name and problem_id; `hf://owner/name[@revision][/path]`, downloaded once and then read from the
            Hub's local cache; or a local copy of KernelBench: its dataset (data/level_*.parquet) or its repository
            (KernelBench/level1/...).
        levels: of the problems that say their level, read these alone; those that say none are read whatever is asked
            for. Default: all; of KernelBench as a whole, from the Hub or from a copy, 3 and 4.

    Returns:
        Problems with unique keys ("level3/23_Name" where they come by level). Those that need weights from the Hub
        which its local cache does not hold are unusable, and so is what is no problem or repeats a key.

    Raises:
        PipelineError: nothing is there; none of the levels is; everything there is invalid; or the Hub cannot be
            reached and its cache does not hold the dataset.
    """
    place = str(location)
    entries, is_kernelbench = _entries(location)
    wanted = tuple(levels) if levels is not None else KERNELBENCH_LEVELS if is_kernelbench else None
    found = _sorted_out(_of_levels(entries, wanted, place))
    if not found.problems and all(item.kind == "invalid" for item in found.unusable):
        raise _none_there(place, [f"{item.place}: {item.reason}" for item in found.unusable])
    return found


def every_problem(location: str | Path) -> list[Problem]:
    """All problems of a location, of every level, also those that cannot be asked here for want of weights: what must
    be known to keep them out of training. Places are as for `read_problems`.

    Raises:
        PipelineError: nothing is there, or everything there is invalid; or the Hub cannot be reached and its cache does
            not hold the dataset.
    """
    found = list(judged(_entries(location)[0]))
    problems = [problem_of(entry) for entry, fault in found if fault is None]
    if not problems:
        raise _none_there(str(location), [f"{entry.place}: {_sentence(fault or '')}" for entry, fault in found])
    return problems


def _none_there(place: str, reasons: Sequence[str]) -> PipelineError:
    more = len(reasons) - _NAMED
    first = "; ".join(reasons[:_NAMED])
    return PipelineError(f"{place} holds no problem that can be asked. {first}{f' ({more} more)' if more > 0 else ''}")


def _entries(location: str | Path) -> tuple[list[Entry], bool]:
    """What lies there, and whether it is KernelBench as a whole."""
    place = str(location)
    return _hub_entries(place) if hub.is_hub(place) else _local_entries(Path(location))


def _hub_entries(place: str) -> tuple[list[Entry], bool]:
    wanted = hub.parse(place)
    is_kernelbench = wanted.repo.lower() == KERNELBENCH_REPO.lower()
    source = KERNELBENCH if is_kernelbench else ""
    files = hub.fetch(place, TABLES, what="problems")
    entries = [entry for name, path in files for entry in entries_of(path, name=name, source=source)]
    if not entries:
        raise PipelineError(f"{place}: the dataset holds no problems.")
    # Who names a file of it wants that file.
    return entries, is_kernelbench and not wanted.path


def _local_entries(path: Path) -> tuple[list[Entry], bool]:
    path = path.expanduser()
    is_kernelbench = path.is_dir() and layout_of(path).kernelbench
    return local_entries(path, source=KERNELBENCH if is_kernelbench else ""), is_kernelbench


def _of_levels(entries: list[Entry], wanted: tuple[int, ...] | None, place: str) -> list[Entry]:
    """The entries of these levels, and those that say none: other problems than KernelBench's have none to be chosen
    by.
    """
    if wanted is None:
        return entries
    there = {entry.level for entry in entries if entry.level is not None}
    if there and there.isdisjoint(wanted):
        has, asked = ", ".join(map(str, sorted(there))), " or ".join(map(str, wanted))
        raise PipelineError(f"{place} has no problem of level {asked}: it has {has}. Name others with --levels.")
    return [entry for entry in entries if entry.level is None or entry.level in wanted]


def _sorted_out(entries: list[Entry]) -> ProblemSet:
    problems, unusable = [], []
    for entry, fault in judged(entries):
        if fault is not None:
            unusable.append(Unusable(entry.key, entry.place, "invalid", _sentence(fault)))
        elif missing := missing_weights(entry.code or ""):
            unusable.append(Unusable(entry.key, entry.place, "unsupported", missing))
        else:
            problems.append(problem_of(entry))
    return ProblemSet(problems, unusable)


def _sentence(fault: str) -> str:
    return f"{fault[:1].upper()}{fault[1:]}."
