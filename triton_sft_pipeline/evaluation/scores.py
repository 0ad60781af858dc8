"""Counting verdicts: shares with intervals, and base against tuned on the same problems. Pure functions.

Knows nothing of models, files or reports, and of an answer only what `Outcome` holds. No number leaves this module
without the n it was taken from and, where one can be had, an interval. What the intervals are is said in `statistics`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from triton_sft_pipeline.evaluation.statistics import (
    RESAMPLES,
    geometric_mean,
    mcnemar_exact,
    paired_differences,
    pass_at_k,
    ratio_interval,
    usable_speedup,
    wilson_interval,
)
from triton_sft_pipeline.verification.verdict import CORRECT, UNJUDGED

UNPARSED = "unparsed"
NO_ANSWER = frozenset({UNPARSED, "no_code"})
"""Verdicts on answers that hold no code."""

NOT_BUILT = frozenset({"syntax_error", "import_error", "missing_wrapper", "contract_error", "compile_error"})
"""Verdicts on code that never became a running kernel."""

BROKE_OFF = frozenset({"runtime_error", "timeout", "crash", "resource_limit", "early_exit"})
"""Verdicts on kernels that started and did not come to their end."""

NEVER_RAN = NO_ANSWER | NOT_BUILT | {"forbidden_construct"}
"""Verdicts on answers of which no kernel was ever run: they do not count as compiled."""

FAST_P = tuple(step / 10 for step in range(41))
"""The speedups of the fast_p curve: 0, 0.1, ... 4."""

VERDICT_KINDS = ("verified", "wrong", "failed", "refused", "unparsed", "unjudged")
"""Kinds of verdicts, in the order of a legend. Verified: right, a hybrid with PyTorch included. Refused: the code
cheated or broke a rule of the judge.
"""


@dataclass(frozen=True)
class Outcome:
    """What is counted of an answer.

    Attributes:
        verdict, correctness, fast_1, fast_2, speedup: as in `verification.Verdict`.
        tokens: tokens that were generated.
    """

    verdict: str
    correctness: bool
    fast_1: bool | None = None
    fast_2: bool | None = None
    speedup: float | None = None
    tokens: int = 0


def outcomes(answers: Iterable[Mapping[str, Any]]) -> list[Outcome]:
    """The outcomes of a report's answers: `outcomes(row["base"])` for a row of its "problems"."""
    return [Outcome(**{name: answer[name] for name in Outcome.__dataclass_fields__}) for answer in answers]


def verdict_kind(verdict: str) -> str:
    """Which of VERDICT_KINDS a verdict is."""
    if verdict in CORRECT:
        return "verified"
    if verdict.startswith("incorrect"):
        return "wrong"
    if verdict in NOT_BUILT | BROKE_OFF:
        return "failed"
    if verdict in NO_ANSWER:
        return "unparsed"
    return "unjudged" if verdict in UNJUDGED else "refused"


