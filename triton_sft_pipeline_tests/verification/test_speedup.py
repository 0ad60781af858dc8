"""A kernel is called faster only when it is, under noise as a GPU makes it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from triton_sft_pipeline.verification.speedup import RELATIVE_NOISE, estimate, flags, iqr, noise_floor

ROUNDS, ITERATIONS = 10, 20
Rounds = list[list[float]]


def simulate(
    seed: int,
    speedup: float,
    reference_ms: float = 0.1,
    drift: Callable[[int], float] = lambda position: 1.0,
    alternating: bool = True,
) -> tuple[Rounds, Rounds]:
    """Both sides' times as a GPU gives them.

    Each block has a position in time, with a clock that wanders by 1 % from round to round and drifts as told; each
    process is off by some per mille for good; each iteration jitters by 1.5 %, and two in a hundred are outliers of up
    to five times the time. Readings are rounded to half a microsecond.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    placement = np.exp(generator.normal(0, 0.002, 2))
    wander = np.exp(np.cumsum(generator.normal(0, 0.01, ROUNDS)))
    sides: tuple[Rounds, Rounds] = ([], [])
    for number in range(ROUNDS):
        order = (1, 0) if alternating and number % 2 else (0, 1)
        for place, side in enumerate(order):
            base = reference_ms / (1, speedup)[side] * placement[side] * wander[number] * drift(2 * number + place)
            times = base * np.exp(generator.normal(0, 0.015, ITERATIONS))
            times *= np.where(generator.random(ITERATIONS) < 0.02, generator.uniform(1.2, 5, ITERATIONS), 1)
            sides[side].append((np.round(times / 0.0005) * 0.0005).tolist())
    return sides


@cache
def estimates(speedup: float, trials: int, reference_ms: float = 0.1) -> list[Any]:
    return [estimate(*simulate(seed, speedup, reference_ms)) for seed in range(trials)]


def test_a_kernel_that_is_its_reference_is_never_called_faster() -> None:
    assert sum(flags(found.low)[0] for found in estimates(1.0, 200)) == 0


def test_nor_is_a_small_one() -> None:
    assert sum(flags(found.low)[0] for found in estimates(1.0, 60, 0.0067)) == 0


def test_an_interval_nearly_always_contains_the_true_speedup() -> None:
    for speedup in (1.0, 1.2, 2.1):
        found = estimates(speedup, 60)
        assert sum(one.low <= speedup <= one.high for one in found) >= 58


@pytest.mark.parametrize(("speedup", "reference_ms"), [(1.2, 0.1), (1.35, 0.0067)])
def test_a_kernel_that_is_a_fifth_faster_or_an_operators_a_third_is_called_faster(
    speedup: float, reference_ms: float
) -> None:
    found = estimates(speedup, 60, reference_ms)
    assert sum(flags(one.low) == (True, False) for one in found) >= 58


def test_a_kernel_that_is_more_than_twice_as_fast_is_called_so() -> None:
    assert sum(flags(found.low) == (True, True) for found in estimates(2.1, 60)) >= 55


def test_a_kernel_that_is_a_little_less_than_twice_as_fast_is_not() -> None:
    assert sum(flags(found.low)[1] for found in estimates(1.98, 60)) == 0


def steady(position: int) -> float:
    """A GPU that slows down by 20 % from the first block to the last."""
    return 1 + 0.2 * position / (2 * ROUNDS - 1)


def sudden(position: int) -> float:
    """A GPU that loses a quarter of its clock in mid-measurement."""
    return 1.0 if position < ROUNDS else 1.25


@pytest.mark.parametrize("drift", [steady, sudden])
def test_drift_that_both_sides_see_cancels(drift: Callable[[int], float]) -> None:
    found = [estimate(*simulate(seed, 1.0, 1.0, drift)) for seed in range(30)]
    assert not any(flags(one.low)[0] for one in found)
    assert abs(sum(one.point for one in found) / len(found) - 1) < 0.002
    # The drift is in the times of each side, but hardly in the ratio.
    assert all(one.high / one.low < 1.07 for one in found)
    assert all(one.reference_iqr_ms > 0.05 for one in found)


