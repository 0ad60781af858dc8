"""The plain twins against the stock model and autograd, and every kernel against its twin in Triton's interpreter."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor
from transformers.models.afmoe.configuration_afmoe import AfmoeConfig
from transformers.models.afmoe.modeling_afmoe import AfmoeRMSNorm, AfmoeTokenChoiceRouter, apply_rotary_pos_emb

from triton_sft_pipeline.training.fast import (
    kernels_blocks,
    kernels_factors,
    kernels_moe,
    kernels_nf4,
    kernels_norm,
    kernels_rows,
    ops,
)
from triton_sft_pipeline_tests.training.fast.kernel_cases import CASES, SMALL

EPS = 1e-5


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(mine: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


def gradients(outputs: Tensor, inputs: list[Tensor], by: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, by)


# -- norms ---------------------------------------------------------------------------------------------------------


def stock_norm(weight: Tensor) -> AfmoeRMSNorm:
    norm = AfmoeRMSNorm(weight.shape[0], EPS)
    norm.weight.data = weight
    return norm


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    """The stock norm in float64, where the module itself would go down to float32."""
    return weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_the_stock_models_to_the_bit(dtype: torch.dtype) -> None:
    x, weight = normal(7, 64, dtype=dtype), normal(64, seed=1, dtype=dtype)
    assert torch.equal(ops.rms_norm(x, weight, EPS)[0], stock_norm(weight)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_with_its_residual_and_the_next_norm_round_where_the_stock_model_rounds(dtype: torch.dtype) -> None:
    branch, rest = normal(7, 64, dtype=dtype), normal(7, 64, seed=1, dtype=dtype)
    w1, w2 = normal(64, seed=2, dtype=dtype), normal(64, seed=3, dtype=dtype)
    expected = rest + stock_norm(w1)(branch)
    total, y, rstd_branch, rstd_sum = ops.norm_add_norm(branch, w1, rest, w2, EPS)
    assert torch.equal(total, expected)
    assert torch.equal(y, stock_norm(w2)(expected))
    alone = ops.norm_add(branch, w1, rest, EPS)
    assert torch.equal(alone[0], expected) and torch.equal(alone[1], rstd_branch)
    assert torch.equal(rstd_sum, ops.rms_norm(expected, w2, EPS)[1])


def test_the_gradient_of_the_norm_is_autograds() -> None:
    x, weight, dy, add = (
        normal(7, 64).requires_grad_(),
        normal(64, seed=1),
        normal(7, 64, seed=2),
        normal(7, 64, seed=3),
    )
    (expected,) = gradients(exact_norm(x, weight), [x], dy)
    rstd = ops.rms_norm(x.detach(), weight, EPS)[1]
    same(ops.rms_norm_backward(dy, x.detach(), weight, rstd), expected)
    same(ops.rms_norm_backward(dy, x.detach(), weight, rstd, add), expected + add)


def test_the_heads_are_normalised_and_rotated_as_in_the_stock_model_with_its_gradient() -> None:
    heads, kv, size, rows = 4, 2, 16, 5
    qkv = normal(rows, (2 * heads + 2 * kv) * size).requires_grad_()
    wq, wk = normal(size, seed=1), normal(size, seed=2)
    angles = normal(rows, size // 2, seed=3).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    q = exact_norm(qkv[:, : heads * size].unflatten(1, (heads, size)), wq)
    k = exact_norm(qkv[:, heads * size : (heads + kv) * size].unflatten(1, (kv, size)), wk)
    rotated = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)
    for (eq, ek), table in (((q, k), (None, None)), (rotated, (cos, sin))):
        mine = ops.qk_norm_rope(qkv.detach(), wq, wk, EPS, *table, heads, kv, size)
        same(mine[0], eq.detach())
        same(mine[1], ek.detach())
        dq, dk = normal(*eq.shape, seed=4), normal(*ek.shape, seed=5)
        (expected,) = torch.autograd.grad([eq, ek], [qkv], [dq, dk], retain_graph=True)
        out = torch.full_like(qkv, 3.0)
        ops.qk_norm_rope_backward(dq, dk, qkv.detach(), wq, wk, *mine[2:], *table, out)
        same(out[:, : (heads + kv) * size], expected[:, : (heads + kv) * size])
        assert (out[:, (heads + kv) * size :] == 3.0).all(), "columns that are not its own"


# -- gates ---------------------------------------------------------------------------------------------------------


def test_the_gate_and_its_gradients_are_autograds_on_a_view_of_columns() -> None:
    o, wide, dy = normal(5, 32).requires_grad_(), normal(5, 96, seed=1).requires_grad_(), normal(5, 32, seed=2)
    y = o * torch.sigmoid(wide[:, 40:72])
    same(ops.gate_mul(o.detach(), wide.detach()[:, 40:72]), y.detach())
    do, dwide = gradients(y, [o, wide], dy)
    out = torch.zeros_like(dwide)
    same(ops.gate_mul_backward(dy, o.detach(), wide.detach()[:, 40:72], out[:, 40:72]), do)
    same(out, dwide)


def test_a_gate_with_dropout_behind_it_and_its_gradients_are_autograds() -> None:
    o, gate = normal(5, 32).requires_grad_(), normal(5, 32, seed=1).requires_grad_()
    dy, extra = normal(5, 32, seed=2), normal(5, 32, seed=3)
    y = o * torch.sigmoid(gate)
    mask = (ops.dropout(torch.ones_like(dy), 0.3, 9) > 0).double()
    whole, dropped = ops.gate_mul_dropout(o.detach(), gate.detach(), 0.3, 9)
    assert whole is not None
    same(whole, y.detach())
    same(dropped, (mask * y / 0.7).detach())
    alone = ops.gate_mul_dropout(o.detach(), gate.detach(), 0.3, 9, both=False)
    assert alone[0] is None and torch.equal(alone[1], dropped)
    expected = torch.autograd.grad((y * dy + mask * y / 0.7 * extra).sum(), [o, gate])
    out = torch.zeros(5, 32, dtype=torch.float64)
    same(ops.gate_mul_dropout_backward(dy, extra, o.detach(), gate.detach(), out, 0.3, 9), expected[0])
    same(out, expected[1])


def test_swiglu_and_its_gradients_are_autograds_with_and_without_a_weight_for_each_row() -> None:
    u, dh, weight = normal(6, 64).requires_grad_(), normal(6, 32, seed=1), normal(6, seed=2).requires_grad_()
    h = torch.nn.functional.silu(u[:, :32]) * u[:, 32:]
    same(ops.swiglu(u.detach()), h.detach())
    du, again, drow = ops.swiglu_backward(dh, u.detach())
    same(du, torch.autograd.grad(h, [u], dh, retain_graph=True)[0])
    same(again, h.detach())
    assert drow is None
    expected = gradients(h * weight[:, None], [u, weight], dh)
    du, _, drow = ops.swiglu_backward(dh, u.detach(), weight.detach())
    assert drow is not None
    same(du, expected[0])
    same(drow, expected[1])


def test_swiglu_adds_in_place_first() -> None:
    u, add = normal(6, 64), normal(6, 64, seed=1)
    total = u + add
    same(ops.swiglu(u, add), ops.swiglu(total))
    same(u, total)


def test_swiglu_and_dropout_in_one_are_both_in_turn() -> None:
    u = normal(6, 64)
    out = torch.zeros(6, 40, dtype=u.dtype)[:, :32]
    h, dropped = ops.swiglu_dropout(u, 0.3, 9, out)
    assert h.data_ptr() == out.data_ptr()
    assert torch.equal(out, ops.swiglu(u))
    assert torch.equal(ops.swiglu(u, out=out), ops.swiglu(u))
    assert torch.equal(dropped, ops.dropout(h, 0.3, 9))


def test_gradients_of_swiglu_with_dropout_behind_it_are_autograds() -> None:
    u, weight = normal(6, 64).requires_grad_(), normal(6, seed=2).requires_grad_()
    dh, extra = normal(6, 32, seed=1), normal(6, 32, seed=3)
    h = torch.nn.functional.silu(u[:, :32]) * u[:, 32:]
    mask = (ops.dropout(torch.ones_like(dh), 0.3, 9) > 0).double()
    outputs = weight[:, None] * (h * dh + 0.5 * mask * h / 0.7 * extra)
    expected = torch.autograd.grad(outputs.sum(), [u, weight], retain_graph=True)
    du, dropped, drow = ops.swiglu_dropout_backward(dh, extra, u.detach(), weight.detach(), 0.3, 9, 0.5)
    same(du, expected[0])
    same(dropped, (mask * h / 0.7).detach())
    same(drow, expected[1])
    du, again, none = ops.swiglu_dropout_backward(dh, extra, u.detach(), None, 0.3, 9, 0.5)
    same(du, torch.autograd.grad((h * dh + 0.5 * mask * h / 0.7 * extra).sum(), [u])[0])
    assert none is None and torch.equal(again, dropped)


# -- rows ----------------------------------------------------------------------------------------------------------


def test_dropout_keeps_its_share_scales_the_rest_and_depends_on_the_seed_alone() -> None:
    x = torch.ones(500, 96)
    kept = ops.dropout(x, 0.05, 7)
    assert (kept == 0).float().mean().item() == pytest.approx(0.05, abs=0.003)
    assert kept.max().item() == pytest.approx(1 / 0.95)
    assert torch.equal(kept, ops.dropout(x, 0.05, 7))
    assert not torch.equal(kept, ops.dropout(x, 0.05, 8))
    same(ops.dropout(x, 0.05, 7, add=x, scale=0.5), kept * 0.5 + 1)
    assert torch.equal(ops.dropout(x, 0.0, 7), x)


@pytest.mark.parametrize("seed", [7, 2**31 - 1, 2**40 + 3])
def test_a_seed_in_a_tensor_gives_the_mask_of_the_number(seed: int) -> None:
    x, index = torch.ones(9, 40), torch.tensor([3, 3, 0])
    for stored in (torch.tensor(seed), torch.tensor([seed])):
        assert torch.equal(ops.dropout(x, 0.5, stored), ops.dropout(x, 0.5, seed))
        assert torch.equal(ops.gather(x, index, 0.5, stored)[1], ops.gather(x, index, 0.5, seed)[1])


@pytest.mark.parametrize("seed", [torch.tensor([1, 2]), torch.tensor([1], dtype=torch.int32)])
def test_a_seed_that_is_not_one_int64_is_refused(seed: Tensor) -> None:
    with pytest.raises(ValueError, match="a seed is one int64"):
        ops.dropout(torch.ones(2, 8), 0.5, seed)


def test_neither_rows_nor_columns_nor_seeds_share_their_masks() -> None:
    mask = (ops.dropout(torch.ones(64, 512), 0.5, 3) > 0).double() - 0.5
    other = (ops.dropout(torch.ones(64, 512), 0.5, 4) > 0).double() - 0.5
    assert torch.corrcoef(mask).fill_diagonal_(0).abs().max() < 0.25  # 512 draws: a standard deviation is 0.044
    assert torch.corrcoef(mask.T).fill_diagonal_(0).abs().max() < 0.75  # 64 draws: 0.125
    assert abs((mask * other).mean().item() * 4) < 0.03


def test_the_random_numbers_are_philox() -> None:
    """Known answer of the ten-round generator, from the authors' test vectors: counter and key of zeros."""
    from triton_sft_pipeline.training.fast.twins import _philox

    words = _philox(0, torch.zeros(1, dtype=torch.int64), rounds=10)
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_a_probability_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="dropout probability"):
        ops.dropout(torch.ones(2, 8), p, 1)


