"""The statistics of an evaluation: intervals of shares, differences and ratios, pass@k, and a paired test.

Pure functions of numbers: knows nothing of verdicts, models or reports. The unit is the problem everywhere: answers to
one problem depend on each other, so intervals are about which problems were asked, never about single answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, isfinite, sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

RESAMPLES = 10_000
"""Bootstrap resamples: the ends of an interval then wander by about a fiftieth of its length with the seed."""

_CHUNK = 2**15
"""Drawn problems that are in memory at once, in a few arrays of 8 bytes each. What fits into a processor's cache is a
third faster than all at once, which for a thousand problems would be 80 MB.
"""

_SAME = 1e-9
"""Differences closer than this are one and the same: they are fractions with small denominators."""


def wilson_interval(count: float, n: int, z: float = Z_95) -> tuple[float, float] | None:
    """The score interval of a share, which stays inside [0, 1] and is sensible for 0 of n and n of n.

    E. B. Wilson (1927), "Probable inference, the law of succession, and statistical inference", JASA 22 (158), 209-212.

    Args:
        count: the sum of n values in [0, 1]; for single answers, how many of them succeeded. Between 0 and 1 a value
            with mean m has a variance of at most m (1 - m), which is that of a coin (R. Bhatia, C. Davis (2000), "A
            better bound on the variance", American Mathematical Monthly 107 (4), 353-357), so for values that are
            shares of several answers the interval is too long rather than too short.
        n: number of values.

    Returns:
        (low, high), or None for n = 0: no answers, no interval.

    Raises:
        ValueError: a sum that n such values cannot have.
    """
    if not -_SAME <= count <= n + _SAME:
        raise ValueError(f"{count} of {n} is no share")
    if n == 0:
        return None
    share = min(1.0, max(0.0, count / n))
    centre = share + z * z / (2 * n)
    spread = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The ends of 0 of n and n of n are exact; rounding would leave them a hair off.
    low = 0.0 if share == 0.0 else max(0.0, (centre - spread) / scale)
    high = 1.0 if share == 1.0 else min(1.0, (centre + spread) / scale)
    return low, high


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided p-value of the problems on which two models differ, under a fair coin.

    Q. McNemar (1947), "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12, 153-157, with the exact binomial distribution in place of its normal approximation, because
    problems are few.
    """
    n = wins + losses
    # Whole numbers to the end: a power of two beyond 1023 is no float.
    tail = 2 * sum(comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, tail / 2**n)


def pass_at_k(answers: ArrayLike, correct: ArrayLike) -> NDArray:
    """Probability that of k answers to a problem at least one is correct, without bias, from n >= k answers.

    1 - C(n - c, k) / C(n, k), equation 1 of M. Chen et al. (2021), "Evaluating large language models trained on code",
    arXiv:2107.03374; here as a running product over k, in which no factor leaves [0, 1].

    Args:
        answers: n of each problem, at least 1.
        correct: c of each problem.

    Returns:
        A matrix [problems, K] whose column k - 1 is pass@k; K is the smallest n, because a problem with n answers says
        nothing without bias about more of them.
    """
    import numpy as np

    n = np.asarray(answers, dtype=np.int64)[:, None]
    c = np.asarray(correct, dtype=np.int64)[:, None]
    if not n.size:
        return np.zeros((0, 0))
    drawn = np.arange(n.min())
    return 1.0 - np.cumprod(np.maximum(n - c - drawn, 0) / (n - drawn), axis=1)


def bootstrap_sums(rows: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> NDArray:
    """Column sums of problems drawn with replacement, as often as there are problems, again and again.

    B. Efron (1979), "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1), 1-26. Every second
    resample mirrors the one before it (P. Hall (1989), "Antithetic resampling for the bootstrap", Biometrika 76 (4),
    713-724): where that drew the problem with the i-th lowest value, this one draws the i-th highest. Each is still a
    fair resample, and swapping two models turns the interval of their difference around exactly.

    Args:
        rows: a matrix [problems, columns]; all columns of a row are drawn together. The order of the rows does not
            matter.
        resamples: how many.
        seed: the same seed gives the same sums.

    Returns:
        A matrix [resamples, columns].
    """
    import numpy as np

    rows = np.asarray(rows, dtype=np.float64)
    rows = rows[np.lexsort(rows.T[::-1])]
    n, half = len(rows), (resamples + 1) // 2
    # Both halves in one product: the mirrored resample has the same numbers of draws, of the reversed rows.
    both = np.concatenate([rows, rows[::-1]], axis=1)
    generator = np.random.default_rng(seed)
    sums = np.empty((half, both.shape[1]))
    for start in range(0, half, step := max(1, _CHUNK // n)):
        size = min(step, half - start)
        drawn = generator.integers(0, n, size=(size, n))
        drawn += np.arange(0, size * n, n)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        sums[start : start + size] = times.astype(np.float64) @ both
    return sums.reshape(2 * half, rows.shape[1])[:resamples]


def percentile_interval(values: ArrayLike, n: int) -> list[float]:
    """The 95 % interval of a mean over n problems: what lies between two quantiles of its bootstrapped values.

    For many problems these are 2.5 and 97.5 %. Resampled means vary less than means do, by sqrt((n - 1) / n), and few
    problems are subject to Student's t and not to the normal distribution, so that the quantiles lie at
    Phi(-sqrt(n / (n - 1)) t) and as far from the other end, t being that of n - 1 degrees of freedom: the expanded
    percentile interval of T. C. Hesterberg (2015), "What teachers should know about the bootstrap: resampling in the
    undergraduate statistics curriculum", The American Statistician 69 (4), 371-386.

    Args:
        values: the resampled means, or ratios.
        n: problems that each was drawn from, at least 2.

    Returns:
        [low, high], never beyond the least and the greatest value.
    """
    import numpy as np
    from scipy.special import ndtr, stdtrit

    tail = float(ndtr(-sqrt(n / (n - 1)) * stdtrit(n - 1, 0.975)))
    low, high = np.quantile(np.asarray(values), [tail, 1 - tail])
    return [float(low), float(high)]


def ratio_interval(
    totals: Sequence[float], counts: Sequence[int], resamples: int = RESAMPLES, seed: int = 0
) -> list[float] | None:
    """95 % bootstrap interval over problems of sum(totals) / sum(counts): a mean over answers that come in problems.

    Args:
        totals: each problem's sum over its answers.
        counts: each problem's number of answers, at least 1.

    Returns:
        [low, high], or None for fewer than two problems, between which nothing can vary.
    """
    import numpy as np

    if len(totals) < 2:
        return None
    sums = bootstrap_sums(np.column_stack([totals, counts]), resamples, seed)
    return percentile_interval(sums[:, 0] / sums[:, 1], len(totals))


def geometric_mean(
    speedups: Sequence[Sequence[float]], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, list[float] | None] | None:
    """The geometric mean over all speedups and its 95 % bootstrap interval over problems.

    Args:
        speedups: those of each problem, all above 0; problems without any do not count.

    Returns:
        (mean, interval); the interval is None for fewer than two problems with speedups, and everything for none.
    """
    import numpy as np

    logs = [np.log(several) for several in speedups if len(several)]
    if not logs:
        return None
    totals, counts = [float(several.sum()) for several in logs], [len(several) for several in logs]
    mean = float(np.exp(sum(totals) / sum(counts)))
    interval = ratio_interval(totals, counts, resamples, seed)
    return mean, [float(np.exp(end)) for end in interval] if interval else None


def paired_differences(
    base: Sequence[Sequence[float]], tuned: Sequence[Sequence[float]], resamples: int = RESAMPLES, seed: int = 0
) -> list[dict[str, object]]:
    """Mean over problems of tuned - base, for several scores at once, each with a 95 % interval.

    The interval is a paired bootstrap over problems. Where every problem has the same difference d there is nothing to
    resample, and a bootstrap would call the answer certain. Then at most a share u of all problems, Wilson's upper end
    for 0 of n, has another difference, and that lies in [-1, 1], so the mean is in [d - u (d + 1), d + u (1 - d)].

    Args:
        base: for each score the values of all problems, in [0, 1].
        tuned: the same of the other model; problem i is the same problem.

    Returns:
        For each score `{"difference", "interval", "n", "method"}`, method "bootstrap" or "bound"; difference and
        interval are None for no problems.
    """
    import numpy as np

    differences = np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    n = differences.shape[1]
    if n == 0:
        return [{"difference": None, "interval": None, "n": 0, "method": "bound"} for _ in differences]
    means = bootstrap_sums(differences.T, resamples, seed) / n
    found: list[dict[str, object]] = []
    for own, resampled in zip(differences, means.T, strict=True):
        constant = float(np.ptp(own)) < _SAME
        interval = bound_interval(float(own[0]), n) if constant else percentile_interval(resampled, n)
        method = "bound" if constant else "bootstrap"
        found.append({"difference": float(own.mean()), "interval": interval, "n": n, "method": method})
    return found


def bound_interval(difference: float, n: int) -> list[float]:
    """The interval of a mean difference when all n problems have this same difference in [-1, 1]: see above."""
    _, unseen = wilson_interval(0, n) or (0.0, 1.0)
    return [difference - unseen * (difference + 1), difference + unseen * (1 - difference)]


def usable_speedup(speedup: float | None) -> bool:
    """Whether a geometric mean can take it: measured, finite and above 0."""
    return speedup is not None and isfinite(speedup) and speedup > 0
