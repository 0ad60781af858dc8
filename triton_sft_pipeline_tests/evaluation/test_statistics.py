"""Intervals, pass@k and tests against published numbers, an independent library, plain programs and simulations."""

from __future__ import annotations

import itertools
import math
import random
import statistics as plain
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from triton_sft_pipeline.evaluation import statistics
from triton_sft_pipeline.evaluation.statistics import (
    bootstrap_sums,
    bound_interval,
    geometric_mean,
    mcnemar_exact,
    paired_differences,
    pass_at_k,
    percentile_interval,
    ratio_interval,
    wilson_interval,
)


def difference(base: Any, tuned: Any, **options: Any) -> dict[str, Any]:
    return paired_differences([base], [tuned], **options)[0]


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [
        # All but the last: Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # By hand: all of n reach down to n / (n + z * z).
        (29, 29, 0.8830, 1.0000),
    ],
)
def test_the_wilson_interval_is_the_published_one(count: int, n: int, low: float, high: float) -> None:
    interval = wilson_interval(count, n)
    assert interval is not None
    assert interval == pytest.approx((low, high), abs=5e-5)


def test_the_wilson_interval_is_scipys_for_every_count() -> None:
    for n, count in itertools.product((1, 2, 7, 30), range(31)):
        if count > n:
            continue
        theirs = stats.binomtest(count, n).proportion_ci(confidence_level=0.95, method="wilson")
        assert wilson_interval(count, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_an_interval_contains_its_share_and_stays_inside_zero_and_one() -> None:
    for n in range(1, 60):
        for eighths in range(8 * n + 1):
            low, high = wilson_interval(eighths / 8, n) or (2, -1)
            assert 0 <= low <= eighths / 8 / n <= high <= 1
    assert wilson_interval(0, 9) == (0.0, pytest.approx(1 - 9 / (9 + 1.96**2), abs=1e-4))


def test_no_answers_have_no_interval_and_more_than_all_is_refused() -> None:
    assert wilson_interval(0, 0) is None
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)
    assert wilson_interval(sum([0.1] * 30), 3) == pytest.approx(wilson_interval(3, 3)), (
        "a sum that rounding left a hair off"
    )


@pytest.mark.parametrize(("alpha", "beta"), [(0.4, 1.6), (1.0, 1.0), (4.0, 4.0), (0.1, 0.1)])
@pytest.mark.parametrize(("problems", "samples"), [(10, 8), (40, 8), (100, 4)])
def test_the_wilson_interval_of_problems_with_several_answers_covers(
    alpha: float, beta: float, problems: int, samples: int
) -> None:
    generator = np.random.default_rng(1)
    rates = generator.beta(alpha, beta, (2000, problems))
    means = generator.binomial(samples, rates).mean(axis=1) / samples
    ends = [wilson_interval(mean * problems, problems) or (0, 0) for mean in means]
    covered = np.mean([low <= alpha / (alpha + beta) <= high for low, high in ends])
    assert covered >= 0.95, f"{covered:.3f}"


def test_answers_taken_for_problems_would_not_cover() -> None:
    """Why the n of an interval is the number of problems: with 80 'independent' answers it would be far too short."""
    generator = np.random.default_rng(1)
    counts = generator.binomial(8, generator.beta(0.4, 1.6, (2000, 10))).sum(axis=1)
    ends = [wilson_interval(int(count), 80) or (0, 0) for count in counts]
    assert np.mean([low <= 0.2 <= high for low, high in ends]) < 0.85


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (10, 0, 2 / 1024), (8, 2, 2 * (1 + 10 + 45) / 1024), (3, 3, 1.0)],
)
def test_the_exact_mcnemar_test_is_a_fair_coin_on_the_problems_that_differ(wins: int, losses: int, p: float) -> None:
    assert mcnemar_exact(wins, losses) == pytest.approx(p)