def test_gathered_rows_are_dropped_with_the_mask_of_dropout() -> None:
    x, index = normal(5, 64), torch.tensor([3, 3, 0, 4, 1, 2, 2])
    assert torch.equal(ops.gather(x, index), x[index])
    rows, dropped = ops.gather(x, index, p=0.3, seed=9)
    assert torch.equal(rows, x[index])
    assert torch.equal(dropped, ops.dropout(x[index], 0.3, 9))
    for p in (0.0, 0.3):
        wide = torch.zeros(7, 80, dtype=x.dtype)
        ops.gather(x, index, p, 9, wide[:, :64])
        assert torch.equal(wide[:, :64], x[index]) and not wide[:, 64:].any()


def test_combining_is_the_weighted_sum_over_the_choices_of_a_token() -> None:
    y, y2, add = normal(20, 64), normal(20, 64, seed=1), normal(10, 64, seed=2)
    inverse = torch.randperm(20, generator=torch.Generator().manual_seed(0)).view(10, 2)
    weights = normal(10, 2, seed=3).abs()
    expected = (y[inverse] * weights[..., None]).sum(1)
    same(ops.combine(y, inverse, weights), expected)
    same(ops.combine(y, inverse, weights, add), expected + add)
    same(ops.combine(y, inverse, None, y2=y2, scale2=0.25), (y + 0.25 * y2)[inverse].sum(1))
    same(ops.combine_dropout(y, inverse, y2, 0.3, 9), (y + ops.dropout(y2, 0.3, 9))[inverse].sum(1))


