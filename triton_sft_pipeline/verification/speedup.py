"""Says how much faster a kernel is, and how sure that is, from the times of both in rounds.

Knows numbers only: nothing of GPUs, clocks and processes.

The interval is Efron and Tibshirani's percentile interval (An Introduction to the Bootstrap, 1993, chapter 13) of a
hierarchical bootstrap: rounds are drawn with replacement, then iterations within each drawn round, because iterations
of one round resemble each other more than those of two. A drawn round is drawn for both sides: they ran in it one right
after the other, so what the GPU did in that time (its clock, its heat) is in both and cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

RESAMPLES = 1000  # Efron and Tibshirani's advice for percentile intervals
CONFIDENCE = 0.95
# What the bootstrap cannot see, because it is the same in every iteration. First: two processes, with their own
# placement of memory and code, differ by up to a percent when they run the same kernel.
RELATIVE_NOISE = 0.01
# Second: CUDA documents a resolution of around half a microsecond for the time between two events. Between two
# processes it is worse: the same kernel of 4.3 us, measured against itself on an H200, came out up to 0.9 us apart.
RESOLUTION_MS = 0.001


@dataclass(frozen=True)
class Speedup:
    """How many times faster a kernel is than its reference (`point`), a 95 % interval, and each side's time."""

    point: float
    low: float
    high: float
    reference_ms: float
    reference_iqr_ms: float
    kernel_ms: float
    kernel_iqr_ms: float


def estimate(
    reference_rounds: Sequence[Sequence[float]], kernel_rounds: Sequence[Sequence[float]], seed: int = 0
) -> Speedup:
    """Estimate the speedup from milliseconds per iteration, in rounds that both sides ran one right after the other.

    Each side's time is the median of its rounds' medians, `point` is their ratio. The sides should take turns at
    going first (ABBA) in an even number of rounds: then a steady drift cancels too. The same arguments give the same
    result.

    Raises:
        ValueError: no rounds, another number of rounds on each side, rounds of one side that differ in length, or a
            time that is not a finite number above zero.
    """
    import numpy as np

    reference, kernel = _sorted_rounds(reference_rounds), _sorted_rounds(kernel_rounds)
    if len(reference) != len(kernel):
        raise ValueError(f"{len(reference)} rounds of the reference, {len(kernel)} of the kernel")
    reference_ms, kernel_ms = (float(np.median(np.median(rounds, axis=1))) for rounds in (reference, kernel))
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(reference), size=(RESAMPLES, len(reference)))
    ratios = _resampled_times(reference, drawn, generator) / _resampled_times(kernel, drawn, generator)
    tail = 50 * (1 - CONFIDENCE)
    low, high = (float(bound) for bound in np.percentile(ratios, [tail, 100 - tail]))
    noise = noise_floor(reference_ms, kernel_ms)
    point = reference_ms / kernel_ms
    return Speedup(
        point=point,
        # A percentile interval need not contain the estimate; one that is reported should.
        low=min(low, point) / (1 + noise),
        high=max(high, point) * (1 + noise),
        reference_ms=reference_ms,
        reference_iqr_ms=iqr(reference.ravel()),
        kernel_ms=kernel_ms,
        kernel_iqr_ms=iqr(kernel.ravel()),
    )


def noise_floor(reference_ms: float, kernel_ms: float) -> float:
    """By which share the ratio of two measured times may be off, however often both are measured.

    A time rounded to a step of the clock is off by half a step at most. The two errors are added, not averaged: they
    do not change from iteration to iteration, and nothing says that they have the same sign. It is 2 % for times of
    0.1 ms, 16 % for the 6.7 us of a small operator.
    """
    return RELATIVE_NOISE + RESOLUTION_MS / 2 * (1 / reference_ms + 1 / kernel_ms)


def flags(low: float) -> tuple[bool, bool]:
    """Whether a kernel is faster than its reference, and at least twice as fast, by the low end of the interval."""
    return low > 1.0, low >= 2.0


def iqr(values: Any) -> float:
    """Interquartile range, in the unit of the values."""
    import numpy as np

    lower, upper = np.percentile(values, [25, 75])
    return float(upper - lower)


def _sorted_rounds(rounds: Sequence[Sequence[float]]) -> Any:
    """Times as an array of rounds x iterations, each round in ascending order."""
    import numpy as np

    if not rounds or not rounds[0] or len({len(times) for times in rounds}) > 1:
        raise ValueError(f"no rounds of one length: {[len(times) for times in rounds]}")
    array = np.array(rounds, dtype=np.float64)
    if not (np.isfinite(array) & (array > 0)).all():
        raise ValueError("a time that is not a finite number above zero")
    return np.sort(array, axis=1)


def _resampled_times(rounds: Any, drawn: Any, generator: Any) -> Any:
    """Median of the medians of the drawn rounds for each resample, with iterations drawn anew for each round."""
    import numpy as np

    length = rounds.shape[1]
    # A round is sorted, so the median of what is drawn is at the median of the drawn places. Small integers are found
    # in a third of the time that the values themselves take.
    places = generator.integers(length, size=(*drawn.shape, length), dtype=np.uint16)
    lower, upper = (length - 1) // 2, length // 2
    places.partition((lower, upper), axis=2)
    medians = (rounds[drawn, places[:, :, lower]] + rounds[drawn, places[:, :, upper]]) / 2
    return np.median(medians, axis=1)
