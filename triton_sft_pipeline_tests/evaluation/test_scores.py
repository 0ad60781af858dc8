"""Scores and comparisons against cases that were worked out by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_sft_pipeline.evaluation.scores import (
    FAST_P,
    VERDICT_KINDS,
    Outcome,
    compare,
    outcomes,
    score,
    share,
    verdict_kind,
)
from triton_sft_pipeline.evaluation.statistics import wilson_interval
from triton_sft_pipeline.verification.verdict import CORRECT, VERDICTS


def outcome(name: str, speedup: float | None = None, tokens: int = 10) -> Outcome:
    """Timed when a speedup is given; the judge is sure of being faster from a tenth above on."""
    fast_1, fast_2 = (None, None) if speedup is None else (speedup >= 1.1, speedup >= 2.1)
    return Outcome(name, name in CORRECT, fast_1, fast_2, speedup, tokens)


GOOD, BAD = outcome("verified"), outcome("incorrect_numerical")


def once(*names: str) -> list[list[Outcome]]:
    """Problems with one answer each."""
    return [[outcome(name)] for name in names]


def test_one_answer_a_problem_is_counted_by_hand() -> None:
    cell = score(
        [
            [outcome("verified", 2.5)],
            [outcome("verified", 1.5)],
            [outcome("verified", 1.05)],
            *once("incorrect_numerical", "compile_error", "unparsed", "reference_error", "unparsed"),
        ],
        timed=True,
    )
    assert (cell["n"], cell["answers"], cell["verified"], cell["verified_rate"]) == (8, 8, 3, 0.375)
    assert cell["verified_interval"] == pytest.approx([0.1368, 0.6943], abs=5e-5)
    assert (cell["fast_0"]["count"], cell["fast_1"]["count"], cell["fast_2"]["count"]) == (3, 2, 1)
    compiled = cell["compiled"]
    assert (compiled["count"], compiled["n"], compiled["answers"]) == (4, 7, 7), "nothing is known of the reference's"
    assert cell["unjudged"] == 1
    assert list(cell["verdicts"].items())[:2] == [("verified", 3), ("unparsed", 2)]
    assert sum(cell["verdicts"].values()) == 8


def test_several_answers_weigh_each_problem_the_same() -> None:
    cell = score([[GOOD, BAD, BAD, BAD], [GOOD, GOOD], [BAD]], timed=False)
    assert cell["fast_0"]["rate"] == pytest.approx((1 / 4 + 1 + 0) / 3)
    assert cell["fast_0"]["interval"] == pytest.approx(wilson_interval(1.25, 3))
    assert {name: cell["fast_0"][name] for name in ("n", "count", "answers")} == {"n": 3, "count": 3, "answers": 7}
    assert cell["verified"] == 3 and cell["verified_rate"] == cell["fast_0"]["rate"]
    assert cell["verified_interval"] == cell["fast_0"]["interval"]


def test_pass_at_k_is_worked_out_by_hand_and_starts_at_fast_0() -> None:
    cell = score([[GOOD, BAD, BAD, BAD], [GOOD, GOOD, BAD], [BAD, BAD, BAD]], timed=False)
    assert list(cell["pass_at_k"]) == ["1", "2", "3"], "as far as the problem with the fewest answers"
    assert cell["pass_at_k"]["1"] == cell["fast_0"]
    # Of 6 pairs 3 hold the one good answer, of 3 pairs all hold one of two; of 4 triples 3, of 1 triple 1.
    assert cell["pass_at_k"]["2"]["rate"] == pytest.approx((3 / 6 + 3 / 3 + 0) / 3)
    assert cell["pass_at_k"]["3"]["rate"] == pytest.approx((3 / 4 + 1 + 0) / 3)
    assert cell["pass_at_k"]["3"]["interval"] == pytest.approx(wilson_interval(1.75, 3))
    assert {cell["pass_at_k"]["3"][name] for name in ("n", "count")} == {3}


def test_the_fast_p_curve_is_worked_out_by_hand() -> None:
    cell = score(
        [
            [outcome("verified", 1.0), outcome("verified", 3.95)],
            [outcome("verified"), outcome("incorrect_shape", 9.0)],
        ],
        timed=True,
    )
    curve = cell["fast_p"]
    at = dict(zip(curve["p"], curve["rate"], strict=True))
    assert curve["n"] == 2
    assert (curve["p"][0], curve["p"][13], curve["p"][-1], len(curve["p"])) == (0, 1.3, 4.0, 41)
    assert at[0] == cell["fast_0"]["rate"] == 0.75, "a correct kernel that was not timed is correct"
    assert (at[0.1], at[0.9]) == (0.5, 0.5), "and has no speed; a wrong one is nowhere on the curve"
    assert (at[1.0], at[3.9], at[4.0]) == (0.25, 0.25, 0.0), "above p, not at p"
    assert (curve["low"][10], curve["high"][10]) == pytest.approx(wilson_interval(0.5, 2))
    assert curve["rate"] == sorted(curve["rate"], reverse=True)


def test_the_curve_takes_the_point_estimate_and_fast_1_the_judges_word() -> None:
    unsure = Outcome("verified", True, False, False, 2.5)
    cell = score([[unsure]], timed=True)
    assert (cell["fast_1"]["count"], cell["fast_2"]["count"]) == (0, 0)
    assert cell["fast_p"]["rate"][FAST_P.index(2.0)] == 1.0


def test_speedups_are_averaged_over_correct_kernels_that_were_timed() -> None:
    cell = score(
        [[outcome("verified", 2.0), outcome("verified", 8.0)], [outcome("verified"), outcome("torch_fallback", 99.0)]],
        timed=True,
    )
    assert cell["speedup"] == {"geometric_mean": pytest.approx(4.0), "interval": None, "n": 2, "problems": 1}
    two = score([[outcome("verified", 0.5)], [outcome("verified", 2.0)]], timed=True)["speedup"]
    assert two["geometric_mean"] == pytest.approx(1.0) and two["interval"] == pytest.approx([0.5, 2.0])
    odd = [[outcome("verified", math.inf)], [outcome("verified", 0.0)], [outcome("verified", math.nan)]]
    assert score(odd, timed=True)["speedup"] is None
    assert score([[BAD]], timed=True)["speedup"] is None


def test_cheats_are_counted_by_kind_and_together() -> None:
    cell = score(
        [[outcome("torch_fallback"), outcome("torch_fallback")], [outcome("dummy_kernel"), GOOD], [BAD, BAD]],
        timed=False,
    )
    assert list(cell["cheats"]) == ["torch_fallback", "dummy_kernel"]
    assert cell["cheats"]["torch_fallback"]["rate"] == pytest.approx(1 / 3)
    assert cell["cheats"]["torch_fallback"]["count"] == 2
    assert cell["cheats"]["dummy_kernel"]["rate"] == pytest.approx(1 / 6)
    assert cell["refused"]["rate"] == pytest.approx(1 / 2)
    assert (cell["refused"]["count"], cell["refused"]["answers"], cell["refused"]["n"]) == (3, 6, 3)


def test_tokens_are_added_up_and_averaged_over_answers() -> None:
    cell = score(
        [[outcome("verified", tokens=10), outcome("unparsed", tokens=30)], [outcome("verified", tokens=80)]],
        timed=False,
    )
    assert cell["tokens"] == {"total": 120, "mean": 40.0, "interval": [20.0, 80.0], "n": 3}
    assert score([[GOOD, BAD]], timed=False)["tokens"]["interval"] is None, "one problem shows no variation"


def test_an_unjudged_answer_counts_as_a_failure_and_not_as_compiled() -> None:
    cell = score(
        [[GOOD, outcome("infra_error")], [outcome("reference_error"), outcome("reference_error")]], timed=False
    )
    assert (cell["fast_0"]["rate"], cell["fast_0"]["answers"], cell["unjudged"]) == (0.25, 4, 3)
    assert (cell["compiled"]["rate"], cell["compiled"]["n"], cell["compiled"]["answers"]) == (1.0, 1, 1)


def test_speed_that_was_not_measured_is_not_zero() -> None:
    cell = score([[GOOD]], timed=False)
    assert cell["fast_1"] is None and cell["fast_2"] is None and cell["fast_p"] is None and cell["speedup"] is None
    assert score([[BAD]], timed=True)["fast_1"]["count"] == 0
    compared = compare([[GOOD]], [[GOOD]], timed=False)
    assert compared["fast_1"] is None and compared["fast_2"] is None and compared["fast_0"]["difference"] == 0.0


def test_an_empty_split_has_counts_and_no_rates() -> None:
    cell = score([], timed=True)
    assert (cell["n"], cell["answers"], cell["verified"], cell["verified_rate"], cell["verified_interval"]) == (
        0, 0, 0, None, None,
    )  # fmt: skip
    assert cell["fast_1"] == {"rate": None, "interval": None, "n": 0, "count": 0, "answers": 0}
    assert (cell["fast_p"], cell["pass_at_k"], cell["speedup"], cell["cheats"]) == (None, {}, None, {})
    assert cell["tokens"] == {"total": 0, "mean": None, "interval": None, "n": 0}
    compared = compare([], [], timed=True)
    assert (compared["n"], compared["p_value"], compared["fast_1"]["interval"]) == (0, None, None)


def test_a_problem_without_answers_counts_nowhere() -> None:
    assert score([[], [GOOD, BAD]], timed=True) == score([[GOOD, BAD]], timed=True)
    assert share([[], [True]])["n"] == 1
    whole = compare([[GOOD], [BAD]], [[BAD], [GOOD]], timed=False)
    assert compare([[GOOD], [], [BAD], [GOOD]], [[BAD], [GOOD], [GOOD], []], timed=False) == whole


def test_pairs_are_counted_by_the_first_answers() -> None:
    base = once("verified", "verified", "timeout", "timeout", "timeout")
    tuned = once("verified", "crash", "verified", "verified", "timeout")
    found = compare(base, tuned, timed=False)
    counts = {name: found[name] for name in ("n", "both", "neither", "wins", "losses", "p_value")}
    assert counts == {"n": 5, "both": 1, "neither": 1, "wins": 2, "losses": 1, "p_value": 1.0}
    more = compare([[*b, GOOD] for b in base], [[*t, BAD] for t in tuned], timed=False)
    assert {name: more[name] for name in counts} == counts
    with pytest.raises(ValueError):
        compare(base, tuned[:-1], timed=False)


def test_a_difference_is_the_mean_of_the_problems_differences() -> None:
    base = [[GOOD, BAD], [BAD, BAD, BAD, BAD], [GOOD]]
    tuned = [[GOOD, GOOD, GOOD], [GOOD, BAD], [outcome("verified", 2.5)]]
    found = compare(base, tuned, timed=True)
    assert found["fast_0"]["difference"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert found["fast_2"]["difference"] == pytest.approx(1 / 3)
    assert found["fast_0"]["method"] == "bootstrap" and found["fast_0"]["n"] == 3
    low, high = found["fast_0"]["interval"]
    assert (low, high) == pytest.approx((0.0, 0.5))
    alone = score(tuned, timed=True)["fast_0"]["rate"] - score(base, timed=True)["fast_0"]["rate"]
    assert found["fast_0"]["difference"] == pytest.approx(alone)


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
    cell = score([[outcome("verified_hybrid", 1.5)], [outcome("torch_fallback", 1.5)]], timed=True)
    assert (cell["verified"], cell["fast_1"]["count"], cell["fast_2"]["count"]) == (1, 1, 0)


def test_what_is_correct_is_the_verdicts_own_word_and_not_its_name() -> None:
    odd = Outcome("verified", False, True, True, 3.0)
    cell = score([[odd]], timed=True)
    assert (cell["verified"], cell["fast_1"]["count"], cell["fast_p"]["rate"][0], cell["speedup"]) == (0, 0, 0.0, None)
    assert compare([[odd]], [[GOOD]], timed=True)["wins"] == 1


def test_outcomes_are_read_from_a_reports_answers() -> None:
    answer = {"verdict": "verified", "correctness": True, "fast_1": True, "fast_2": None, "speedup": 1.5, "tokens": 7}
    assert outcomes([answer | {"code": "...", "sample": 0}]) == [Outcome("verified", True, True, None, 1.5, 7)]


ANSWERS = st.lists(
    st.builds(
        outcome,
        st.sampled_from(["verified", "incorrect_shape", "dummy_kernel", "infra_error", "unparsed"]),
        st.sampled_from([None, 0.5, 1.5, 3.0]),
        st.integers(1, 50),
    ),
    min_size=1,
    max_size=4,
)
FEW: dict[str, Any] = {"timed": True, "resamples": 50}


def close(one: Any, other: Any) -> bool:
    """Equal JSON data, but for rounding."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(close(a, b) for a, b in zip(one, other, strict=True))
    return one == (pytest.approx(other, abs=1e-9) if isinstance(one, float) else other)


