"""Where the line between equal and different outputs runs. Torch's own comparisons are the measure."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from triton_sft_pipeline.verification import compare as module
from triton_sft_pipeline.verification.compare import TOLERANCES, compare, is_near_constant, matches
from triton_sft_pipeline.verification.verdict import Finding
from triton_sft_pipeline.verification.wire import ITEM_SIZE, Array, Value

FLOATS = list(TOLERANCES)
EXACT = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
EIGHT_BITS = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]


def wired(tensor: Any) -> Array:
    """The tensor as it comes over the wire; with strides unless it is contiguous."""
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    if tensor.is_contiguous():
        return Array(dtype, shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    span = 1 + sum((size - 1) * step for size, step in zip(shape, tensor.stride(), strict=True))
    stored = tensor.as_strided((span,), (1,)).view(torch.uint8).numpy().tobytes()
    return Array(dtype, shape, stored, tensor.stride())


def found(expected: Any, actual: Any, **options: Any) -> Finding | None:
    e, a = (wired(value) if hasattr(value, "data_ptr") else value for value in (expected, actual))
    return compare(e, a, **options)


def verdict(expected: Any, actual: Any, **options: Any) -> str:
    finding = found(expected, actual, **options)
    return "equal" if finding is None else finding.verdict


def codes(dtype: str, *numbers: int) -> Array:
    return Array(dtype, (len(numbers),), bytes(numbers))


def drawn(dtype: str, seed: int) -> tuple[Any, Any]:
    """Two tensors that differ by about the tolerance in some places, in size from tiny to large, with NaN and inf."""
    import torch

    dice = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    # Complex numbers are drawn as their parts.
    part = {"complex32": torch.float16, "complex64": torch.float32, "complex128": torch.float64}.get(dtype, kind)
    shape = (50, 8, 2) if kind.is_complex else (50, 8)
    size = 10 ** (torch.rand(shape, generator=dice, dtype=torch.float64) * 7 - 4)
    expected = (torch.randn(shape, generator=dice, dtype=torch.float64) * size).to(part)
    scale = TOLERANCES[dtype] * (0.5 + seed % 5)
    noise = torch.randn(shape, generator=dice, dtype=torch.float64) * scale * (1 + expected.double().abs())
    noise *= torch.rand(shape, generator=dice) < 0.1
    actual = (expected.double() + noise).to(part)
    places = torch.rand(shape, generator=dice)
    if seed % 2:
        for low, special in ((0.0, math.nan), (0.1, math.inf), (0.2, -math.inf)):
            expected[(places > low) & (places < low + 0.02)] = special
            actual[(places > low) & (places < low + 0.02)] = special
    if seed % 4 == 1:
        actual[(places > 0.4) & (places < 0.41)] = math.inf
    if seed % 8 == 3:
        expected[(places > 0.5) & (places < 0.51)] = -math.inf
    if seed % 10 == 7:
        actual[(places > 0.6) & (places < 0.61)] = math.nan
    if kind.is_complex:
        return torch.view_as_complex(expected), torch.view_as_complex(actual)
    return expected, actual


def torchs(expected: Any, actual: Any, tolerance: float, slack: float = 0.0) -> tuple[str, int]:
    """What a plain comparison in torch says: the verdict, and how many elements are wrong."""
    import torch

    parts = [torch.view_as_real(t) if t.is_complex() else t for t in (expected, actual)]
    e, a = (part if part.element_size() >= 4 else part.float() for part in parts)
    if not torch.equal(e.isnan(), a.isnan()):
        return "incorrect_nan", int((e.isnan() != a.isnan()).sum())
    wrong = ~torch.isclose(a, e, rtol=tolerance, atol=tolerance + slack, equal_nan=True)
    wrong = wrong.any(dim=-1) if expected.is_complex() else wrong
    return ("incorrect_numerical" if wrong.any() else "equal"), int(wrong.sum())


@pytest.mark.parametrize("dtype", FLOATS)
def test_random_tensors_are_judged_as_torch_judges_them(dtype: str) -> None:
    seen = set()
    for seed in range(40):
        expected, actual = drawn(dtype, seed)
        name, wrong = torchs(expected, actual, TOLERANCES[dtype])
        finding = found(expected, actual)
        assert (finding.verdict if finding else "equal") == name
        if name == "incorrect_numerical":
            assert finding is not None and f"differs in {wrong} of 400 values" in finding.detail
        assert verdict(expected, expected) == "equal"
        seen.add(name)
    assert seen >= {"incorrect_numerical", "incorrect_nan"}


@pytest.mark.parametrize("dtype", FLOATS)
def test_slack_widens_the_tolerance_as_torchs_absolute_one_does(dtype: str) -> None:
    names = set()
    for seed in range(0, 40, 2):
        expected, actual = drawn(dtype, seed)
        slack = TOLERANCES[dtype] * 10 ** (seed % 7)
        name, wrong = torchs(expected, actual, TOLERANCES[dtype], slack)
        finding = found(expected, actual, slack=[slack])
        assert (finding.verdict if finding else "equal") == name
        assert finding is None or f"differs in {wrong} of 400 values" in finding.detail
        names.add(name)
    assert names == {"equal", "incorrect_numerical"}


@pytest.mark.parametrize("dtype", EXACT)
def test_integers_and_booleans_must_be_equal(dtype: str) -> None:
    import torch

    kind = getattr(torch, dtype)
    for seed in range(20):
        dice = torch.Generator().manual_seed(seed)
        expected = torch.randint(0, 2 if dtype == "bool" else 100, (300,), generator=dice).to(kind)
        other = torch.randint(0, 2 if dtype == "bool" else 100, (300,), generator=dice).to(kind)
        places = torch.rand(300, generator=dice) < 0.01
        actual = torch.where(places, other, expected)
        wrong = sum(e != a for e, a in zip(expected.tolist(), actual.tolist(), strict=True))
        finding = found(expected, actual)
        assert (finding.detail if finding else "") == (f"the output differs in {wrong} of 300 values." if wrong else "")


def test_large_integers_are_not_compared_as_floats() -> None:
    import torch

    large = torch.tensor([(1 << 62) + 1])
    assert (verdict(large, large.clone()), verdict(large, large - 1)) == ("equal", "incorrect_numerical")


def test_any_byte_but_zero_is_true() -> None:
    assert compare(codes("bool", 1, 0, 1), codes("bool", 255, 0, 2)) is None
    finding = compare(codes("bool", 1, 0, 1), codes("bool", 0, 2, 2))
    assert finding is not None and "2 of 3 values" in finding.detail


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_within_the_tolerance_of_their_dtype_are_equal_and_others_are_not(dtype: str) -> None:
    import torch

    # At 1.0 the absolute and the relative part add up to twice the tolerance.
    pair = []
    for factor in (1.5, 4):
        values = torch.ones(100, dtype=torch.complex128 if "complex" in dtype else torch.float64)
        values[50] += factor * TOLERANCES[dtype]
        pair.append(values.to(getattr(torch, dtype)))
    expected = torch.ones(100, dtype=torch.float64).to(getattr(torch, dtype))
    assert [verdict(expected, actual) for actual in pair] == ["equal", "incorrect_numerical"]


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_the_codes_of_8_bit_floats_mean_what_torch_says(dtype: str) -> None:
    import numpy as np
    import torch

    every = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    np.testing.assert_array_equal(module._table(dtype), every.to(torch.float64).numpy())


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_8_bit_floats_are_equal_when_no_other_number_lies_between_them(dtype: str) -> None:
    import torch

    values = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype)).to(torch.float64).tolist()
    numbers = sorted({value for value in values if math.isfinite(value)})
    for e in range(0, 256, 5):
        for a in range(256):
            expected, actual = values[e], values[a]
            if math.isnan(expected) or math.isnan(actual):
                wanted = "equal" if math.isnan(expected) and math.isnan(actual) else "incorrect_nan"
            elif math.isinf(expected) or math.isinf(actual):
                wanted = "equal" if expected == actual else "incorrect_numerical"
            else:
                near = abs(numbers.index(expected) - numbers.index(actual)) <= 1
                wanted = "equal" if near else "incorrect_numerical"
            finding = compare(codes(dtype, e), codes(dtype, a))
            assert (finding.verdict if finding else "equal") == wanted, (expected, actual)


def test_slack_counts_for_8_bit_floats_too() -> None:
    import torch

    expected, actual = (torch.tensor([value]).to(torch.float8_e5m2) for value in (0.0, 0.125))
    assert verdict(expected, actual) == "incorrect_numerical"
    assert verdict(expected, actual, slack=[0.125]) == "equal"
    assert verdict(expected, torch.tensor([math.inf]).to(torch.float8_e5m2), slack=[1e9]) == "incorrect_numerical"


def test_both_halves_of_a_byte_of_4_bit_floats_are_compared() -> None:
    # 0, 0.5, 1, 1.5, 2, 3, 4, 6 and the same with a minus.
    assert module._table("float4_e2m1fn_x2").tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    expected = codes("float4_e2m1fn_x2", 0x35)
    assert compare(expected, codes("float4_e2m1fn_x2", 0x26)) is None
    for other in (0x15, 0x37, 0xB5, 0x3D):
        assert compare(expected, codes("float4_e2m1fn_x2", other)) is not None
    # Zero and its neighbours on both sides.
    assert compare(codes("float4_e2m1fn_x2", 0x08), codes("float4_e2m1fn_x2", 0x19)) is None


def test_every_dtype_that_travels_has_a_rule() -> None:
    assert set(ITEM_SIZE) == {*FLOATS, *EXACT, *EIGHT_BITS, "float4_e2m1fn_x2"}
    for dtype, size in ITEM_SIZE.items():
        zeros, others = Array(dtype, (2,), bytes(2 * size)), Array(dtype, (2,), b"\x41" * 2 * size)
        assert compare(zeros, zeros) is None
        assert compare(zeros, others) is not None


def test_infinities_match_by_sign_and_never_a_number() -> None:
    import torch

    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        infinite, large = torch.tensor([math.inf], dtype=dtype), torch.tensor([torch.finfo(dtype).max], dtype=dtype)
        assert verdict(infinite, infinite.clone()) == "equal"
        for expected, actual in ((infinite, -infinite), (infinite, large), (large, infinite), (-infinite, large)):
            assert verdict(expected, actual, slack=[1e300]) == "incorrect_numerical"
            # Beside other differences too.
            many = torch.zeros(3, dtype=dtype)
            assert verdict(torch.cat([many, expected]), torch.cat([many + 1e-5, actual])) == "incorrect_numerical"


def test_nan_is_counted_over_the_whole_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(module, "_BLOCK", 4)
    expected, actual = torch.zeros(20), torch.zeros(20)
    expected[[1, 2, 18]] = math.nan
    actual[[2, 7, 11]] = math.nan
    actual[3] = 5
    assert found(expected, actual) == Finding(
        "incorrect_nan",
        "the output is NaN in 2 places where the reference is not, and not NaN in 2 where it is.",
    )


def test_nan_with_other_bits_is_nan() -> None:
    import torch

    nans = torch.tensor([0x7FC00000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert verdict(nans, torch.full((3,), math.nan)) == "equal"


def test_tensors_larger_than_a_block_are_compared_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(module, "_BLOCK", 16)
    expected = torch.arange(40.0)
    actual = expected.clone()
    actual[-1] += 1
    finding = found(expected, actual)
    assert finding is not None and "differs in 1 of 40 values by more than 0.0001 (abs" in finding.detail
    assert finding.detail.endswith("the largest difference is 1.")
    assert verdict(expected.long(), actual.long()) == "incorrect_numerical"


def test_the_sentence_says_what_the_slack_was() -> None:
    import torch

    finding = found(torch.zeros(2), torch.ones(2), slack=[0.5])
    assert finding is not None
    assert "more than 0.0001 (absolute and relative) and 0.5 for the reference's own precision" in finding.detail


def test_memory_is_bounded_by_the_block() -> None:
    import numpy as np

    values = np.linspace(-1, 1, 8_000_000, dtype=np.float32)
    expected = Array("float32", (4000, 2000), values.data.cast("B"))
    # Transposed, so that neither is read in the order in which it lies.
    turned = Array("float32", (2000, 4000), (values + np.float32(1e-5)).data.cast("B"), (1, 2000))
    assert compare(expected, expected) is None
    tracemalloc.start()
    try:
        assert compare(Array("float32", (2000, 4000), expected.data, (1, 2000)), turned) is None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < values.nbytes / 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "int64", "bool", "float8_e5m2"])
def test_how_a_tensor_lies_in_memory_makes_no_difference(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(module, "_BLOCK", 7)
    raw = torch.randint(0, 2, (6, 5, 4), generator=torch.Generator().manual_seed(1)) * 50
    tensor = raw.to(torch.float32).to(getattr(torch, dtype))
    for view in (tensor.permute(2, 0, 1), tensor[::2, 1:, ::3], tensor[:, :, :1].expand(6, 5, 4), tensor[1, :, 2]):
        flat = view.contiguous()
        assert wired(view).stride is not None
        assert compare(wired(view), wired(flat)) is None and compare(wired(flat), wired(view)) is None
        other = flat.view(torch.uint8).clone()
        other.view(-1)[-1] ^= 1 if dtype == "bool" else 65
        assert verdict(view, other.view(flat.dtype)) == "incorrect_numerical"


def test_an_array_that_claims_endless_elements_costs_nothing() -> None:
    endless = Array("float32", (1 << 40,), bytes(4), (0,))
    assert compare(Array("float32", (2,), bytes(8)), endless) is not None


def test_empty_tensors_of_one_shape_are_equal() -> None:
    import torch

    assert verdict(torch.empty(0, 3), torch.empty(0, 3)) == "equal"
    assert verdict(torch.empty(0, 3), torch.empty(3, 0)) == "incorrect_shape"
    assert compare(Array("int8", (0, 3), b""), Array("int8", (0, 3), b"", (9, 9))) is None


def test_shapes_and_dtypes_must_be_the_references() -> None:
    import torch

    # Broadcastable, and equal after a conversion: both are wrong all the same.
    assert found(torch.zeros(2, 1), torch.zeros(1)) == Finding(
        "incorrect_shape", "the output has shape (1,), expected (2, 1)."
    )
    assert found(torch.zeros(2), torch.zeros(2).half()) == Finding(
        "incorrect_dtype", "the output has dtype float16, expected float32."
    )
    assert verdict(torch.tensor(0.0), torch.tensor([0.0])) == "incorrect_shape"
    assert verdict(torch.tensor(2.0), torch.tensor(2.0)) == "equal"


def test_the_sentence_names_the_place_in_a_nested_output() -> None:
    import torch

    finding = compare(({"a": wired(torch.zeros(2))},), ({"a": wired(torch.zeros(3))},))
    assert finding is not None and finding.detail.startswith("the output[0]['a'] has shape (3,)")
    finding = compare((1, ("a", 2)), (1, ("a", 3)), place="input 1")
    assert finding == Finding("incorrect_numerical", "input 1[1][1] is 3, expected 2.")


def test_a_number_and_a_tensor_are_different_structures() -> None:
    import torch

    assert verdict(1.0, torch.tensor(1.0)) == "incorrect_structure"
    assert verdict(torch.tensor(1.0), 1.0) == "incorrect_structure"
    assert verdict({"a": 1}, {"b": 1}) == "incorrect_structure"


@pytest.mark.parametrize(
    ("expected", "actual", "wanted"),
    [
        (1.0, 1.00001, "equal"),
        (1.0, 1.01, "incorrect_numerical"),
        (2.0, 2, "equal"),
        (math.nan, math.nan, "equal"),
        (1.0, math.nan, "incorrect_nan"),
        (math.inf, math.inf, "equal"),
        (math.inf, 1e308, "incorrect_numerical"),
        (1, 1, "equal"),
        (1, 2, "incorrect_numerical"),
        (1, 1.0, "incorrect_structure"),
        (1, True, "incorrect_structure"),
        (None, None, "equal"),
        (None, 0, "incorrect_structure"),
        ("a", "b", "incorrect_numerical"),
        ((), (), "equal"),
        ((), {}, "incorrect_structure"),
        ((1,), (1, 2), "incorrect_structure"),
        ((1,), 1, "incorrect_structure"),
        ({}, None, "incorrect_structure"),
        ({"a": 1, 2: "b"}, {2: "b", "a": 1}, "equal"),
        ({"1": 1}, {1: 1}, "incorrect_structure"),
    ],
)
def test_other_values_are_equal_by_kind_and_value(expected: Value, actual: Value, wanted: str) -> None:
    assert verdict(expected, actual) == wanted


def test_slack_belongs_to_the_arrays_in_their_order() -> None:
    import torch

    zero, half = wired(torch.zeros(2)), wired(torch.full((2,), 0.5))
    expected: Value = (1.0, {"b": zero, "a": (zero, "text")}, zero)
    for place, slack in enumerate(([1.0], [0.0, 1.0], [0.0, 0.0, 1.0])):
        arrays = [half if at == place else zero for at in range(3)]
        # The keys' order in the kernel's dictionary does not matter.
        actual: Value = (1.0, {"a": (arrays[1], "text"), "b": arrays[0]}, arrays[2])
        assert compare(expected, actual, slack) is None
        assert compare(expected, actual) is not None
        for other in ([], [0.4] * 3, [1.0 - value for value in slack], [math.nan] * 3, [math.inf] * 3, [-9.0] * 3):
            assert compare(expected, actual, other) is not None


def test_a_kernels_own_text_is_cut_short() -> None:
    for expected, actual in (("a", "b" * 10_000), ({"a": 1}, {"b" * 10_000: 1}), ("a" * 10_000, "b")):
        finding = compare(expected, actual)  # type: ignore[arg-type]
        assert finding is not None and len(finding.detail) < 500


def test_outputs_that_do_not_depend_on_the_inputs_are_near_constant() -> None:
    import torch

    first, near, far = (wired(torch.full((3,), value)) for value in (1.0, 1.00005, 1.1))
    assert is_near_constant([first, near, first])
    assert is_near_constant([(first, 1), (near, 1)])
    assert not is_near_constant([first, near, far])
    assert not is_near_constant([(first, first), (near, far)])
    assert not is_near_constant([wired(torch.zeros(2)), wired(torch.zeros(3))])


def test_one_output_shows_nothing_about_the_inputs() -> None:
    assert not is_near_constant([]) and not is_near_constant([1.0])


@pytest.mark.parametrize("place", [0, 7, 1 << 17, (1 << 18) + 4])
@pytest.mark.parametrize("value", [math.nan, math.inf, 3.0])
def test_a_difference_anywhere_keeps_two_values_from_matching(place: int, value: float) -> None:
    right = np.ones((1 << 18) + 5, dtype="float32")
    wrong = right.copy()
    wrong[place] = value
    for expected, actual in ((right, wrong), (wrong, right)):
        given = Array("float32", right.shape, expected.tobytes()), Array("float32", right.shape, actual.tobytes())
        assert compare(*given) is not None and not matches(*given)
    same = Array("float32", right.shape, wrong.tobytes())
    assert compare(same, same) is None and matches(same, Array("float32", right.shape, wrong.tobytes()))


def test_matching_looks_no_further_than_the_first_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, too_far = list[int](), module._too_far

    def watched(*arguments: Any) -> Any:
        looked.append(1)
        return too_far(*arguments)

    monkeypatch.setattr(module, "_too_far", watched)
    size = 1 << 19
    ones, zeros = (Array("float32", (size,), np.full(size, value, "float32").tobytes()) for value in (1.0, 0.0))
    assert not matches(ones, zeros) and len(looked) == 1
    assert compare(ones, zeros) is not None and len(looked) == 5


def test_slack_and_structure_count_for_matching_too() -> None:
    one, more = (Array("float32", (1,), np.array([value], dtype="float32").tobytes()) for value in (1.0, 1.1))
    assert matches((one,), (more,), (0.2,)) and not matches((one,), (more,))
    assert not matches((one,), one) and not matches({"a": one}, {"b": one}) and matches({"a": one}, {"a": one})
