"""Scores against cases that were worked out by hand or published."""

from __future__ import annotations

import pytest

from triton_sft_pipeline.evaluation.scores import (
    VERDICT_KINDS,
    compare,
    mcnemar_exact,
    score,
    share,
    verdict_kind,
    wilson_interval,
)
from triton_sft_pipeline.verification.verdict import CORRECT, VERDICTS, Verdict


def verdict(name: str, fast_1: bool | None = None, fast_2: bool | None = None) -> Verdict:
    good = name in CORRECT
    return Verdict(key="p", verdict=name, correctness=good, fast_0=good, fast_1=fast_1, fast_2=fast_2)


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


def test_no_answers_have_no_interval_and_more_than_all_is_refused() -> None:
    assert wilson_interval(0, 0) is None
    assert share(0, 0) == {"count": 0, "n": 0, "rate": None, "interval": None}
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)


def test_an_interval_contains_its_share_and_stays_inside_zero_and_one() -> None:
    for n in range(1, 60):
        for count in range(n + 1):
            low, high = wilson_interval(count, n) or (2, -1)
            assert 0 <= low <= count / n + 1e-12 and count / n <= high + 1e-12 <= 1 + 1e-12


def test_a_mixed_split_is_counted_by_hand() -> None:
    cell = score(
        [
            verdict("verified", True, True),
            verdict("verified", True, False),
            verdict("verified", False, False),
            verdict("incorrect_numerical"),
            verdict("compile_error"),
            verdict("unparsed"),
            verdict("reference_error"),
            verdict("unparsed"),
        ],
        timed=True,
    )
    assert (cell["n"], cell["verified"], cell["verified_rate"]) == (8, 3, 0.375)
    assert cell["verified_interval"] == pytest.approx([0.1368, 0.6943], abs=5e-5)
    assert (cell["fast_0"]["count"], cell["fast_1"]["count"], cell["fast_2"]["count"]) == (3, 2, 1)
    assert (cell["compiled"]["count"], cell["compiled"]["n"]) == (4, 7), "nothing is known of the failed reference"
    assert cell["unjudged"] == 1
    assert list(cell["verdicts"].items())[:2] == [("verified", 3), ("unparsed", 2)]
    assert sum(cell["verdicts"].values()) == 8


def test_speed_that_was_not_measured_is_not_zero() -> None:
    cell = score([verdict("verified")], timed=False)
    assert cell["fast_1"] is None and cell["fast_2"] is None
    assert score([verdict("runtime_error")], timed=True)["fast_1"]["count"] == 0


def test_an_empty_split_has_counts_and_no_rates() -> None:
    cell = score([], timed=True)
    assert (cell["n"], cell["verified"], cell["verified_rate"], cell["verified_interval"]) == (0, 0, None, None)


def test_pairs_are_counted_by_problem() -> None:
    base = [verdict("verified"), verdict("verified"), verdict("timeout"), verdict("timeout"), verdict("timeout")]
    tuned = [verdict("verified"), verdict("crash"), verdict("verified"), verdict("verified"), verdict("timeout")]
    assert compare(base, tuned) == {"n": 5, "both": 1, "neither": 1, "wins": 2, "losses": 1, "p_value": 1.0}
    assert compare([], [])["p_value"] is None


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (10, 0, 2 / 1024), (8, 2, 2 * (1 + 10 + 45) / 1024), (3, 3, 1.0)],
)
def test_the_exact_mcnemar_test_is_a_fair_coin_on_the_problems_that_differ(wins: int, losses: int, p: float) -> None:
    assert mcnemar_exact(wins, losses) == pytest.approx(p)


def test_every_verdict_of_the_judge_has_a_kind() -> None:
    kinds = {name: verdict_kind(name) for name in VERDICTS}
    assert {name for name, kind in kinds.items() if kind == "unjudged"} == {
        "unsupported_on_cpu",
        "degenerate_task",
        "reference_error",
        "infra_error",
    }
    assert {name for name, kind in kinds.items() if kind == "verified"} == {"verified", "verified_hybrid"}
    assert {name for name, kind in kinds.items() if kind == "refused"} == {
        "no_kernel_launch",
        "dummy_kernel",
        "torch_fallback",
        "output_cached",
        "output_alias",
        "input_mutated",
        "lazy_output",
        "harness_tamper",
        "timing_tamper",
        "stream_escape",
        "thread_leak",
        "process_leak",
        "forged_result",
        "reference_access",
        "sandbox_violation",
        "forbidden_construct",
    }
    assert kinds["unparsed"] == kinds["no_code"] == "unparsed"
    assert set(kinds.values()) == set(VERDICT_KINDS)


def test_a_hybrid_kernel_counts_as_correct_and_as_fast_as_it_is() -> None:
    cell = score([verdict("verified_hybrid", True, False), verdict("torch_fallback")], timed=True)
    assert (cell["verified"], cell["fast_1"]["count"], cell["fast_2"]["count"]) == (1, 1, 0)


def test_what_is_correct_is_the_verdicts_own_word_and_not_its_name() -> None:
    odd = Verdict(key="p", verdict="verified", correctness=False, fast_0=False)
    assert score([odd], timed=False)["verified"] == 0
    assert compare([odd], [verdict("verified_hybrid")])["wins"] == 1
