"""The numbers and texts of a report in words: one way to write a share, a difference, a speedup, on a page, in Markdown
and in a terminal.

Pure: plain data in, text out. No share is written without its interval and its n.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from triton_sft_pipeline.evaluation.scores import BROKE_OFF, VERDICT_KINDS, verdict_kind

MODELS = ("base", "tuned")
SPLITS = {
    "seen": ("Seen problems", "From the train split: a memorisation check."),
    "test": ("Test split", "Kept apart when the dataset was split; never trained on."),
    "held_out": ("Held-out problems", "Never part of the traces."),
    "touched": ("Touched problems", "Asked as held-out ones, but the adapter's training data touches them."),
}
LONGEST_SHOWN = 20_000
"""Characters of one answer on the page; the rest is in generations.jsonl. A model that repeats itself must not make a
page that no browser opens.
"""
KINDS = {
    "verified": "verified",
    "wrong": "ran, and was wrong",
    "failed": "did not compile, or broke off",
    "refused": "broke a rule",
    "unparsed": "no code",
    "unjudged": "could not be judged",
}
"""What the kinds of verdicts are called in a legend."""
BUDGET = 5_000_000
"""Characters of code and answers on the whole page. With colours it is about twice that in bytes."""

# What neither HTML nor a terminal can show: control characters other than tab and newline, and lone surrogates.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def models_of(report: Mapping[str, Any]) -> list[str]:
    """The models that were asked: the base, and the tuned one where there is one."""
    return [model for model in MODELS if model in report]


def splits_of(report: Mapping[str, Any]) -> list[str]:
    """The splits that hold a problem: an empty one has nothing to show."""
    return [split for split in SPLITS if report["base"].get(split, {"n": 0})["n"]]


def percent(share: float) -> str:
    """A share of 1 in percent, without the sign: whole numbers, but one decimal below 10 and above 90, so that 0 and
    100 mean none and all.
    """
    value = 100 * share
    if 0 < abs(value) < 0.1:
        return "<0.1" if value > 0 else "−<0.1"
    if 99.9 < value < 100:
        return ">99.9"
    text = f"{value:.0f}" if 10 <= abs(value) <= 90 else f"{value:.1f}".removesuffix(".0")
    return text.replace("-", "−")


def interval(ends: Sequence[float] | None, write: Any = percent) -> str:
    """`[5, 25]`, or nothing where there is none."""
    return f"[{write(ends[0])}, {write(ends[1])}]" if ends else ""


def rate(share: Mapping[str, Any]) -> str:
    """`12 % [5, 25]`, or a dash for no answers."""
    if share["rate"] is None:
        return "–"
    return f"{percent(share['rate'])} % {interval(share['interval'])}".rstrip()


def counted(share: Mapping[str, Any]) -> str:
    """What a share was taken from: `3/10` with one answer a problem, else `12/80, n = 10`."""
    tally = f"{share['count']:,}/{share['answers']:,}"
    return tally if share["answers"] == share["n"] else f"{tally}, n = {share['n']:,}"


def share_text(share: Mapping[str, Any] | None) -> str:
    """`12 % [5, 25], 12/80, n = 10`."""
    if share is None:
        return "not measured"
    return f"{rate(share)}, {counted(share)}" if share["n"] else "–"


def points(difference: float) -> str:
    """A difference of shares in percentage points, signed: `+12`."""
    text = percent(difference)
    return f"+{text}" if difference > 0 else text


def difference_text(difference: Mapping[str, Any] | None) -> str:
    """`+12 points [+3, +21], n = 10`, and whether the interval is a bound and no bootstrap."""
    if difference is None:
        return "not measured"
    if difference["difference"] is None:
        return "–"
    ends = interval(difference["interval"], points)
    method = ", bound" if difference["method"] == "bound" else ""
    return f"{points(difference['difference'])} points {ends}, n = {difference['n']}{method}"


def p_value(p: float | None) -> str:
    """`= 0.031`, `< 0.001`, or a dash: what stands after the letter p."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def mean_speedup(speedup: Mapping[str, Any] | None) -> str:
    """`1.42x [1.10, 1.80], n = 7 kernels of 5 problems`: a geometric mean over verified and timed kernels."""
    if not speedup or speedup["geometric_mean"] is None:
        return "–"
    ends = interval(speedup["interval"], lambda end: f"{end:.2f}") or "(no interval)"
    return f"{speedup['geometric_mean']:.2f}x {ends}, n = {kernels_text(speedup)}"