def test_drift_does_not_cancel_when_one_side_always_goes_first() -> None:
    """So the test above tests the order, and not the estimate's blindness."""
    found = [estimate(*simulate(seed, 1.0, 1.0, steady, alternating=False)) for seed in range(30)]
    assert sum(one.point for one in found) / len(found) < 0.994


def test_rounds_that_disagree_widen_the_interval() -> None:
    """Twenty equal iterations say nothing about the next round."""
    calm = estimate([[1.0] * 20] * 6, [[1.0] * 20] * 6)
    rough = estimate([[1.0] * 20] * 6, [[value] * 20 for value in (0.8, 0.9, 1.0, 1.0, 1.1, 1.2)])
    assert rough.high - rough.low > 4 * (calm.high - calm.low)


def test_the_numbers_are_those_of_the_times() -> None:
    found = estimate([[2.0, 4.0, 3.0], [5.0, 3.0, 4.0]], [[1.0, 2.0, 1.5], [1.5, 1.0, 2.0]])
    assert (found.reference_ms, found.kernel_ms) == (3.5, 1.5)
    assert found.point == pytest.approx(3.5 / 1.5)
    assert (found.reference_iqr_ms, found.kernel_iqr_ms) == (iqr([2, 3, 3, 4, 4, 5]), iqr([1, 1, 1.5, 1.5, 2, 2]))
    assert iqr([1, 2, 3, 4, 5]) == 2.0
    assert found.low < found.point < found.high


def test_times_without_any_spread_are_uncertain_by_the_noise_floor() -> None:
    found = estimate([[0.2] * 5] * 4, [[0.1] * 5] * 4)
    noise = noise_floor(0.2, 0.1)
    assert noise == pytest.approx(RELATIVE_NOISE + 0.0005 * (5 + 10))
    assert (found.low, found.high) == (pytest.approx(2 / (1 + noise)), pytest.approx(2 * (1 + noise)))


def test_swapping_the_sides_inverts_the_estimate() -> None:
    reference, kernel = simulate(3, 1.5)
    there, back = estimate(reference, kernel), estimate(kernel, reference)
    assert there.point == pytest.approx(1 / back.point)
    assert there.low == pytest.approx(1 / back.high, rel=0.01)


def test_the_same_times_give_the_same_estimate_in_whatever_order_they_came() -> None:
    reference, kernel = simulate(5, 1.1)
    assert estimate(reference, kernel) == estimate([times[::-1] for times in reference], kernel)
    assert estimate(reference, kernel, seed=1) != estimate(reference, kernel, seed=2)


def test_one_round_and_one_iteration_are_enough_for_an_estimate() -> None:
    assert estimate([[2.0]], [[1.0]]).point == 2.0


@pytest.mark.parametrize(
    ("reference", "kernel"),
    [
        ([], []),
        ([[]], [[]]),
        ([[1.0]], [[1.0], [1.0]]),
        ([[1.0], [1.0, 2.0]], [[1.0], [1.0]]),
        ([[1.0]], [[0.0]]),
        ([[1.0]], [[-1.0]]),
        ([[1.0]], [[float("nan")]]),
        ([[float("inf")]], [[1.0]]),
    ],
)
def test_times_that_cannot_be_are_refused(reference: Rounds, kernel: Rounds) -> None:
    with pytest.raises(ValueError):
        estimate(reference, kernel)


def test_the_flags_stand_at_one_and_at_two() -> None:
    assert [flags(low) for low in (0.99, 1.0, 1.01, 1.99, 2.0)] == [
        (False, False),
        (False, False),
        (True, False),
        (True, False),
        (True, True),
    ]


def test_an_estimate_takes_no_time_worth_mentioning() -> None:
    """The judge makes one for every kernel; 0.01 s when nothing else runs."""
    reference, kernel = simulate(1, 1.2)
    took = []
    for _ in range(10):
        began = time.process_time()
        estimate(reference, kernel)
        took.append(time.process_time() - began)
    assert min(took) < 0.1


def test_the_same_kernel_in_two_processes_is_not_called_faster() -> None:
    """The largest ratio of 200 such pairs on an H200, and without any spread within: only the floor stands there."""
    assert not flags(estimate([[0.00521] * 5] * 4, [[0.00427] * 5] * 4).low)[0]
    assert flags(estimate([[0.00641] * 5] * 4, [[0.00427] * 5] * 4).low)[0]