def test_the_exact_mcnemar_test_gives_the_published_p_values() -> None:
    # Agresti (1990), "Categorical Data Analysis", p. 350: approval of a president in two polls, of which 86 people and
    # 150 differ; R's exact2x2 gives 3.716e-05 for it.
    assert mcnemar_exact(86, 150) == pytest.approx(3.716e-05, rel=1e-3)
    # Fagerland, Lydersen and Laake (2013), BMC Medical Research Methodology 13:91, table 1: 1 and 7 children differ.
    assert mcnemar_exact(1, 7) == pytest.approx(0.0703, abs=5e-5)
    for wins, losses in itertools.product((0, 1, 4, 9, 30), repeat=2):
        if wins + losses:
            theirs = stats.binomtest(wins, wins + losses, 0.5).pvalue
            assert mcnemar_exact(wins, losses) == pytest.approx(theirs, rel=1e-9)
    assert 0 < mcnemar_exact(900, 1100) < 1e-4, "more differing problems than a float has powers of two"


def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_answer() -> None:
    for n in range(1, 7):
        for c in range(n + 1):
            answers = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                draws = list(itertools.combinations(answers, k))
                by_hand = sum(any(draw) for draw in draws) / len(draws)
                assert pass_at_k([n], [c])[0, k - 1] == pytest.approx(by_hand, abs=1e-12)


def product_form(n: int, c: int, k: int) -> float:
    """Figure 3 of Chen et al. (2021), in exact arithmetic."""
    if n - c < k:
        return 1.0
    return float(1 - math.prod(1 - Fraction(k, i) for i in range(n - c + 1, n + 1)))


def test_pass_at_k_agrees_with_both_forms_of_chen_et_al_at_their_200_samples() -> None:
    counts = [0, 1, 3, 50, 199, 200]
    found = pass_at_k([200] * len(counts), counts)
    assert found.shape == (6, 200)
    for row, c in enumerate(counts):
        for k in (1, 2, 10, 100, 199, 200):
            binomial = float(1 - Fraction(math.comb(200 - c, k), math.comb(200, k)))
            assert found[row, k - 1] == pytest.approx(binomial, abs=1e-12)
            assert found[row, k - 1] == pytest.approx(product_form(200, c, k), abs=1e-12)


def test_pass_at_k_goes_up_to_the_smallest_number_of_answers() -> None:
    found = pass_at_k([3, 5], [1, 2])
    assert found.shape == (2, 3)
    assert found[1] == pytest.approx([2 / 5, 1 - 3 / 10, 1 - 1 / 10])
    assert pass_at_k([], []).shape == (0, 0)


def test_pass_at_k_is_unbiased_where_the_plain_power_is_not() -> None:
    generator = np.random.default_rng(0)
    correct = generator.binomial(8, 0.2, 100_000)
    truth = 1 - 0.8**4
    assert pass_at_k(np.full(100_000, 8), correct)[:, 3].mean() == pytest.approx(truth, abs=0.003)
    assert (1 - (1 - correct / 8) ** 4).mean() < truth - 0.03


def plain_bootstrap(values: list[float], resamples: int, seed: int) -> tuple[float, float]:
    """The expanded percentile interval of a mean, drawn one by one."""
    draw = random.Random(seed)
    means = sorted(plain.fmean(draw.choices(values, k=len(values))) for _ in range(resamples))
    tail = expanded_tail(len(values))
    return means[int(tail * resamples)], means[int((1 - tail) * resamples)]


def expanded_tail(n: int) -> float:
    """The normal distribution beyond the t quantile of a mean of n, times what resampling takes from its spread."""
    return float(stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1)))


def test_the_bootstrap_agrees_with_a_plain_one_and_with_scipys() -> None:
    values = np.random.default_rng(3).integers(-8, 9, 60) / 8
    ours = difference(np.zeros(60), values)
    level = 1 - 2 * expanded_tail(60)
    theirs = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=20_000,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert ours["difference"] == pytest.approx(values.mean())
    assert ours["method"] == "bootstrap"
    assert ours["interval"] == pytest.approx([theirs.low, theirs.high], abs=0.006)
    assert ours["interval"] == pytest.approx(plain_bootstrap(values.tolist(), 10_000, 1), abs=0.008)


