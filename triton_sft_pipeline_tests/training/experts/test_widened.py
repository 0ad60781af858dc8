"""Weights that have the adapter's second factors beside them give what the weights alone and a product more give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from triton_sft_pipeline.training.experts import math
from triton_sft_pipeline.training.experts.math import Factors, route
from triton_sft_pipeline.training.fast import ops
from triton_sft_pipeline_tests.training.experts.test_math import EXPERTS, IDLE, assert_close, new_input


@pytest.mark.parametrize(
    ("dtype", "device"),
    [
        (torch.float32, "cpu"),
        (torch.float64, "cpu"),
        (torch.bfloat16, "cpu"),
        pytest.param(
            torch.bfloat16,
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")],
        ),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [2, 3, 8, 64])
def test_weights_widened_by_b_give_what_separate_products_give(
    rank: int, dropout: float, dtype: torch.dtype, device: str
) -> None:
    hidden, inner, tokens = 40, 24, 13
    torch.manual_seed(4)

    def made(*shape: int) -> Tensor:
        return (0.3 * torch.randn(EXPERTS, *shape)).to(device, dtype)

    w1, w2 = made(2 * inner, hidden), made(hidden, inner)
    first = Factors(made(rank, hidden), made(2 * inner, rank), 1.5, dropout, 3)
    second = Factors(made(rank, inner), made(hidden, rank), 0.5, dropout, 4)
    x, index, weights = (tensor.to(device) for tensor in new_input(dtype, tokens, hidden))
    routes, grad, more = route(index, EXPERTS), torch.randn_like(x), torch.randn_like(x)
    results = []
    for wide in (False, True):
        one, two = (_widened(w1, first), _widened(w2, second)) if wide else (w1, w2)
        assert (one.shape[-1] > hidden) == wide
        u, t, dropped = math.up_again(x, routes, one, first)
        assert torch.equal(math.up(x, routes, one, first)[0], u)
        out = math.down(u, weights, routes, two, second, add=more)
        du, *others = math.down_backward(grad, u, weights, routes, two, second)
        gradients_of_up = math.up_backward(du, x, routes, one, first, t, dropped)
        for mine, gathered in zip(gradients_of_up, math.up_backward(du, x, routes, one, first, t), strict=True):
            assert torch.equal(mine, gathered)
        results.append([u, t, dropped, out, du, *others, *gradients_of_up])
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.03}[dtype]
    for plain, together in zip(*results, strict=True):
        assert_close(together, plain, tolerance)
    assert not any(results[1][place][IDLE].any() for place in (6, 7, 9, 10))


def _widened(weight: Tensor, factors: Factors) -> Tensor:
    """In memory that holds no numbers so far."""
    width, rank = weight.shape[-1], factors.b.shape[-1]
    columns, pitch = math.widened(width, rank, weight.dtype)
    wide = weight.new_full((*weight.shape[:-1], pitch), torch.nan)[..., :columns]
    wide[..., :width] = weight
    ops.fill_b(factors.b, wide[..., width:])
    return wide


def test_rows_of_a_widened_weight_are_whole_lines_of_the_cache() -> None:
    assert math.widened(2048, 8, torch.bfloat16) == (2056, 2112)
    assert math.widened(1024, 64, torch.bfloat16) == (1088, 1088)
    assert math.widened(64, 3, torch.bfloat16) == (72, 128)
    assert math.widened(64, 2, torch.float32) == (68, 96)
    assert math.widened(72, 0, torch.bfloat16) == (72, 72)
