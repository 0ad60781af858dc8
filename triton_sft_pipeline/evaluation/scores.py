"""Counting verdicts: shares with intervals, and base against tuned on the same problems. Pure functions.

Knows nothing of models, files or reports, and of a verdict only its name, whether it is correct, and whether it was
surely faster. No share leaves this module without the number of answers it was taken from and an interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb, sqrt
from typing import Any, Protocol

from triton_sft_pipeline.verification.verdict import CORRECT, UNJUDGED

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

UNPARSED = "unparsed"
NO_ANSWER = frozenset({UNPARSED, "no_code"})
"""Verdicts on answers that hold no code."""

NOT_BUILT = frozenset({"syntax_error", "import_error", "missing_wrapper", "contract_error", "compile_error"})
"""Verdicts on code that never became a running kernel."""

BROKE_OFF = frozenset({"runtime_error", "timeout", "crash", "resource_limit", "early_exit"})
"""Verdicts on kernels that started and did not come to their end."""

NEVER_RAN = NO_ANSWER | NOT_BUILT | {"forbidden_construct"}
"""Verdicts on answers of which no kernel was ever run: they do not count as compiled."""


class Judged(Protocol):
    """What is counted of a verdict; `verification.Verdict` is one."""

    @property
    def verdict(self) -> str: ...
    @property
    def correctness(self) -> bool: ...
    @property
    def fast_1(self) -> bool | None: ...
    @property
    def fast_2(self) -> bool | None: ...


VERDICT_KINDS = ("verified", "wrong", "failed", "refused", "unparsed", "unjudged")
"""Kinds of verdicts, in the order of a legend. Verified: right, a hybrid with PyTorch included. Refused: the code
cheated or broke a rule of the judge.
"""


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


def wilson_interval(count: int, n: int, z: float = Z_95) -> tuple[float, float] | None:
    """The score interval of a share, which stays inside [0, 1] and is sensible for 0 of n and n of n.

    E. B. Wilson (1927), "Probable inference, the law of succession, and statistical inference", JASA 22 (158), 209-212.

    Returns:
        (low, high), or None for n = 0: no answers, no interval.
    """
    if not 0 <= count <= n:
        raise ValueError(f"{count} of {n} is no share")
    if n == 0:
        return None
    share = count / n
    centre = share + z * z / (2 * n)
    spread = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def share(count: int, n: int) -> dict[str, Any]:
    """`{"count", "n", "rate", "interval"}`: a share that cannot be quoted without its n; rate and interval are None for
    n = 0.
    """
    interval = wilson_interval(count, n)
    return {"count": count, "n": n, "rate": count / n if n else None, "interval": list(interval) if interval else None}


def score(verdicts: Sequence[Judged], *, timed: bool) -> dict[str, Any]:
    """Score one model on one split, one verdict a problem.

    Args:
        verdicts: the verdict of each problem's answer.
        timed: whether speedups were measured at all. Without it fast_1 and fast_2 are None, which is not the same as 0.

    Returns:
        n: problems that were asked.
        verified: how many of them got a correct kernel; the same as fast_0's count.
        verified_rate, verified_interval: as a share of n, with its 95 % Wilson interval; None for n = 0.
        compiled: share of the judged answers whose kernel got as far as running. Its n leaves out what could not be
            judged.
        fast_0, fast_1, fast_2: shares of n: correct; correct and faster; correct and at least twice as fast. Faster is
            what the whole interval of the speedup says, not its point estimate alone.
        unjudged: answers that nothing is known about because the problem or the machine failed. They stay in n: leaving
            them out would flatter.
        verdicts: verdict -> count, the most frequent first.
    """
    n = len(verdicts)
    correct = [v for v in verdicts if v.correctness]
    judged = [v for v in verdicts if v.verdict not in UNJUDGED]
    verified = share(len(correct), n)
    counts = Counter(v.verdict for v in verdicts)
    return {
        "n": n,
        "verified": len(correct),
        "verified_rate": verified["rate"],
        "verified_interval": verified["interval"],
        "compiled": share(sum(v.verdict not in NEVER_RAN for v in judged), len(judged)),
        "fast_0": verified,
        "fast_1": share(sum(bool(v.fast_1) for v in correct), n) if timed else None,
        "fast_2": share(sum(bool(v.fast_2) for v in correct), n) if timed else None,
        "unjudged": n - len(judged),
        "verdicts": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
    }


def compare(base: Sequence[Judged], tuned: Sequence[Judged]) -> dict[str, Any]:
    """Pair base and tuned by problem: position i of both is the same problem.

    Returns:
        n, both, neither: problems, solved by both, solved by neither.
        wins: solved by the tuned model alone.
        losses: solved by the base model alone.
        p_value: exact McNemar test, two-sided; None for n = 0.
    """
    pairs = Counter((b.correctness, t.correctness) for b, t in zip(base, tuned, strict=True))
    wins, losses = pairs[False, True], pairs[True, False]
    return {
        "n": len(base),
        "both": pairs[True, True],
        "neither": pairs[False, False],
        "wins": wins,
        "losses": losses,
        "p_value": mcnemar_exact(wins, losses) if base else None,
    }


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided p-value of the problems on which two models differ, under a fair coin.

    Q. McNemar (1947), "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12, 153-157, with the exact binomial distribution in place of its normal approximation, because
    problems are few.
    """
    n = wins + losses
    tail = sum(comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)