# -- routing -------------------------------------------------------------------------------------------------------


def test_the_router_chooses_and_weighs_as_the_stock_one_and_its_gradient_is_autograds() -> None:
    config = AfmoeConfig(hidden_size=16, num_experts=8, num_experts_per_tok=3, route_scale=2.826)
    stock = AfmoeTokenChoiceRouter(config)
    x, bias = normal(9, 16, dtype=torch.float32), normal(8, seed=1, dtype=torch.float32)
    logits, weights, index = stock(x[None], bias)
    mine = ops.router(logits.detach(), bias, 3, 2.826)
    assert torch.equal(mine[1], index)
    torch.testing.assert_close(mine[0], weights.detach())
    grad = normal(9, 3, seed=2, dtype=torch.float32)
    scores = torch.sigmoid(wide := logits.detach().double().requires_grad_()).gather(1, index)
    (expected,) = gradients(scores / scores.sum(-1, keepdim=True) * 2.826, [wide], grad.double())
    same(ops.router_backward(grad.double(), wide.detach(), index, 2.826), expected)


def test_of_equal_scores_the_lower_experts_are_chosen() -> None:
    assert ops.router(torch.zeros(2, 8), torch.zeros(8), 3, 1.0)[1].tolist() == [[0, 1, 2]] * 2


