"""What a block of routed experts computes, forwards and backwards, with LoRA as two small factors an expert.

Notation: E experts, k of them a token, H hidden, I intermediate, N tokens, S = N * k rows, r rank. Row s of the sorted
order is one (token, expert) pair; rows of one expert lie together. With D the dropout mask of a row:

    u   = x W1^T + s1 (D1 x) A1^T B1^T        [S, 2I]
    h   = silu(u[:, :I]) * u[:, I:]           [S, I]
    y   = h W2^T + s2 (D2 h) A2^T B2^T        [S, H]
    out = sum over a token's k rows of weight * y

The four weight products are grouped matrix products; neither a delta weight nor anything else of the size E x out x in
is made besides the weights themselves, and those are not kept for the backward pass but asked for again. Weights are
frozen: gradients go to x, to the routing weights and to the factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from triton_sft_pipeline.training.fast import ops

if TYPE_CHECKING:
    from triton_sft_pipeline.training.experts.module import PackedExperts

_ROW_BYTES = 16
"""torch's grouped products want rows of whole 16 bytes."""


@dataclass(frozen=True)
class Routes:
    """Which token goes to which expert, sorted by expert.

    Attributes:
        order: [S] int64, the flat position `token * k + choice` of each sorted row.
        inverse: [N, k] int64, the sorted row of each (token, choice).
        tokens: [S] int64, the token of each sorted row.
        offsets: [E] int32, where each expert's rows end.
    """

    order: Tensor
    inverse: Tensor
    tokens: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class Factors:
    """The LoRA of one fused expert tensor: `W_e + scale * b_e @ a_e`, where a_e sees its input through dropout.

    Attributes:
        a: [E, r, in].
        b: [E, out, r]; copied at every use when it is not contiguous.
        scale: alpha / r.
        dropout: the rate; 0.0 when not training.
        seed: what the mask is drawn from; the same seed gives the same mask in the backward pass.
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0
    seed: int | Tensor = 0


def route(top_k_index: Tensor, num_experts: int) -> Routes:
    """Sort the (token, expert) pairs of `top_k_index` [N, k] by expert; within an expert by token. Never synchronises
    with the host."""
    order, inverse, tokens, offsets = ops.sort_routes(top_k_index, num_experts)
    return Routes(order, inverse, tokens, offsets)


def up(x: Tensor, routes: Routes, w1: Tensor, lora: Factors | None) -> tuple[Tensor, Tensor | None]:
    """The first half, `u` [S, 2I] with the LoRA part in it, and what `up_backward` needs beside it: `s1 (D1 x) A1^T`
    [S, r], wider where r numbers are no multiple of 16 bytes.

    Args:
        x: [N, H].
        w1: [E, 2I, H], gate rows first.
    """
    if lora is None:
        return grouped(ops.gather(x, routes.tokens), _t(w1), routes.offsets), None
    lora = _aligned(lora)
    rows, dropped = _gathered(x, routes, lora)
    u = grouped(rows, _t(w1), routes.offsets)
    t = grouped(dropped, _t(lora.a), routes.offsets).mul_(lora.scale)
    return u.add_(grouped(t, _t(lora.b), routes.offsets)), t


def down(u: Tensor, weights: Tensor, routes: Routes, w2: Tensor, lora: Factors | None) -> Tensor:
    """The second half and the sum over a token's experts: [N, H] in the type of `u`, summed in float32.

    Args:
        u: [S, 2I], from `up`.
        weights: [N, k] float32, the routing weights.
        w2: [E, H, I].
    """
    h = ops.swiglu(u)
    y = grouped(h, _t(w2), routes.offsets)
    if lora is None:
        return ops.combine(y, routes.inverse, weights)
    lora = _aligned(lora)
    t = grouped(_dropped(h, lora), _t(lora.a), routes.offsets)
    delta = grouped(t, _t(lora.b), routes.offsets)
    return ops.combine(y, routes.inverse, weights, None, y2=delta, scale2=lora.scale)


def down_backward(
    grad: Tensor, u: Tensor, weights: Tensor, routes: Routes, w2: Tensor, lora: Factors | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `down`: of u [S, 2I], of the routing weights [N, k], and of `lora.a` and `lora.b` (None without).

    The routing weight of a row stays out of the products until the end, so that its own gradient, the product of h with
    the gradient of h, needs neither y nor another pass.

    Args:
        grad: [N, H], the gradient of what `down` returned.
    """
    g = ops.gather(grad, routes.tokens)
    dh = grouped(g, w2, routes.offsets)
    row_weights = weights.reshape(-1)[routes.order]
    if lora is None:
        du, _, drow = _swiglu_backward(dh, u, row_weights)
        return du, drow[routes.inverse], None, None
    rank, lora = lora.a.shape[1], _aligned(lora)
    q = grouped(g, lora.b, routes.offsets)
    dh = _plus_dropped(dh, grouped(q, lora.a, routes.offsets), lora, lora.scale)
    du, h, drow = _swiglu_backward(dh, u, row_weights)
    dropped = _dropped(h, lora)
    t = grouped(dropped, _t(lora.a), routes.offsets)
    scaled = (row_weights * lora.scale)[:, None]
    da = grouped((q * scaled).to(q.dtype).t(), dropped, routes.offsets)
    db = grouped(g.t(), (t * scaled).to(t.dtype), routes.offsets)
    return du, drow[routes.inverse], da[:, :rank], db[..., :rank]


