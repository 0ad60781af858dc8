"""Where the line between equal and different outputs runs."""

from __future__ import annotations

from typing import Any

import pytest

from triton_sft_pipeline.verification.compare import TOLERANCES, compare


def verdict(expected: Any, actual: Any) -> str:
    found = compare(expected, actual)
    return "equal" if found is None else found.verdict


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_values_within_the_tolerance_of_their_dtype_are_equal_and_others_are_not(dtype: str) -> None:
    import torch

    expected = torch.ones(100, dtype=getattr(torch, dtype))
    tolerance = TOLERANCES[dtype]
    # At 1.0 the absolute and the relative part add up to twice the tolerance.
    near, far = expected.clone(), expected.clone()
    near[50] += 1.5 * tolerance
    far[50] += 4 * tolerance
    assert (verdict(expected, near), verdict(expected, far)) == ("equal", "incorrect_numerical")


def test_tensors_larger_than_a_block_are_compared_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("triton_sft_pipeline.verification.compare._BLOCK", 16)
    expected = torch.arange(40.0)
    actual = expected.clone()
    actual[-1] += 1
    found = compare(expected, actual)
    assert found is not None and "1 of 40 values" in found.detail and "largest difference is 1" in found.detail


def test_infinities_are_equal_by_sign() -> None:
    import torch

    infinite = torch.tensor([float("inf")])
    assert (verdict(infinite, infinite.clone()), verdict(infinite, -infinite)) == ("equal", "incorrect_numerical")


def test_empty_tensors_of_one_shape_are_equal() -> None:
    import torch

    assert verdict(torch.empty(0, 3), torch.empty(0, 3)) == "equal"
    assert verdict(torch.empty(0, 3), torch.empty(3, 0)) == "incorrect_shape"


def test_the_sentence_names_the_place_in_a_nested_output() -> None:
    import torch

    found = compare(({"a": torch.zeros(2)},), ({"a": torch.zeros(3)},))
    assert found is not None and found.detail.startswith("the output[0]['a'] has shape (3,)")


def test_a_number_and_a_tensor_are_different_structures() -> None:
    import torch

    assert verdict(1.0, torch.tensor(1.0)) == "incorrect_structure"
    assert verdict(1.0, 1.00001) == "equal"
    assert verdict(1, 2) == "incorrect_numerical"
    assert verdict({"a": 1}, {"b": 1}) == "incorrect_structure"


def test_a_tensor_without_values_is_no_output() -> None:
    import torch

    assert verdict(torch.zeros(2), torch.zeros(2, device="meta")) == "lazy_output"
