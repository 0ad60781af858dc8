"""Compares a kernel's outputs with the reference's, both as they came over the wire. Knows nothing of torch.

Tolerances are absolute and relative at once, |actual - expected| <= tolerance + tolerance * |expected|. Those of
float32, float16 and bfloat16 are KernelBench's (its `get_tolerance_for_precision`: 1e-4, 1e-2 and 1e-2). float64 gets
1e-6. Integers and booleans must be equal. The 8-bit and 4-bit floats, where one step is 6 % of a value or more, must be
equal or neighbours. Equal infinities match; an infinity and a number do not, whatever the tolerance.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.verification.verdict import Finding
from triton_sft_pipeline.verification.wire import Array, Value

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOLERANCES = {
    "float64": 1e-6,
    "float32": 1e-4,
    "float16": 1e-2,
    "bfloat16": 1e-2,
    "complex32": 1e-2,
    "complex64": 1e-4,
    "complex128": 1e-6,
}
# How numpy reads an element. What it has no type for, it reads as an unsigned integer: the code.
_STORED = {
    "bool": "u1",
    "uint8": "u1",
    "int8": "i1",
    "uint16": "<u2",
    "int16": "<i2",
    "uint32": "<u4",
    "int32": "<i4",
    "uint64": "<u8",
    "int64": "<i8",
    "float16": "<f2",
    "bfloat16": "<u2",
    "float32": "<f4",
    "float64": "<f8",
    "complex32": "<u4",
    "complex64": "<c8",
    "complex128": "<c16",
}
# The parts that one element of these is compared by.
_PARTS = {"complex32": "<f2", "complex64": "<f4", "complex128": "<f8"}
# Bits of the exponent, bits of the mantissa, and the exponent's bias.
_SMALL_FLOATS: dict[str, tuple[int, int, int]] = {
    "float8_e4m3fn": (4, 3, 7),
    "float8_e4m3fnuz": (4, 3, 8),
    "float8_e5m2": (5, 2, 15),
    "float8_e5m2fnuz": (5, 2, 16),
    "float8_e8m0fnu": (8, 0, 127),
    "float4_e2m1fn_x2": (2, 1, 1),
}
# Elements compared at a time: bounds the memory that masks and differences take, and keeps them in the cache.
_BLOCK = 1 << 17
# The longest excerpt of a kernel's own text in a sentence.
_EXCERPT = 200


def compare(expected: Value, actual: Value, slack: Sequence[float] = (), place: str = "the output") -> Finding | None:
    """The first difference between two values, or None. A list and a tuple have become the same structure.

    Args:
        expected: the reference's value, which is trusted.
        actual: the kernel's value, as `wire.receive` returned it.
        slack: an extra absolute tolerance of each array in `expected`, depth first; 0 where there is none, or where it
            is negative or not finite.
        place: what the sentence calls the value.
    """
    return _compare(expected, actual, chain(slack, repeat(0.0)), place, brief=False)


def matches(expected: Value, actual: Value, slack: Sequence[float] = ()) -> bool:
    """Whether `compare` finds no difference. Looks no further than the first one, which is seldom far."""
    return _compare(expected, actual, chain(slack, repeat(0.0)), "", brief=True) is None


def is_near_constant(values: Sequence[Value]) -> bool:
    """Whether all values agree with the first within the tolerance: outputs that do not depend on the inputs.

    Fewer than two values show nothing: False.
    """
    return len(values) > 1 and all(matches(values[0], value) for value in values[1:])


def _compare(expected: Value, actual: Value, slacks: Iterator[float], place: str, brief: bool) -> Finding | None:
    if isinstance(expected, tuple) or isinstance(actual, tuple):
        if not isinstance(expected, tuple) or not isinstance(actual, tuple) or len(expected) != len(actual):
            return _structure(expected, actual, place)
        pairs = [(f"{place}[{i}]", e, a) for i, (e, a) in enumerate(zip(expected, actual, strict=True))]
    elif isinstance(expected, dict) or isinstance(actual, dict):
        if not isinstance(expected, dict) or not isinstance(actual, dict) or expected.keys() != actual.keys():
            return _structure(expected, actual, place)
        pairs = [(f"{place}[{key!r}]", expected[key], actual[key]) for key in expected]
    else:
        return _compare_leaves(expected, actual, slacks, place, brief)
    return next((found for name, e, a in pairs if (found := _compare(e, a, slacks, name, brief))), None)


def _compare_leaves(expected: Value, actual: Value, slacks: Iterator[float], place: str, brief: bool) -> Finding | None:
    if isinstance(expected, Array):
        slack = next(slacks)
        return _compare_arrays(expected, actual, slack, place, brief)
    if isinstance(expected, float) and isinstance(actual, float | int):
        # Python numbers come from single-precision tensors more often than not: their tolerance.
        tolerance = TOLERANCES["float32"]
        return _compare_floats(_scalar(expected), _scalar(float(actual)), tolerance, 0.0, place, brief)
    if type(expected) is not type(actual):
        return _structure(expected, actual, place)
    if expected != actual:
        return Finding("incorrect_numerical", f"{place} is {_shown(actual)}, expected {_shown(expected)}.")
    return None


def _compare_arrays(expected: Array, actual: Value, slack: float, place: str, brief: bool) -> Finding | None:
    if not isinstance(actual, Array):
        return _structure(expected, actual, place)
    # Before any element is looked at: an array with strides may claim more elements than anyone can go through.
    if expected.shape != actual.shape:
        return Finding("incorrect_shape", f"{place} has shape {actual.shape}, expected {expected.shape}.")
    if expected.dtype != actual.dtype:
        return Finding("incorrect_dtype", f"{place} has dtype {actual.dtype}, expected {expected.dtype}.")
    if 0 in expected.shape:
        return None
    if expected.dtype in _SMALL_FLOATS:
        return _compare_floats(expected, actual, None, _usable(slack), place, brief)
    if expected.dtype in TOLERANCES:
        return _compare_floats(expected, actual, TOLERANCES[expected.dtype], _usable(slack), place, brief)
    return _compare_exactly(expected, actual, place, brief)


def _compare_exactly(expected: Array, actual: Array, place: str, brief: bool) -> Finding | None:
    found = _looked_through(expected, actual, functools.partial(_unequal, expected.dtype == "bool"), brief)
    if not found.wrong:
        return None
    return Finding("incorrect_numerical", f"{place} differs in {found.wrong} of {found.total} values.")


def _unequal(truth: bool, e: NDArray[Any], a: NDArray[Any]) -> _Differences:
    import numpy as np

    if truth:
        # Any byte but 0 means true.
        e, a = e != 0, a != 0
    return _Differences(e.size, int(np.count_nonzero(e != a)))


def _compare_floats(
    expected: Array, actual: Array, tolerance: float | None, slack: float, place: str, brief: bool
) -> Finding | None:
    """Compare numbers that may be off by a tolerance; with None, by one step of their format."""
    dtype = expected.dtype
    found = _looked_through(expected, actual, functools.partial(_too_far, dtype, tolerance, slack), brief)
    if found.unexpected or found.missing:
        return Finding(
            "incorrect_nan",
            f"{place} is NaN in {found.unexpected} places where the reference is not, "
            f"and not NaN in {found.missing} where it is.",
        )
    if not found.wrong:
        return None
    allowed = f"one step of {dtype}" if tolerance is None else f"{tolerance:g} (absolute and relative)"
    if slack:
        allowed += f" and {slack:.3g} for the reference's own precision"
    return Finding(
        "incorrect_numerical",
        f"{place} differs in {found.wrong} of {found.total} values by more than {allowed}; "
        f"the largest difference is {found.largest:.3g}.",
    )


def _too_far(
    dtype: str, tolerance: float | None, slack: float, expected: NDArray[Any], actual: NDArray[Any]
) -> _Differences:
    """What is different in one block of numbers."""
    import numpy as np

    if np.array_equal(expected, actual):
        return _Differences(expected.size)
    e, a = _decoded(dtype, expected), _decoded(dtype, actual)
    # The difference of two infinities, and of two numbers too far apart.
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.subtract(a, e)
        difference = np.abs(difference, out=None if np.iscomplexobj(difference) else difference)
        if tolerance is None:
            close = _neighbours(dtype, expected, actual) | (difference <= slack)
        else:
            limit = np.abs(e)
            limit *= tolerance
            limit += tolerance + slack
            close = difference <= limit
        if not np.isfinite(difference.max()):
            close &= np.isfinite(difference)
    if close.all():
        return _Differences(expected.size)
    nan_expected, nan_actual = np.isnan(e), np.isnan(a)
    different = ~(close | (e == a) | (nan_expected & nan_actual))
    return _Differences(
        expected.size,
        wrong=_count(different),
        unexpected=_count(nan_actual & ~nan_expected),
        missing=_count(nan_expected & ~nan_actual),
        largest=float(np.fmax.reduce(difference[different], axis=None, initial=0.0)),
    )


@dataclass
class _Differences:
    """How many of `total` elements are wrong, and how: NaN where a number is expected, or the reverse."""

    total: int = 0
    wrong: int = 0
    unexpected: int = 0
    missing: int = 0
    largest: float = 0.0

    def add(self, other: _Differences) -> None:
        """Count the differences of another block, too."""
        self.total += other.total
        self.wrong += other.wrong
        self.unexpected += other.unexpected
        self.missing += other.missing
        self.largest = max(self.largest, other.largest)


def _looked_through(
    expected: Array, actual: Array, look: Callable[[NDArray[Any], NDArray[Any]], _Differences], brief: bool
) -> _Differences:
    """The differences of two arrays of one shape and dtype; when brief, up to the first block with one."""
    found = _Differences()
    for e, a in zip(_blocks(expected), _blocks(actual), strict=True):
        found.add(look(e, a))
        if brief and found.wrong:
            break
    return found


def _blocks(array: Array) -> Iterator[NDArray[Any]]:
    """The elements as they are stored, in flat blocks. Copies a block at a time where they do not lie in order."""
    import numpy as np

    stored = np.dtype(_STORED.get(array.dtype, "u1"))
    strides = None if array.stride is None else tuple(step * stored.itemsize for step in array.stride)
    # Numpy checks that shape and strides stay within the data.
    elements: NDArray[Any] = np.ndarray(array.shape, stored, array.data, strides=strides)
    if elements.flags.c_contiguous:
        elements = elements.reshape(-1)
    for start in range(0, elements.size, _BLOCK):
        yield elements.flat[start : start + _BLOCK] if elements.ndim != 1 else elements[start : start + _BLOCK]


def _decoded(dtype: str, codes: NDArray[Any]) -> NDArray[Any]:
    """The values of n elements as numbers to calculate with: n of them, or n x 2 where an element has two parts."""
    import numpy as np

    if dtype in _PARTS:
        codes = np.ascontiguousarray(codes).view(_PARTS[dtype]).reshape(-1, 2)
    if dtype == "bfloat16":
        return np.asarray((codes.astype("<u4") << 16).view("<f4"))
    if dtype in _SMALL_FLOATS:
        return np.asarray(_table(dtype).take(_halves(dtype, codes), mode="clip"))
    return codes.astype("<f4") if codes.dtype == np.float16 else codes


@functools.cache
def _table(dtype: str) -> NDArray[Any]:
    """The value of every code of a small float."""
    import numpy as np

    exponent_bits, mantissa_bits, bias = _SMALL_FLOATS[dtype]
    magnitude_bits = exponent_bits + mantissa_bits
    codes = np.arange(1 << magnitude_bits)
    exponent, mantissa = codes >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits)
    values: NDArray[Any] = np.ldexp(1.0 + fraction, exponent - bias)
    if dtype == "float8_e8m0fnu":
        # Only exponents: no sign, no zero.
        values[-1] = np.nan
        return values
    values = np.where(exponent == 0, np.ldexp(fraction, 1 - bias), values)
    if dtype == "float8_e4m3fn":
        values[-1] = np.nan
    if dtype == "float8_e5m2":
        values[-4:] = np.inf, np.nan, np.nan, np.nan
    values = np.concatenate([values, -values])
    if dtype.endswith("fnuz"):
        # What would be a negative zero.
        values[1 << magnitude_bits] = np.nan
    return values


@functools.cache
def _steps(dtype: str) -> NDArray[Any]:
    """The place of every code of a small float among the format's numbers, in ascending order."""
    import numpy as np

    table = _table(dtype)
    return np.asarray(np.searchsorted(np.unique(table[np.isfinite(table)]), table), dtype=np.int16)


