"""The steps that look at traces together: duplicates, the shorter of equally good reasonings, so many a problem.

They see keys, not traces: whoever streams a large file hands in a key for each trace that the per-trace steps let
through, and gets back which of them go and why. Whatever the order of the keys, the same traces stay.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable

from triton_sft_pipeline.traces.duplicates import Candidate, Candidates, Progress, Refusals, TraceKey, find_duplicates
from triton_sft_pipeline.traces.record import Trace
from triton_sft_pipeline.traces.settings import FilterSettings

LONGER = "longer_reasoning"
TOO_MANY = "max_per_problem"
EQUALLY_FAST = 1.05
"""Speedups count as equal when the greater is at most so many times the lesser."""


def key_of(trace: Trace) -> TraceKey:
    """What the set steps need of a trace."""
    return TraceKey(
        place=(trace.file, trace.position),
        sample_key=trace.sample_key,
        problem=trace.problem,
        pytorch_code=trace.pytorch_code,
        triton_code=trace.triton_code,
        version=trace.version,
        correct=trace.correctness,
        speedup=trace.speedup,
        reasoning_length=len(trace.reasoning or ""),
    )


def set_steps(keys: Iterable[TraceKey], settings: FilterSettings, progress: Progress | None = None) -> Refusals:
    """All set steps in order (duplicates, prefer_shorter, max_per_problem), each on what the one before left.

    Args:
        keys: any iterable, a generator too; taken once, one at a time, and only what is small is kept of each.
        settings: drop_duplicates, duplicate_similarity, prefer_shorter and max_per_problem are read.
        progress: told (done, total) while kernels are compared.

    Returns:
        Place -> (reason, detail) of each trace that goes: "duplicate", "near_duplicate", "longer_reasoning" or
        "max_per_problem". A place that is not among them stays.
    """
    candidates = Candidates(keys, compare=settings.drop_duplicates)
    refusals: Refusals = {}
    if settings.drop_duplicates:
        refusals |= find_duplicates(candidates, settings.duplicate_similarity, progress)
    if settings.prefer_shorter:
        refusals |= longer_reasonings(c for c in candidates.best_first if c.place not in refusals)
    if settings.max_per_problem is not None:
        left = (c for c in candidates.best_first if c.place not in refusals)
        refusals |= beyond_the_best(left, settings.max_per_problem)
    return refusals


def longer_reasonings(candidates: Iterable[Candidate]) -> Refusals:
    """Correct traces for which another of the same problem, as fast within 5 %, stays that reasons shorter."""
    refusals: Refusals = {}
    # For each problem, (speedup, length, name) of those that stay, by speedup.
    staying: dict[str, list[tuple[float, int, str]]] = {}
    for candidate in sorted(candidates, key=lambda c: (c.reasoning_length, c.rank)):
        if not candidate.correct or candidate.speedup is None:
            continue
        peers, speedup = staying.setdefault(candidate.problem, []), candidate.speedup
        first = bisect_left(peers, speedup / EQUALLY_FAST, key=lambda peer: peer[0])
        last = bisect_right(peers, speedup * EQUALLY_FAST, key=lambda peer: peer[0])
        shorter = [peer for peer in peers[first:last] if peer[1] < candidate.reasoning_length]
        if shorter:
            _, length, name = min(shorter, key=lambda peer: peer[1:])
            refusals[candidate.place] = (
                LONGER,
                f"{candidate.reasoning_length:,} characters of reasoning; as fast with {length:,}: {name}",
            )
        else:
            insort(peers, (speedup, candidate.reasoning_length, str(candidate)))
    return refusals


def beyond_the_best(candidates: Iterable[Candidate], limit: int) -> Refusals:
    """All but the best `limit` of each problem.

    Args:
        candidates: best first.
    """
    refusals: Refusals = {}
    seen: dict[str, int] = {}
    for candidate in candidates:
        place = seen[candidate.problem] = seen.get(candidate.problem, 0) + 1
        if place > limit:
            refusals[candidate.place] = (TOO_MANY, f"number {place} of its problem; the best {limit} are kept")
    return refusals