def test_the_bootstrap_of_two_problems_is_worked_out_by_hand() -> None:
    sums = bootstrap_sums([[0.0], [1.0]], 100_000, seed=2)[:, 0]
    shares = [np.mean(sums == value) for value in (0.0, 1.0, 2.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.006), "drawn with replacement"
    assert difference([0, 0], [0, 1])["interval"] == [0.0, 1.0]


def test_resampled_sums_are_whole_draws_of_whole_rows() -> None:
    rows = [[1.0, 10.0], [2.0, 20.0], [5.0, 50.0]]
    sums = bootstrap_sums(rows, 1001, seed=4)
    assert sums.shape == (1001, 2)
    assert np.allclose(sums[:, 1], 10 * sums[:, 0]), "the columns of a row are drawn together"
    possible = {sum(draw) for draw in itertools.product((1.0, 2.0, 5.0), repeat=3)}
    assert set(sums[:, 0].tolist()) == possible


def test_the_bootstrap_depends_on_its_seed_and_on_neither_memory_nor_order(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((50, 2))
    once = bootstrap_sums(values, 999, seed=1)
    assert np.array_equal(once, bootstrap_sums(values, 999, seed=1))
    assert not np.array_equal(once, bootstrap_sums(values, 999, seed=2))
    assert np.array_equal(once, bootstrap_sums(values[::-1], 999, seed=1))
    monkeypatch.setattr(statistics, "_CHUNK", 170)
    assert np.allclose(once, bootstrap_sums(values, 999, seed=1), rtol=1e-12)
    monkeypatch.setattr(statistics, "_CHUNK", 1)
    assert np.allclose(once, bootstrap_sums(values, 999, seed=1), rtol=1e-12)


@pytest.mark.parametrize(("problems", "least", "most"), [(5, 0.83, 0.93), (10, 0.92, 0.98), (40, 0.92, 0.98)])
def test_the_interval_of_a_paired_difference_covers_but_for_few_problems(
    problems: int, least: float, most: float
) -> None:
    """Which is what a note of the report says."""
    generator = np.random.default_rng(11)
    covered = []
    for seed in range(400):
        easy = generator.beta(0.5, 2, problems)
        base, tuned = generator.binomial(8, easy) / 8, generator.binomial(8, easy + 0.3 * (1 - easy)) / 8
        low, high = difference(base, tuned, resamples=1000, seed=seed)["interval"]
        covered.append(low <= 0.3 * (1 - 0.2) <= high)
    assert least <= np.mean(covered) <= most, f"{np.mean(covered):.3f}"


def test_several_scores_are_compared_on_the_same_problems_and_each_as_if_alone() -> None:
    base, tuned = [[0, 0.5, 0.25], [0, 0, 0]], [[1, 0.5, 0.5], [0, 0, 0]]
    first, second = paired_differences(base, tuned)
    assert first["difference"] == pytest.approx(1.25 / 3) and first["n"] == 3
    assert (first["method"], second["method"]) == ("bootstrap", "bound")
    assert first["interval"] == pytest.approx(difference(base[0], tuned[0])["interval"], abs=1e-12)


def test_where_all_problems_agree_the_interval_is_worked_out_by_hand() -> None:
    u = 1.959963984540054**2 / (10 + 1.959963984540054**2)  # Wilson's upper end for 0 of 10.
    nothing = difference([0.5] * 10, [0.5] * 10)
    assert (nothing["difference"], nothing["method"]) == (0.0, "bound")
    assert nothing["interval"] == pytest.approx([-u, u])
    assert difference([0] * 10, [1] * 10)["interval"] == pytest.approx([1 - 2 * u, 1.0])
    assert difference([0.25] * 10, [0.75] * 10)["interval"] == pytest.approx([0.5 - 1.5 * u, 0.5 + 0.5 * u])
    assert difference([0.1, 0.7], [0.3, 0.9])["method"] == "bound", "0.2 twice, whatever rounding says"
    assert difference([1], [0])["interval"] == bound_interval(-1.0, 1)
    assert difference([], []) == {"difference": None, "interval": None, "n": 0, "method": "bound"}


@pytest.mark.parametrize("n", [10, 27, 100])
@pytest.mark.parametrize("common", [-1.0, 0.0, 0.375, 1.0])
def test_the_bound_covers_where_the_bootstrap_would_be_sure(n: int, common: float) -> None:
    """A share q of all problems differs from the common difference, in the worst way; most draws do not show it."""
    low, high = bound_interval(common, n)
    for q in (0.01, 0.05, 0.1, 0.2, 0.3):
        for extreme in (-1.0, 1.0):
            truth = (1 - q) * common + q * extreme
            missed = 0.0 if low - 1e-12 <= truth <= high + 1e-12 else (1 - q) ** n
            assert missed <= 0.05


def test_a_geometric_mean_is_over_kernels_and_its_interval_over_problems() -> None:
    mean, interval = geometric_mean([[2.0, 8.0], [], [4.0]]) or (0.0, None)
    assert mean == pytest.approx(4.0)
    assert interval is not None and interval[0] <= 4.0 <= interval[1]
    assert geometric_mean([[2.0, 8.0], []]) == (pytest.approx(4.0), None)
    assert geometric_mean([[], []]) is None
    many = np.random.default_rng(0).lognormal(0.5, 0.4, 50)
    mean, interval = geometric_mean([[speedup] for speedup in many]) or (0.0, None)
    assert mean == pytest.approx(stats.gmean(many))
    spread = 1.96 * np.log(many).std() / math.sqrt(50)
    assert interval == pytest.approx([mean * math.exp(-spread), mean * math.exp(spread)], rel=0.03)


def test_answers_to_one_problem_make_no_interval_shorter() -> None:
    speedups = np.random.default_rng(0).lognormal(0.5, 0.4, 30)
    once = geometric_mean([[s] for s in speedups])
    assert geometric_mean([[s] * 8 for s in speedups]) == (
        pytest.approx(once[0]) if once else None,
        pytest.approx(once[1]) if once else None,
    )


def test_a_mean_over_answers_weighs_each_answer_and_varies_by_problem() -> None:
    assert ratio_interval([10], [2]) is None
    assert ratio_interval([10, 20], [2, 4]) == [5.0, 5.0]
    low, high = ratio_interval([10, 400], [10, 40]) or (0, 0)
    assert (low, high) == (1.0, 10.0)


VALUES = st.lists(
    st.tuples(st.integers(0, 8).map(lambda i: i / 8), st.integers(0, 8).map(lambda i: i / 8)), min_size=1, max_size=25
)


@settings(deadline=None, max_examples=60)
@given(VALUES, st.randoms(use_true_random=False))
def test_swapping_the_models_turns_the_difference_around_and_order_does_not_matter(pairs: Any, rand: Any) -> None:
    base, tuned = [b for b, _ in pairs], [t for _, t in pairs]
    ahead, back = difference(base, tuned, resamples=200), difference(tuned, base, resamples=200)
    assert back["difference"] == pytest.approx(-ahead["difference"], abs=1e-12)
    assert back["interval"] == pytest.approx([-ahead["interval"][1], -ahead["interval"][0]], abs=1e-12)
    assert back["method"] == ahead["method"]
    rand.shuffle(pairs)
    shuffled = difference([b for b, _ in pairs], [t for _, t in pairs], resamples=200)
    assert shuffled["interval"] == pytest.approx(ahead["interval"], abs=1e-12)
    low, high = ahead["interval"]
    assert -1 - 1e-12 <= low <= ahead["difference"] + 1e-9 and ahead["difference"] <= high + 1e-9 <= 1 + 1e-8


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_does_not_ask_who_is_who(wins: int, losses: int) -> None:
    p = mcnemar_exact(wins, losses)
    assert p == mcnemar_exact(losses, wins)
    assert 0 < p <= 1


@given(st.lists(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=9))
def test_pass_at_k_rises_from_the_share_of_correct_answers(problems: list[tuple[int, int]]) -> None:
    found = pass_at_k([n for n, _ in problems], [c for _, c in problems])
    assert found[:, 0] == pytest.approx([c / n for n, c in problems])
    assert (np.diff(found, axis=1) >= -1e-12).all() and (found >= 0).all() and (found <= 1).all()


def test_of_many_problems_the_middle_of_resampled_values_is_95_percent() -> None:
    assert percentile_interval(np.arange(1001), 10**9) == pytest.approx([25.0, 975.0], abs=1e-4)


@pytest.mark.parametrize(("n", "tail"), [(2, 0.0), (5, 0.000954), (10, 0.008551), (20, 0.015881), (40, 0.020258)])
def test_of_few_problems_it_is_more_by_students_t(n: int, tail: float) -> None:
    """By hand from tables: for 10 problems t is 2.262157, times sqrt(10 / 9) is 2.384524."""
    assert expanded_tail(n) == pytest.approx(tail, abs=2e-6)
    assert percentile_interval(np.arange(100_001), n) == pytest.approx([1e5 * tail, 1e5 * (1 - tail)], abs=0.3)