def share(successes: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """The share of success: each problem's share of its answers, averaged over the problems.

    Args:
        successes: for each problem, of each answer whether it succeeds; problems without answers do not count.

    Returns:
        `{"rate", "interval", "n", "count", "answers"}`: n problems, with `count` successes among `answers` answers;
        rate and interval are None for n = 0. The interval is Wilson's for n problems, as if each had one answer.
    """
    given = [several for several in successes if len(several)]
    return _share(
        [sum(several) / len(several) for several in given],
        sum(sum(several) for several in given),
        sum(len(several) for several in given),
    )


def _share(values: Sequence[float], count: int, answers: int) -> dict[str, Any]:
    """A share of which each problem has a value in [0, 1]."""
    n, total = len(values), float(sum(values))
    interval = wilson_interval(total, n)
    return {
        "rate": min(1.0, total / n) if n else None,
        "interval": list(interval) if interval else None,
        "n": n,
        "count": count,
        "answers": answers,
    }


def score(
    problems: Sequence[Sequence[Outcome]], *, timed: bool, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Score one model on one set of problems.

    Args:
        problems: the outcomes of each problem's answers, the first answer first; not all need the same number of
            answers, and a problem without any does not count.
        timed: whether speedups were measured at all. Without it fast_1, fast_2 and fast_p are None, which is not the
            same as 0.
        resamples, seed: of the bootstrap.

    Returns:
        n, answers: problems that were asked, and answers to them.
        verified: correct answers; the same as fast_0's count.
        verified_rate, verified_interval: fast_0's.
        compiled: share of the judged answers whose kernel got as far as running. What could not be judged is left out
            of its answers, and a problem of which nothing could be judged out of its n.
        fast_0, fast_1, fast_2: shares of all answers: correct; correct and faster; correct and at least twice as fast.
            Faster is what the whole interval of the speedup says, not its point estimate alone.
        fast_p: `{"p", "rate", "low", "high", "n"}`: for each p of FAST_P the share that is correct and whose speedup,
            as a point estimate, is above p (A. Ouyang et al. (2025), "KernelBench: can LLMs write efficient GPU
            kernels?", arXiv:2502.10517); for p = 0 that is fast_0. None for no problems too.
        pass_at_k: str(k) -> share, for k from 1 to the smallest number of answers that a problem has; `statistics`
            gives the estimator. Their count and answers are fast_0's.
        speedup: `{"geometric_mean", "interval", "n", "problems"}` over the n correct kernels that were timed, which are
            to so many problems; None when there is none. The interval, a bootstrap over problems, is None for one
            problem.
        cheats, refused: shares of all answers: by verdict those that broke a rule of the judge, the most frequent
            first, and all of them together.
        tokens: `{"total", "mean", "interval", "n"}`: generated tokens, and their mean over n answers with a bootstrap
            interval over problems.
        unjudged: answers that nothing is known about because the problem or the machine failed. They stay in n as
            failures: leaving them out would flatter.
        verdicts: verdict -> count of answers, the most frequent first.
    """
    problems = [several for several in problems if several]
    everything = [outcome for several in problems for outcome in several]

    def of_all(succeeds: Callable[[Outcome], bool]) -> dict[str, Any]:
        return share([[succeeds(outcome) for outcome in several] for several in problems])

    verified = of_all(lambda o: o.correctness)
    counts = Counter(outcome.verdict for outcome in everything)
    verdicts = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    cheats = [verdict for verdict in verdicts if verdict_kind(verdict) == "refused"]
    judged = [[o.verdict not in NEVER_RAN for o in several if o.verdict not in UNJUDGED] for several in problems]
    return {
        "n": len(problems),
        "answers": len(everything),
        "verified": verified["count"],
        "verified_rate": verified["rate"],
        "verified_interval": verified["interval"],
        "compiled": share(judged),
        "fast_0": verified,
        "fast_1": of_all(lambda o: o.correctness and bool(o.fast_1)) if timed else None,
        "fast_2": of_all(lambda o: o.correctness and bool(o.fast_2)) if timed else None,
        "fast_p": _fast_p(problems) if timed and problems else None,
        "pass_at_k": _pass_at_k(problems, verified),
        "speedup": _speedup(problems, resamples, seed),
        "cheats": {verdict: of_all(lambda o, v=verdict: o.verdict == v) for verdict in cheats},  # type: ignore[misc]
        "refused": of_all(lambda o: verdict_kind(o.verdict) == "refused"),
        "tokens": _tokens(problems, resamples, seed),
        "unjudged": sum(outcome.verdict in UNJUDGED for outcome in everything),
        "verdicts": verdicts,
    }


def _fast_p(problems: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    import numpy as np

    rates = np.zeros(len(FAST_P))
    for several in problems:
        # A correct kernel that could not be timed is on the curve at p = 0 alone; a wrong one nowhere.
        reached = [(o.speedup if usable_speedup(o.speedup) else 0.0) if o.correctness else -1.0 for o in several]
        above = np.array(reached)[:, None] > np.array(FAST_P)
        above[:, 0] = np.array(reached) >= 0.0
        rates += above.mean(axis=0)
    n = len(problems)
    means = [min(1.0, float(rate) / n) for rate in rates]
    ends = [wilson_interval(mean * n, n) or (0.0, 1.0) for mean in means]
    return {
        "p": list(FAST_P),
        "rate": means,
        "low": [low for low, _ in ends],
        "high": [high for _, high in ends],
        "n": n,
    }


def _pass_at_k(problems: Sequence[Sequence[Outcome]], verified: Mapping[str, Any]) -> dict[str, Any]:
    correct = [sum(o.correctness for o in several) for several in problems]
    values = pass_at_k([len(several) for several in problems], correct)
    count, answers = verified["count"], verified["answers"]
    found = {str(k): _share(column.tolist(), count, answers) for k, column in enumerate(values.T, start=1)}
    # pass@1 is fast_0: the same number by another road, and here to the last digit.
    return found | ({"1": dict(verified)} if found else {})


def _speedup(problems: Sequence[Sequence[Outcome]], resamples: int, seed: int) -> dict[str, Any] | None:
    speedups = [[o.speedup for o in several if o.correctness and usable_speedup(o.speedup)] for several in problems]
    measured = [[float(s) for s in several if s is not None] for several in speedups if several]
    found = geometric_mean(measured, resamples, seed)
    if found is None:
        return None
    mean, interval = found
    kernels = sum(len(several) for several in measured)
    return {"geometric_mean": mean, "interval": interval, "n": kernels, "problems": len(measured)}


def _tokens(problems: Sequence[Sequence[Outcome]], resamples: int, seed: int) -> dict[str, Any]:
    totals, counts = [sum(o.tokens for o in several) for several in problems], [len(several) for several in problems]
    total, n = sum(totals), sum(counts)
    interval = ratio_interval(totals, counts, resamples, seed)
    return {"total": total, "mean": total / n if n else None, "interval": interval, "n": n}


def compare(
    base: Sequence[Sequence[Outcome]],
    tuned: Sequence[Sequence[Outcome]],
    *,
    timed: bool,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Pair two models by problem: position i of both is the same problem. What one did not answer is left out.

    Args:
        base, tuned: the outcomes of each problem's answers, the first answer first.
        timed, resamples, seed: as for `score`.

    Returns:
        n: problems.
        fast_0, fast_1, fast_2: `{"difference", "interval", "n", "method"}`, tuned - base in the shares that `score`
            gives, as `statistics.paired_differences` finds it; fast_1 and fast_2 are None without timing.
        both, neither, wins, losses, p_value: of the first answers alone: problems solved by both, by neither, by the
            tuned model alone, by the base model alone, and the exact McNemar test, two-sided; None for n = 0.
    """
    pairs = [(b, t) for b, t in zip(base, tuned, strict=True) if b and t]
    scores = ("fast_0", "fast_1", "fast_2") if timed else ("fast_0",)
    found = paired_differences(
        [[_value(b, name) for b, _ in pairs] for name in scores],
        [[_value(t, name) for _, t in pairs] for name in scores],
        resamples,
        seed,
    )
    first = Counter((b[0].correctness, t[0].correctness) for b, t in pairs)
    wins, losses = first[False, True], first[True, False]
    return {
        "n": len(pairs),
        **{"fast_1": None, "fast_2": None},
        **dict(zip(scores, found, strict=True)),
        "both": first[True, True],
        "neither": first[False, False],
        "wins": wins,
        "losses": losses,
        "p_value": mcnemar_exact(wins, losses) if pairs else None,
    }


def _value(answers: Sequence[Outcome], name: str) -> float:
    """A problem's share of answers that are correct and, but for fast_0, have this flag."""
    return sum(o.correctness and (name == "fast_0" or bool(getattr(o, name))) for o in answers) / len(answers)