@settings(deadline=None, max_examples=50)
@given(st.lists(ANSWERS, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_problems_and_of_answers_does_not_matter(problems: list[list[Outcome]], rand: Any) -> None:
    mixed = [rand.sample(several, len(several)) for several in problems]
    rand.shuffle(mixed)
    before, after = score(problems, **FEW), score(mixed, **FEW)
    assert close(before, after), (before, after)


@settings(deadline=None, max_examples=50)
@given(st.lists(ANSWERS, min_size=1, max_size=6), st.integers(2, 3))
def test_asking_everything_twice_with_the_same_answers_leaves_rates_and_intervals(
    problems: list[list[Outcome]], times: int
) -> None:
    plain, double = score(problems, **FEW), score([several * times for several in problems], **FEW)
    for name in ("fast_0", "fast_1", "fast_2", "refused", "compiled"):
        assert double[name]["rate"] == (pytest.approx(plain[name]["rate"]) if plain[name]["n"] else None)
        assert close(double[name]["interval"], plain[name]["interval"])
        assert double[name]["count"] == times * plain[name]["count"]
        assert double[name]["n"] == plain[name]["n"]
    assert close(double["fast_p"], plain["fast_p"])
    assert close(double["tokens"]["interval"], plain["tokens"]["interval"])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=8))