def test_routes_are_sorted_stably_with_the_way_back_and_the_ends_of_every_expert() -> None:
    index = torch.tensor([[3, 0], [0, 3], [5, 3]])
    order, inverse, tokens, offsets = ops.sort_routes(index, 6)
    assert order.tolist() == [1, 2, 0, 3, 5, 4]
    assert tokens.tolist() == [0, 1, 0, 1, 2, 2]
    assert torch.equal(order[inverse.view(-1)], torch.arange(6))
    assert offsets.tolist() == [2, 2, 2, 5, 5, 6] and offsets.dtype == torch.int32


# -- experts' adapters ---------------------------------------------------------------------------------------------


def test_second_factors_go_beside_the_weights_and_back_into_pefts_layout() -> None:
    stored = normal(5, 3 * 4)
    beside = torch.full((4, 5, 9), 7.0, dtype=torch.float64)
    ops.fill_b(stored.view(5, 3, 4).permute(2, 0, 1), beside[..., 4:8])
    for expert in range(4):
        assert torch.equal(beside[expert, :, 4:7], stored[:, expert::4])
    assert (beside[..., 7] == 0).all() and (beside[..., [0, 1, 2, 3, 8]] == 7).all()
    assert torch.equal(ops.join_b(beside[..., 4:7]), stored)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_with_factors_are_one_product_an_expert(dtype: torch.dtype) -> None:
    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    x, t = normal(7, 8, dtype=dtype), normal(7, 4, seed=1, dtype=dtype)
    a, wide = normal(4, 4, 8, seed=2, dtype=dtype), torch.zeros(7, 16, dtype=dtype)
    rows = [slice(0, 0), slice(0, 3), slice(3, 3), slice(3, 7)]
    near = {"rtol": 1e-5, "atol": 1e-5}
    shrunk = torch.cat([0.5 * x[at] @ one.t() for at, one in zip(rows, a, strict=True)])
    torch.testing.assert_close(ops.shrink(x, a.transpose(1, 2), offsets, 0.5), shrunk, **near)
    assert ops.shrink(x, a.transpose(1, 2), offsets, 0.5, wide[:, 4:8]).data_ptr() == wide[:, 4:8].data_ptr()
    torch.testing.assert_close(wide[:, 4:8], shrunk, **near)
    assert not wide[:, :4].any() and not wide[:, 8:].any()
    expanded = torch.cat([t[at] @ one for at, one in zip(rows, a, strict=True)])
    torch.testing.assert_close(ops.expand(t, a, offsets), expanded, **near)
    summed = torch.stack([x[at].t() @ t[at] for at in rows])
    torch.testing.assert_close(ops.outer(x, t, offsets), summed, **near)
    torch.testing.assert_close(ops.outer(t, x, offsets), summed.transpose(1, 2), **near)