def up_backward(
    du: Tensor, x: Tensor, routes: Routes, w1: Tensor, lora: Factors | None, t: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `up`: of x [N, H], and of `lora.a` and `lora.b` (None without).

    Args:
        du: [S, 2I], the gradient of u.
        t: what `up` returned beside u.
    """
    dx = grouped(du, w1, routes.offsets)
    if lora is None or t is None:
        return ops.combine(dx, routes.inverse, None), None, None
    rank, lora = lora.a.shape[1], _aligned(lora)
    q = grouped(du, lora.b, routes.offsets).mul_(lora.scale)
    db = grouped(du.t(), t, routes.offsets)
    _, dropped = _gathered(x, routes, lora)
    da = grouped(q.t(), dropped, routes.offsets)
    dx = _plus_dropped(dx, grouped(q, lora.a, routes.offsets), lora, 1.0)
    return ops.combine(dx, routes.inverse, None), da[:, :rank], db[..., :rank]


def grouped(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Matrix products of groups of rows: `a` [S, m] with `b` [E, m, n] gives [S, n]; `a` [m, S] with `b` [S, n] gives
    [E, m, n]. `offsets` [E] says where each group of S ends; a group without rows gives zeros.

    torch's grouped product where it takes the tensors, otherwise one product after the other (on CPUs for float64).
    """
    product = getattr(functional, "grouped_mm", None)
    if product is not None and a.dtype != torch.float64:
        result: Tensor = product(a, b, offs=offsets)
        return result
    return _grouped_loop(a, b, offsets)


def _grouped_loop(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    ends = offsets.tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if b.dim() == 2:
        return torch.stack([a[:, start:end] @ b[start:end] for start, end in spans])
    return torch.cat([a[start:end] @ b[e] for e, (start, end) in enumerate(spans)])


def experts(
    module: PackedExperts,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Factors | None = None,
    down: Factors | None = None,
) -> Tensor:
    """The routed experts' output [N, H] in the type of `x`, with the LoRA of either tensor or none.

    Computes in `module.compute_dtype` whatever autocast says; sums over experts in float32. Between forward and
    backward it keeps x, u and the S x r product of the first factor, but neither weights nor anything else.

    Args:
        module: where the frozen weights come from, `module.weight(name)` each time they are needed.
        x: [N, H].
        index: [N, k] int64, each token's experts.
        weights: [N, k], its routing weights.
    """
    dtype = module.compute_dtype
    routes = route(index, module.num_experts)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    first, second = ((None, None) if f is None else (f.a.to(dtype), f.b.to(dtype)) for f in (gate_up, down))
    out: Tensor = _Experts.apply(x.to(dtype), weights.to(wide), *first, *second, module, routes, gate_up, down)
    return out.to(x.dtype)


class _Experts(torch.autograd.Function):
    """`up` and `down` with their own backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        a1: Tensor | None,
        b1: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        module: PackedExperts,
        routes: Routes,
        gate_up: Factors | None,
        down_: Factors | None,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            u, t = up(x, routes, module.weight("gate_up_proj"), _with(gate_up, a1, b1))
            out = down(u, weights, routes, module.weight("down_proj"), _with(down_, a2, b2))
        ctx.module, ctx.plain = module, [_without_tensors(gate_up), _without_tensors(down_)]
        ctx.save_for_backward(
            x, weights, a1, b1, a2, b2, routes.order, routes.inverse, routes.tokens, routes.offsets, u, t
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weights, a1, b1, a2, b2, order, inverse, tokens, offsets, u, t = ctx.saved_tensors
        routes = Routes(order, inverse, tokens, offsets)
        gate_up, down_ = ctx.plain
        with torch.autocast(x.device.type, enabled=False):
            # An expanded gradient (that of a sum) has strides that no kernel takes.
            du, dweights, da2, db2 = down_backward(
                grad.contiguous(), u, weights, routes, ctx.module.weight("down_proj"), _with(down_, a2, b2)
            )
            dx, da1, db1 = up_backward(du, x, routes, ctx.module.weight("gate_up_proj"), _with(gate_up, a1, b1), t)
        return dx, dweights, da1, db1, da2, db2, None, None, None, None


def _with(factors: Factors | None, a: Tensor | None, b: Tensor | None) -> Factors | None:
    if factors is None or a is None or b is None:
        return None
    return replace(factors, a=a, b=b)


def _without_tensors(factors: Factors | None) -> Factors | None:
    """The numbers alone: a tensor kept outside `save_for_backward` would outlive the graph."""
    nothing = torch.empty(0)
    return None if factors is None else replace(factors, a=nothing, b=nothing)


def _t(weight: Tensor) -> Tensor:
    return weight.transpose(-2, -1)


def _aligned(lora: Factors) -> Factors:
    """Contiguous factors of a rank that grouped products take, filled up with zeros."""
    a, b = lora.a.contiguous(), lora.b.contiguous()
    if missing := -a.shape[1] % (_ROW_BYTES // a.element_size()):
        a, b = functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))
    return replace(lora, a=a, b=b)


def _gathered(x: Tensor, routes: Routes, lora: Factors) -> tuple[Tensor, Tensor]:
    """Each row's token, and the same through dropout."""
    if not lora.dropout:
        rows = ops.gather(x, routes.tokens)
        return rows, rows
    rows, dropped = ops.gather(x, routes.tokens, lora.dropout, lora.seed)
    return rows, dropped


def _swiglu_backward(dh: Tensor, u: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    du, h, drow = ops.swiglu_backward(dh, u, row_weights)
    assert drow is not None  # with row weights there is one
    return du, h, drow


def _dropped(rows: Tensor, lora: Factors) -> Tensor:
    return ops.dropout(rows, lora.dropout, lora.seed) if lora.dropout else rows


def _plus_dropped(total: Tensor, rows: Tensor, lora: Factors, scale: float) -> Tensor:
    """`total + scale * D rows`, the mask being that of the forward pass; `total` may be overwritten."""
    if not lora.dropout:
        return total.add_(rows, alpha=scale)
    return ops.dropout(rows, lora.dropout, lora.seed, add=total, scale=scale)
