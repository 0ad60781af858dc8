"""What `triton-sft verify` says at its end: verdicts by label, labels that do not hold, rate, speed, device, isolation.

Lines of at most 80 columns for a terminal. Pure: kernels and verdicts in, lines out; knows nothing of files or judges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from triton_sft_pipeline.judgeable import Judgeable
from triton_sft_pipeline.judging import Judged
from triton_sft_pipeline.verification import VERDICTS, Verdict

WIDTH = 80
MOST_SHOWN = 20
"""Disagreements that are told one by one; the verdicts file has all of them."""

_LABELS: dict[bool | None, str] = {True: "correct", False: "incorrect", None: "no label"}
_NAME, _CELL = 24, 14


def outcome_lines(kernels: Sequence[Judgeable], judged: Judged) -> Iterator[str]:
    """The end of the command's output: the kernels, in the order of the files, and what became of them."""
    verdicts = judged.verdicts
    yield from _table([(kernel.label, verdicts[kernel.identity].verdict) for kernel in kernels])
    yield from _disagreements([(kernel, verdicts[kernel.identity]) for kernel in kernels])
    yield ""
    yield _rate(len(kernels), judged.judged_now, judged.seconds)
    yield from _speed([verdicts[kernel.identity] for kernel in kernels])
    yield from _judged_on(list(verdicts.values()))


def _table(found: list[tuple[bool | None, str]]) -> Iterator[str]:
    """Counts by verdict and label, each with its share of the label's column."""
    counts = Counter(found)
    totals = Counter(label for label, _ in found)
    verdicts = Counter(verdict for _, verdict in found)
    yield f"{'':<{_NAME}}{'labelled':>{_CELL}}{'labelled':>{_CELL}}"
    yield f"{'verdict':<{_NAME}}" + "".join(f"{name:>{_CELL}}" for name in (*_LABELS.values(), "all"))
    # The most frequent first; of equally frequent ones in the order of the taxonomy.
    order = {verdict: place for place, verdict in enumerate(VERDICTS)}
    for verdict in sorted(verdicts, key=lambda name: (-verdicts[name], order.get(name, len(order)))):
        cells = [_cell(counts[label, verdict], totals[label]) for label in _LABELS]
        yield f"{verdict:<{_NAME}}" + "".join([*cells, _cell(verdicts[verdict], len(found))])
    cells = [_cell(totals[label], 0) for label in _LABELS]
    yield f"{'all':<{_NAME}}" + "".join([*cells, _cell(len(found), 0)]).rstrip()


def _cell(count: int, total: int) -> str:
    """A count and its share of `total`; without a total the count alone."""
    shown = f"{count:,}" if count else "-"
    share = f"{100 * count / total:.0f} %" if count and total else ""
    return f"{shown:>{_CELL - 6}}{share:>6}"


def _disagreements(judged: list[tuple[Judgeable, Verdict]]) -> Iterator[str]:
    """One line for each label that does not hold. A verdict that says nothing about the kernel contradicts no label."""
    labelled = [(kernel, verdict) for kernel, verdict in judged if kernel.label is not None]
    known = [(kernel, verdict) for kernel, verdict in labelled if verdict.is_conclusive]
    differing = [(kernel, verdict) for kernel, verdict in known if kernel.label != verdict.correctness]
    if labelled:
        unknown = len(labelled) - len(known)
        told = f"; of {unknown} nothing can be said here" if unknown else ""
        yield ""
        yield f"{len(known) - len(differing)} of {len(known)} labels hold{told}."
    shown = differing[:MOST_SHOWN]
    rows = [(_plain(k.name), _LABELS[k.label], v.verdict, _plain(v.detail)) for k, v in shown]
    names, kinds = (max((len(row[column]) for row in rows), default=0) for column in (0, 2))
    for name, label, verdict, detail in rows:
        start = f"{_cut(name, min(names, 26)):<{min(names, 26)}}  {label:<9}  {verdict:<{kinds}}  "
        yield _cut(start + detail, WIDTH).rstrip()
    if len(differing) > len(shown):
        yield f"... and {len(differing) - len(shown)} more"


def _rate(total: int, judged_now: int, seconds: float) -> str:
    earlier = f", {total - judged_now:,} judged earlier" if judged_now < total else ""
    if not judged_now:
        return f"{_kernels(total)}, all judged earlier"
    minutes, rest = divmod(round(seconds), 60)
    took = f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
    rate = f", {60 * judged_now / seconds:.1f} a minute" if seconds >= 1 else ""
    return f"{_kernels(judged_now)} in {took}{rate}{earlier}"


def _kernels(count: int) -> str:
    return f"{count:,} kernel{'' if count == 1 else 's'}"


def _speed(verdicts: list[Verdict]) -> Iterator[str]:
    """How many right kernels are faster, where speeds were measured at all."""
    right = [verdict for verdict in verdicts if verdict.correctness]
    timed = [verdict for verdict in right if verdict.speedup is not None]
    if not timed:
        return
    fast = ", ".join(f"{name} {sum(bool(getattr(v, name)) for v in timed):,}" for name in ("fast_1", "fast_2"))
    lost = f", {len(right) - len(timed):,} could not be" if len(timed) < len(right) else ""
    yield f"speed      {fast} (low end of the interval), {len(timed):,} timed{lost}"


def _judged_on(verdicts: list[Verdict]) -> Iterator[str]:
    """Where and how confined. More than one of a kind is told as such: the file was judged in several runs."""
    places = _all(f"{v.versions['gpu']} ({v.backend})" if v.versions.get("gpu") else _place(v) for v in verdicts)
    yield _cut(f"device     {places}", WIDTH)
    yield _cut(f"isolation  {_all(v.isolation for v in verdicts)}", WIDTH)


def _place(verdict: Verdict) -> str:
    if verdict.backend == "interpreter":
        return "cpu, Triton's interpreter: no speed, TF32 and tile limits unchecked"
    return verdict.device


def _all(values: Iterable[str]) -> str:
    return ", ".join(sorted({value for value in values if value})) or "none"


def _plain(text: str) -> str:
    """One line that a terminal can show: keys and sentences come from files."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