# -- four bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_weights_come_back_as_bitsandbytes_gives_them(quant_type: str, double: bool, dtype: torch.dtype) -> None:
    weight = normal(96, 192, dtype=dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=double)
    nested, offset = (state.state2.absmax, state.offset) if double else (None, None)
    out = torch.empty(96, 256, dtype=dtype)[:, :192]
    assert ops.dequantize(codes, state.absmax, nested, offset, quant_type, out) is out
    assert torch.equal(out, bnb.dequantize_4bit(codes, state))


# -- kernels -------------------------------------------------------------------------------------------------------


def test_the_switch_and_the_device_decide_about_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        is_cuda = True
        dtype = torch.bfloat16

    on_cuda: Tensor = OnCuda()  # type: ignore[assignment]
    assert not ops.use_triton(torch.zeros(1))
    assert ops.use_triton(on_cuda)
    monkeypatch.setenv("TRITON_SFT_PLAIN", "1")
    assert not ops.use_triton(on_cuda) and ops.plain()


def kernel_cases(what: str, environment: dict[str, str]) -> dict[str, str]:
    run = subprocess.run(
        [sys.executable, "-m", "triton_sft_pipeline_tests.training.fast.kernel_cases", what],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, str] = json.loads(run.stdout)
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """Every case once, in a process of its own: the interpreter has to be chosen before Triton is imported."""
    return kernel_cases("interpret", {"TRITON_INTERPRET": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("size", range(len(SMALL)))
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_computes_what_its_twin_does(interpreted: dict[str, str], case: str, size: int) -> None:
    assert interpreted[f"{case}-{size}"] == ""


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h100_at_the_models_sizes(tmp_path: Path) -> None:
    found = kernel_cases("compile", {"TRITON_CACHE_DIR": str(tmp_path)})
    assert not [failure for failure in found.values() if failure]
    kernels = (kernels_blocks, kernels_factors, kernels_moe, kernels_nf4, kernels_norm, kernels_rows)
    launched = {
        name
        for module in kernels
        for name, value in vars(module).items()
        if f"    {name}[" in inspect.getsource(module)
    }
    assert launched <= set(found) and len(launched) >= 25
