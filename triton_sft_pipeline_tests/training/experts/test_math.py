"""What the experts compute is what the architecture's own experts compute on the same numbers, with their gradients."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from triton_sft_pipeline.training.experts import math
from triton_sft_pipeline.training.experts.math import Factors, Routes, experts, route
from triton_sft_pipeline.training.experts.module import PROJECTIONS, ExpertStorage, PackedExperts
from triton_sft_pipeline.training.fast import ops
from triton_sft_pipeline.training.fast.products import grouped
from triton_sft_pipeline_tests.training.experts.packed import pack_in_place

EXPERTS, CHOSEN, HIDDEN, INTERMEDIATE, RANK, TOKENS = 8, 2, 64, 64, 2, 40
IDLE = 3
"""An expert that no token chooses."""


def new_experts(dtype: torch.dtype = torch.float32, *, packed: bool = False, hidden: int = HIDDEN) -> PackedExperts:
    storage = ExpertStorage(compute_dtype=dtype)
    module = PackedExperts(EXPERTS, hidden, hidden, torch.nn.SiLU(), storage)
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.1)
    if packed:
        pack_in_place(module)
    return module


def stock_experts(module: PackedExperts, implementation: str = "grouped_mm") -> Any:
    """transformers' own experts, with the numbers that those of `module` stand for."""
    from transformers import AfmoeConfig
    from transformers.models.afmoe.modeling_afmoe import AfmoeExperts

    config = AfmoeConfig(
        hidden_size=module.hidden_dim,
        moe_intermediate_size=module.intermediate_dim,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
    )
    config._experts_implementation = implementation
    stock = AfmoeExperts(config)
    for name in PROJECTIONS:
        setattr(stock, name, torch.nn.Parameter(module.weight(name).clone(), requires_grad=False))
    return stock


def new_input(dtype: torch.dtype = torch.float32, tokens: int = TOKENS, hidden: int = HIDDEN) -> tuple[Tensor, ...]:
    """x, each token's experts (never `IDLE`), and their weights."""
    torch.manual_seed(1)
    x = torch.randn(tokens, hidden, dtype=dtype)
    scores = torch.rand(tokens, EXPERTS)
    scores[:, IDLE] = -1
    weights, index = scores.topk(CHOSEN)
    return x, index, weights.to(torch.promote_types(dtype, torch.float32))


def new_factors(dtype: torch.dtype = torch.float32, hidden: int = HIDDEN, **options: Any) -> tuple[Factors, Factors]:
    torch.manual_seed(2)
    values = {"scale": 2.0, **options}
    up = Factors(
        0.3 * torch.randn(EXPERTS, RANK, hidden, dtype=dtype),
        0.3 * torch.randn(EXPERTS, 2 * hidden, RANK, dtype=dtype),
        **values,
    )
    down = Factors(
        0.3 * torch.randn(EXPERTS, RANK, hidden, dtype=dtype),
        0.3 * torch.randn(EXPERTS, hidden, RANK, dtype=dtype),
        **{**values, "seed": values.get("seed", 0) + 1},
    )
    return up, down


def written_out(
    module: PackedExperts, x: Tensor, index: Tensor, weights: Tensor, up: Factors | None, down: Factors | None
) -> Tensor:
    """The formulas of `experts.math`, one token and expert after the other, differentiable by autograd. Masks come from
    where they come there: the sorted rows."""
    routes = route(index, EXPERTS)
    w1, w2 = module.weight("gate_up_proj"), module.weight("down_proj")

    def mask(factors: Factors, width: int) -> Tensor:
        ones = torch.ones(routes.tokens.numel(), width, dtype=x.dtype)
        return ops.dropout(ones, factors.dropout, factors.seed) if factors.dropout else ones

    masks = [None if f is None else mask(f, width) for f, width in ((up, x.shape[1]), (down, w2.shape[2]))]
    rows = []
    for token in range(x.shape[0]):
        total = torch.zeros(x.shape[1], dtype=x.dtype)
        for choice in range(index.shape[1]):
            e, row = int(index[token, choice]), int(routes.inverse[token, choice])
            u = w1[e] @ x[token]
            if up is not None:
                u = u + up.scale * (up.b[e] @ (up.a[e] @ (masks[0][row] * x[token])))
            gate, value = u.chunk(2)
            h = torch.nn.functional.silu(gate) * value
            y = w2[e] @ h
            if down is not None:
                y = y + down.scale * (down.b[e] @ (down.a[e] @ (masks[1][row] * h)))
            total = total + weights[token, choice] * y
        rows.append(total)
    return torch.stack(rows)


def gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    return list(torch.autograd.grad(output, inputs, torch.randn_like(output)))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def with_leaves(factors: tuple[Factors, Factors]) -> tuple[tuple[Factors, Factors], list[Tensor]]:
    from dataclasses import replace

    tensors = leaves(factors[0].a, factors[0].b, factors[1].a, factors[1].b)
    return (replace(factors[0], a=tensors[0], b=tensors[1]), replace(factors[1], a=tensors[2], b=tensors[3])), tensors


def assert_close(one: Tensor, other: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest number of `other`."""
    assert one.shape == other.shape
    assert one.dtype == other.dtype
    assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "float"])
def test_logits_equal_the_dequantised_reference_exactly(packed: bool) -> None:
    module = new_experts(packed=packed)
    assert module.is_packed == packed
    inputs = new_input()
    assert torch.equal(module(*inputs), stock_experts(module)(*inputs))


def test_in_bfloat16_they_equal_it_within_rounding() -> None:
    module, inputs = new_experts(torch.bfloat16, packed=True), new_input(torch.bfloat16)
    out = module(*inputs)
    assert out.dtype == torch.bfloat16
    assert_close(out, stock_experts(module)(*inputs), 0.02)


def test_input_of_another_type_is_computed_in_the_experts_own() -> None:
    module, (x, index, weights) = new_experts(torch.bfloat16, packed=True), new_input()
    out = module(x, index, weights)
    assert out.dtype == torch.float32
    assert torch.equal(out.bfloat16(), module(x.bfloat16(), index, weights))


@pytest.mark.parametrize("alone", [False, True], ids=["grouped", "one by one"])
def test_autocast_changes_nothing(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if alone:
        # Single products are what autocast would lower; torch's grouped one it leaves alone.
        monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    module, (x, index, weights) = new_experts(packed=True), new_input()
    factors, tensors = with_leaves(new_factors())
    plain = experts(module, x, index, weights, *factors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = experts(module, x, index, weights, *factors)
        gradients_inside = gradients(inside, *tensors)
    assert torch.equal(inside, plain)
    for one, other in zip(gradients_inside, gradients(plain, *tensors), strict=True):
        assert torch.equal(one, other)


def test_gradients_of_input_and_routing_weights_are_those_of_the_reference() -> None:
    module, (x, index, weights) = new_experts(packed=True), new_input()
    stock = stock_experts(module)
    first, second = leaves(x, weights), leaves(x, weights)
    ours = gradients(experts(module, first[0], index, first[1]), *first)
    theirs = gradients(stock(second[0], index, second[1]), *second)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("which", ["both", "gate_up_proj", "down_proj"])
def test_outputs_and_gradients_are_those_of_the_formulas_written_out(which: str, dropout: float) -> None:
    module, (x, index, weights) = new_experts(packed=True), new_input()
    factors = new_factors(dropout=dropout, seed=5)
    results = []
    for compute in (experts, written_out):
        pair, tensors = with_leaves(factors)
        up, down = (f if which in ("both", name) else None for f, name in zip(pair, PROJECTIONS, strict=True))
        inputs = [*leaves(x, weights), *(tensors[:2] if up else []), *(tensors[2:] if down else [])]
        output = compute(module, inputs[0], index, inputs[1], up, down)
        results.append([output, *gradients(output, *inputs)])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-5)


def test_gradients_are_numerically_right_in_float64() -> None:
    hidden = 4
    module = new_experts(torch.float64, hidden=hidden)
    x, index, weights = new_input(torch.float64, tokens=6, hidden=hidden)
    factors, tensors = with_leaves(new_factors(torch.float64, hidden=hidden, dropout=0.3, seed=11))
    inputs = [*leaves(x, weights), *tensors]

    def compute(x: Tensor, weights: Tensor, *_: Tensor) -> Tensor:
        return experts(module, x, index, weights, *factors)

    assert torch.autograd.gradcheck(compute, inputs)


def test_an_expert_without_tokens_gets_zero_gradient() -> None:
    module, (x, index, weights) = new_experts(packed=True), new_input()
    factors, tensors = with_leaves(new_factors())
    for gradient in gradients(experts(module, x, index, weights, *factors), *tensors):
        idle = [e for e in range(EXPERTS) if not gradient[e].any()]
        assert idle == [IDLE]


def test_the_result_is_the_same_whatever_the_order_of_tokens() -> None:
    module, (x, index, weights) = new_experts(packed=True), new_input()
    factors = new_factors()
    order = torch.randperm(TOKENS)
    straight = experts(module, x, index, weights, *factors)
    assert_close(experts(module, x[order], index[order], weights[order], *factors), straight[order], 1e-6)


def test_dropout_is_drawn_for_each_token_and_expert() -> None:
    """Two choices of one token see different masks, and so do two tokens of one expert."""
    module = new_experts()
    for parameter in module.parameters():
        parameter.data.zero_()
    x, index = torch.ones(4, HIDDEN), torch.tensor([[0, 1]] * 4)
    up, _ = new_factors(dropout=0.5, seed=1)
    u, _ = math.up(x, route(index, EXPERTS), module.weight("gate_up_proj"), up)
    assert len({tuple(row.tolist()) for row in u}) == 8
    # The mean over many seeds is what no dropout gives.
    draws = [
        math.up(x, route(index, EXPERTS), module.weight("gate_up_proj"), new_factors(dropout=0.5, seed=s)[0])[0]
        for s in range(600)
    ]
    whole, _ = math.up(x, route(index, EXPERTS), module.weight("gate_up_proj"), new_factors()[0])
    assert_close(torch.stack(draws).mean(0), whole, 0.15)


def test_a_seed_decides_the_mask() -> None:
    module, inputs = new_experts(packed=True), new_input()
    one, same, other = (experts(module, *inputs, *new_factors(dropout=0.5, seed=seed)) for seed in (1, 1, 7))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@contextmanager
def saved_bytes() -> Iterator[Callable[[], int]]:
    """Bytes of all storages that are kept for the backward pass, each counted once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_nothing_of_the_size_of_the_experts_is_saved_for_the_backward_pass() -> None:
    module, (x, index, weights) = new_experts(packed=True), new_input()
    factors, tensors = with_leaves(new_factors())
    x.requires_grad_()
    with saved_bytes() as total:
        experts(module, x, index, weights, *factors)
    rows = TOKENS * CHOSEN
    # The product with the first factor is four wide: grouped products take rows of whole 16 bytes.
    numbers = x.numel() + weights.numel() + sum(t.numel() for t in tensors) + rows * (2 * INTERMEDIATE + 4)
    # Routes: three times an int64 a row, and an int32 an expert.
    assert total() == 4 * numbers + 3 * 8 * rows + 4 * EXPERTS
    assert total() < 4 * module.weight("gate_up_proj").numel() / 2


def test_no_delta_weight_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors as large as a stack of expert weights there are the dequantised ones, at most one at a time."""
    from torch.utils._python_dispatch import TorchDispatchMode

    module, (x, index, weights) = new_experts(), new_input()
    large = EXPERTS * HIDDEN * INTERMEDIATE
    asked: list[str] = []

    def weight(name: str, out: Tensor | None = None) -> Tensor:
        asked.append(name)
        return stored[name]

    stored = {name: module.get_parameter(name).data for name in PROJECTIONS}
    monkeypatch.setattr(module, "weight", weight)

    class Largest(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                owned = {value.untyped_storage().data_ptr() for value in stored.values()}
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in owned:
                    self.made = max(self.made, tensor.numel())
            return result

    factors, tensors = with_leaves(new_factors())
    with Largest() as largest:
        gradients(experts(module, x, index, weights, *factors), *tensors)
    assert asked == ["gate_up_proj", "down_proj", "down_proj", "gate_up_proj"]
    assert 0 < largest.made < large


def test_weights_are_dropped_after_each_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one stack of dequantised weights is alive at a time, and none between the passes."""
    import weakref

    module, (x, index, weights) = new_experts(packed=True), new_input()
    given: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    unpack = module.weight

    def weight(name: str, out: Tensor | None = None) -> Tensor:
        gc.collect()
        alive.append(sum(reference() is not None for reference in given))
        tensor = unpack(name, out)
        given.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(module, "weight", weight)
    factors, tensors = with_leaves(new_factors())
    out = experts(module, x, index, weights, *factors)
    assert not any(reference() is not None for reference in given)
    gradients(out, *tensors)
    assert alive == [0, 0, 0, 0]


def test_routes_sort_rows_by_expert() -> None:
    index = torch.tensor([[2, 0], [2, 5], [0, 7]])
    routes = route(index, EXPERTS)
    assert index.reshape(-1)[routes.order].tolist() == [0, 0, 2, 2, 5, 7]
    assert routes.tokens.tolist() == [0, 2, 0, 1, 1, 2]
    assert routes.order[routes.inverse].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert routes.offsets.tolist() == [2, 2, 4, 4, 4, 5, 5, 6]
    assert routes.offsets.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_grouped_product_is_one_product_a_group(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    offsets = torch.tensor([3, 3, 10], dtype=torch.int32)
    a, b, other = torch.randn(10, 16).to(dtype), torch.randn(3, 16, 8).to(dtype), torch.randn(10, 8).to(dtype)
    tolerance = 0.01 if dtype in (torch.bfloat16, torch.float16) else 1e-6
    expected = torch.cat([a[:3] @ b[0], a[3:3] @ b[1], a[3:] @ b[2]])
    assert_close(grouped(a, b, offsets), expected, tolerance)
    assert_close(grouped(a, b.transpose(1, 2).contiguous().transpose(1, 2), offsets), expected, tolerance)
    columns = torch.stack([a[:3].t() @ other[:3], torch.zeros(16, 8, dtype=dtype), a[3:].t() @ other[3:]])
    assert_close(grouped(a.t(), other, offsets), columns, tolerance)


def test_without_torchs_grouped_product_the_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    module, (x, index, weights) = new_experts(packed=True), new_input()
    results = []
    for missing in (False, True):
        if missing:
            monkeypatch.delattr(torch.nn.functional, "grouped_mm")
        factors, tensors = with_leaves(new_factors(dropout=0.2, seed=3))
        out = experts(module, x, index, weights, *factors)
        results.append([out, *gradients(out, *tensors)])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-5)


def test_the_halves_give_what_the_whole_gives() -> None:
    """`up`, `down` and their backward passes are used on their own too."""
    module, (x, index, weights) = new_experts(packed=True), new_input()
    (gate_up, down), tensors = with_leaves(new_factors(dropout=0.3, seed=9))
    inputs = leaves(x, weights)
    whole = experts(module, inputs[0], index, inputs[1], gate_up, down)
    expected = gradients(whole, *inputs, *tensors)
    routes: Routes = route(index, EXPERTS)
    w1, w2 = module.weight("gate_up_proj"), module.weight("down_proj")
    torch.manual_seed(3)
    grad = torch.randn_like(whole)
    with torch.no_grad():
        u, t = math.up(x, routes, w1, gate_up)
        assert torch.equal(math.down(u, weights, routes, w2, down), whole)
        du, dweights, da2, db2 = math.down_backward(grad, u, weights, routes, w2, down)
        dx, da1, db1 = math.up_backward(du, x, routes, w1, gate_up, t)
    for one, other in zip((dx, dweights, da1, db1, da2, db2), expected, strict=True):
        assert one is not None
        assert torch.equal(one, other)


def test_a_second_derivative_is_refused() -> None:
    module, (x, index, weights) = new_experts(), new_input()
    x.requires_grad_()
    doubled = experts(module, x, index, weights) * x
    (gradient,) = torch.autograd.grad(doubled.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