def kernels_text(speedup: Mapping[str, Any]) -> str:
    """`7 kernels of 5 problems`: what a geometric mean was taken over."""
    return f"{_count(speedup['n'], 'kernel')} of {_count(speedup['problems'], 'problem')}"


def tokens_text(tokens: Mapping[str, Any]) -> str:
    """`512 [480, 544] each, 40,960 in 80 answers`."""
    if not tokens["n"]:
        return "–"
    ends = interval(tokens["interval"], lambda end: f"{end:,.0f}")
    return f"{tokens['mean']:,.0f} {ends} each, {tokens['total']:,} in {_count(tokens['n'], 'answer')}"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def paired(comparison: Mapping[str, Any]) -> str:
    """The paired comparison of a split as two sentences."""
    difference = difference_text(comparison["fast_0"])
    if comparison["p_value"] is None:
        return ""
    return (
        f"Verified, tuned less base: {difference}. On the first answers tuned alone solves {comparison['wins']}, base "
        f"alone {comparison['losses']} (exact McNemar p {p_value(comparison['p_value'])})."
    )


def best_answer(answers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The fastest verified answer; the first verified one where no speed is known; where none is verified the first of
    those that got furthest; None where there is none.
    """
    if not answers:
        return None
    verified = [answer for answer in answers if answer["correctness"]]
    if not verified:
        return min(answers, key=_short_of_verified)
    return max(verified, key=lambda answer: answer["speedup"] or 0.0)


def _short_of_verified(answer: Mapping[str, Any]) -> int:
    """Less for what says more of how a model fails: a wrong result more than a crash, and that more than no code."""
    steps = ("wrong", "refused", "broke off", "failed", "unjudged", "unparsed")
    return steps.index("broke off" if answer["verdict"] in BROKE_OFF else verdict_kind(answer["verdict"]))


def which(answer: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> str:
    """`answer 3 of 8`, counted from 1, and why it is this one."""
    why = "" if answer["correctness"] else ", which got furthest"
    return f"answer {answer['sample'] + 1} of {len(answers)}{why}"


def kinds_of(rows: Iterable[Mapping[str, Any]], models: Sequence[str]) -> list[tuple[str, str]]:
    """Kinds of verdicts that occur, each with what it is called, in the order of a legend."""
    there = {verdict_kind(answer["verdict"]) for row in rows for model in models for answer in row[model]}
    return [(kind, KINDS[kind]) for kind in VERDICT_KINDS if kind in there]


def why(answers: Sequence[Mapping[str, Any]]) -> str:
    """The judge's sentence on the best answer; of several that all failed with its verdict, which no column names."""
    best = best_answer(answers)
    if best is None:
        return ""
    named = len(answers) > 1 and not best["correctness"]
    return f"{best['verdict'].replace('_', ' ')}: {best['detail']}" if named else str(best["detail"])


def tally(answers: Sequence[Mapping[str, Any]]) -> str:
    """`verified` for a single answer; of several `3/8 verified`. The best speedup stands behind it."""
    best = best_answer(answers)
    if best is None:
        return "not asked"
    verified = sum(answer["correctness"] for answer in answers)
    text = best["verdict"].replace("_", " ") if len(answers) == 1 else f"{verified}/{len(answers)} verified"
    return f"{text}, {best['speedup']:.2f}x" if best["correctness"] and best["speedup"] else text


def answer_facts(answer: Mapping[str, Any]) -> str:
    """Tokens, speed and times of one answer, with what the speed has to be read with."""
    facts = [f"{answer['tokens']:,} tokens" + (", cut at the limit" if answer["stopped"] == "length" else "")]
    if answer["speedup"] is not None:
        facts.append(_speed(answer))
    if answer["kernel_time_ms"] is not None and answer["reference_time_ms"] is not None:
        facts.append(f"{answer['kernel_time_ms']:.4g} ms against {answer['reference_time_ms']:.4g} ms")
    if answer["torch_share"]:
        facts.append(f"{answer['torch_share']:.2f} of the work by PyTorch")
    return " · ".join(facts)


def _speed(answer: Mapping[str, Any]) -> str:
    parts = [f"{answer['speedup']:.2f}x"]
    if answer["speedup_low"] is not None and answer["speedup_high"] is not None:
        parts[0] += f" [{answer['speedup_low']:.2f}, {answer['speedup_high']:.2f}]"
    if answer["launch_bound"]:
        parts.append("bound by launches")
    if answer["graph_speedup"] is not None:
        parts.append(f"{answer['graph_speedup']:.2f}x as CUDA graphs")
    if answer["compile_speedup"] is not None:
        parts.append(f"{answer['compile_speedup']:.2f}x against torch.compile")
    return ", ".join(parts)


def by_kind(verdicts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Verdicts and their counts in the order of a legend."""
    return sorted(verdicts.items(), key=lambda item: VERDICT_KINDS.index(verdict_kind(item[0])))


def cheats_of(scores: Iterable[Mapping[str, Any]]) -> list[str]:
    """Kinds of cheats that occur in any of the scores, the most frequent first."""
    counts: dict[str, int] = {}
    for score in scores:
        for kind, share in score["cheats"].items():
            counts[kind] = counts.get(kind, 0) + share["count"]
    return sorted((kind for kind in counts if counts[kind]), key=lambda kind: (-counts[kind], kind))


def shown_k(scores: Iterable[Mapping[str, Any]]) -> list[str]:
    """The k of pass@k that a table has room for: all up to 8, then powers of two and the last."""
    every = sorted({int(k) for score in scores for k in score["pass_at_k"]})
    return [str(k) for k in every if k <= 8 or k & (k - 1) == 0 or k == every[-1]]


def longest_shown(texts: Iterable[str | None], budget: int = BUDGET, most: int = LONGEST_SHOWN) -> int:
    """Characters of each text that may be shown so that all of them together stay within the budget.

    Short texts are shown whole and only the longest are cut: the limit is the highest with sum(min(length, limit)) at
    most `budget`, and never above `most` nor below 500.
    """
    lengths = sorted(len(text) for text in texts if text)
    left = budget
    for place, length in enumerate(lengths):
        limit = left // (len(lengths) - place)
        if length > limit:
            return max(500, min(most, limit))
        left -= length
    return most


def printable(text: str) -> str:
    """The text with a sign in place of everything that neither a page nor a terminal can show."""
    return _UNPRINTABLE.sub("\ufffd", text)


def clip(text: str, most: int = LONGEST_SHOWN) -> str:
    """What fits on the page and can be shown there."""
    shown = printable(text)
    if len(shown) <= most:
        return shown
    return f"{shown[:most]}\n[... {len(shown) - most:,} more characters: see generations.jsonl]"


def provenance_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Titled lists of (name, value), nested data flattened to dotted names. The command that repeats it is not there:
    it has a place of its own.
    """
    given = {name: value for name, value in report["provenance"].items() if name not in ("notes", "repeat_with")}
    for title, data in (
        ("What was evaluated", given),
        ("Settings", report["settings"]),
        ("Judge", report["judge"]),
        ("Generation", report["generation"]),
    ):
        if rows := list(_flat(data)):
            yield title, rows


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", clip(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table that nothing in its cells can break."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(markdown_cell(value) for value in line) + " |" for line in lines]


def markdown_cell(value: Any) -> str:
    """One line that cannot break out of its table cell, and no markup."""
    text = " ".join(clip(str(value)).split())
    # Only before these does it begin markup; elsewhere, as in "< 0.001", somebody reads it in a terminal.
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text.replace("|", "\\|"))