def test_swapping_the_models_turns_every_comparison_around(pairs: list[tuple[list[Outcome], list[Outcome]]]) -> None:
    base, tuned = [b for b, _ in pairs], [t for _, t in pairs]
    ahead, back = compare(base, tuned, **FEW), compare(tuned, base, **FEW)
    for name in ("fast_0", "fast_1", "fast_2"):
        low, high = ahead[name]["interval"]
        assert back[name]["difference"] == pytest.approx(-ahead[name]["difference"], abs=1e-12)
        assert back[name]["interval"] == pytest.approx([-high, -low], abs=1e-9)
    assert (back["wins"], back["losses"], back["p_value"]) == (ahead["losses"], ahead["wins"], ahead["p_value"])


@settings(deadline=None, max_examples=50)
@given(st.lists(ANSWERS, min_size=1, max_size=6))
def test_shares_hold_together(problems: list[list[Outcome]]) -> None:
    cell = score(problems, **FEW)
    assert cell == json.loads(json.dumps(cell, allow_nan=False)), "plain JSON data"
    rates = [cell[name]["rate"] for name in ("fast_0", "fast_1", "fast_2")]
    assert rates == sorted(rates, reverse=True)
    assert cell["fast_p"]["rate"][0] == pytest.approx(rates[0])
    assert cell["refused"]["count"] == sum(cheat["count"] for cheat in cell["cheats"].values())
    assert sum(cell["verdicts"].values()) == cell["answers"] == cell["tokens"]["n"]
    for low, rate, high in zip(cell["fast_p"]["low"], cell["fast_p"]["rate"], cell["fast_p"]["high"], strict=True):
        assert low <= rate <= high
