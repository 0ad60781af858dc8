"""Expected values are in full float32, and a kernel may be off by about as much as PyTorch itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from triton_sft_pipeline.verification.worker.precision import allowance, full_precision


def settings() -> tuple[bool, bool]:
    import torch

    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def set_to(cudnn: bool, matmul: bool) -> None:
    import torch

    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul


@pytest.fixture(params=[(True, True), (True, False), (False, True), (False, False)])
def before(request: pytest.FixtureRequest) -> Iterator[Any]:
    mine = settings()
    set_to(*request.param)
    yield request.param
    set_to(*mine)


def test_nothing_is_computed_in_tf32_and_the_settings_come_back(before: Any) -> None:
    with full_precision():
        assert settings() == (False, False)
    assert settings() == before


def test_the_settings_come_back_after_an_error_too(before: Any) -> None:
    with pytest.raises(ArithmeticError), full_precision():
        raise ArithmeticError
    assert settings() == before


def allowed(strict: Any, usual: Any, exact: Any, dtype: str = "float32") -> float:
    import torch

    plain = getattr(torch, dtype)
    return allowance(
        torch.tensor(strict, dtype=plain), torch.tensor(usual, dtype=plain), torch.tensor(exact, dtype=torch.float64)
    )


def test_twice_the_larger_of_both_errors_is_allowed() -> None:
    assert allowed([1.0, 100.0], [1.25, 100.0], [1.0, 100.0]) == 0.5
    assert allowed([1.0, 100.25], [1.125, 100.0], [1.0, 100.0]) == 0.5
    assert allowed([1.0, 100.0], [1.0, 100.0], [1.0, 100.0]) == 0.0


def test_errors_on_either_side_count() -> None:
    assert allowed([-1.25, -100.0], [-0.875, -100.0], [-1.0, -100.0]) == 0.5


def test_an_error_of_more_than_a_hundredth_of_the_largest_value_allows_nothing() -> None:
    assert allowed([100.5], [100.0], [100.0]) == 1.0
    assert allowed([100.515625], [100.0], [100.0]) == 0.0
    assert allowed([0.5], [0.0], [0.0]) == 0.0


def test_what_overflows_or_is_no_number_is_no_error_by_itself() -> None:
    inf, nan = float("inf"), float("nan")
    assert allowed([nan, inf, 100.25], [nan, inf, 100.0], [nan, inf, 100.0]) == 0.5
    assert allowed([inf, 100.0], [65504.0, 100.0], [65504.0, 100.0]) == 0.0


def test_half_precision_is_widened_before_it_is_compared() -> None:
    assert allowed([1.0, 2048.0], [1.0, 2048.0], [1.0, 2049.0], dtype="float16") == 2.0


def test_whole_numbers_and_truth_values_are_exact() -> None:
    assert allowed([1, 100], [2, 100], [1, 100], dtype="int64") == 0.0
    assert allowed([True], [False], [True], dtype="bool") == 0.0


def test_complex_numbers_empty_tensors_and_other_shapes_allow_nothing() -> None:
    import torch

    one = torch.ones(2)
    assert allowance(torch.ones(2, dtype=torch.complex64), one, one) == 0.0
    assert allowance(torch.empty(0), torch.empty(0), torch.empty(0)) == 0.0
    for strict, usual, exact in ((one, one, torch.ones(1)), (one, torch.ones(1), one), (torch.ones(1), one, one)):
        assert allowance(100 * strict, 100.25 * usual, 100 * exact) == 0.0