def _neighbours(dtype: str, expected: NDArray[Any], actual: NDArray[Any]) -> NDArray[Any]:
    """Where no other number of the format lies between the two codes'. Says nothing of infinities and NaN."""
    import numpy as np

    e, a = (_steps(dtype).take(_halves(dtype, codes), mode="clip") for codes in (expected, actual))
    return np.asarray(np.abs(e - a) <= 1)


def _halves(dtype: str, codes: NDArray[Any]) -> NDArray[Any]:
    """The codes, n of them, or n x 2 where a byte holds two: the lower half is the first."""
    import numpy as np

    return np.stack([codes & 15, codes >> 4], axis=1) if dtype == "float4_e2m1fn_x2" else codes


def _count(places: NDArray[Any]) -> int:
    """How many elements are marked in at least one of their parts."""
    import numpy as np

    return int(np.count_nonzero(places.any(axis=1) if places.ndim == 2 else places))


def _scalar(number: float) -> Array:
    return Array("float64", (), struct.pack("<d", number))


def _usable(slack: float) -> float:
    return slack if math.isfinite(slack) and slack > 0 else 0.0


def _structure(expected: Value, actual: Value, place: str) -> Finding:
    return Finding("incorrect_structure", f"{place} is {_kind(actual)}, expected {_kind(expected)}.")


def _kind(value: Value) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} values"
    if isinstance(value, dict):
        return _excerpt(f"a dictionary with the keys {sorted(map(str, value))}")
    if isinstance(value, Array):
        return f"a tensor of shape {value.shape}"
    return repr(value) if value is None else f"a {type(value).__name__}"


def _shown(value: Value) -> str:
    return _excerpt(repr(value))


def _excerpt(text: str) -> str:
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 3] + "..."
