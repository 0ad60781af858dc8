"""What a block of routed experts computes, forwards and backwards, with LoRA as two small factors an expert.

Notation: E experts, k of them a token, H hidden, I intermediate, N tokens, S = N * k rows, r rank. Row s of the sorted
order is one (token, expert) pair; rows of one expert lie together. With D the dropout mask of a row:

    u   = x W1^T + s1 (D1 x) A1^T B1^T        [S, 2I]
    h   = silu(u[:, :I]) * u[:, I:]           [S, I]
    y   = h W2^T + s2 (D2 h) A2^T B2^T        [S, H]
    out = sum over a token's k rows of weight * y

The four weight products are grouped matrix products, in the forward pass one with that of B where W and B lie side by
side. Neither a delta weight nor anything else of the size E x out x in is made besides the weights themselves, and
those are not kept for the backward pass but asked for again. Weights are frozen: gradients go to x, to the routing
weights and to the factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from triton_sft_pipeline.training.fast import ops
from triton_sft_pipeline.training.fast.products import grouped

_ROW_BYTES = 16
"""torch's grouped products want rows of whole 16 bytes."""
_LINE_BYTES = 128
"""A line of the GPU's cache."""


class FrozenWeights(Protocol):
    """Where the weights of a block come from, packed or not.

    Attributes:
        num_experts: E.
        compute_dtype: the type that everything is computed in.
    """

    num_experts: int
    compute_dtype: torch.dtype

    def weight(self, name: str) -> Tensor:
        """The weights of all experts, [E, out, in] in `compute_dtype`: "gate_up_proj" or "down_proj"."""
        ...


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
        b: [E, out, r]; copied at every use when it is not contiguous, and not looked at where the weight is `widened`.
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
        w1: [E, 2I, H], gate rows first; may be widened by B (`widened`).
    """
    u, t, _ = up_again(x, routes, w1, lora)
    return u, t


def up_again(
    x: Tensor, routes: Routes, w1: Tensor, lora: Factors | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`up`, and as a third the rows `D1 x` [S, H] with which `up_backward` need not gather again; None without LoRA."""
    if lora is None:
        return grouped(ops.gather(x, routes.tokens), _t(w1), routes.offsets), None, None
    width = x.shape[1]
    plain, lora = _prepared(w1, width, lora)
    rows = _rows_for(w1, width, routes.tokens.numel())
    inside = None if rows is None else rows[:, :width]
    if lora.dropout:
        gathered, dropped = ops.gather(x, routes.tokens, lora.dropout, lora.seed, inside)
    else:
        gathered = dropped = ops.gather(x, routes.tokens, out=inside)
    t = ops.shrink(dropped, _t(lora.a), routes.offsets, lora.scale)
    if rows is not None:
        rows[:, width:].copy_(t)
        return grouped(rows, _t(w1), routes.offsets), t, dropped
    u = grouped(gathered, _t(plain), routes.offsets)
    return u.add_(ops.expand(t, _t(lora.b), routes.offsets)), t, dropped


def down(
    u: Tensor, weights: Tensor, routes: Routes, w2: Tensor, lora: Factors | None, add: Tensor | None = None
) -> Tensor:
    """The second half and the sum over a token's experts: [N, H] in the type of `u`, summed in float32.

    Args:
        u: [S, 2I], from `up`.
        weights: [N, k] float32, the routing weights.
        w2: [E, H, I]; may be widened by B (`widened`).
        add: [N, H], added to the rounded sum.
    """
    if lora is None:
        return ops.combine(grouped(ops.swiglu(u), _t(w2), routes.offsets), routes.inverse, weights, add)
    inner = u.shape[1] // 2
    plain, lora = _prepared(w2, inner, lora)
    rows = _rows_for(w2, inner, u.shape[0])
    inside = None if rows is None else rows[:, :inner]
    if lora.dropout:
        h, dropped = ops.swiglu_dropout(u, lora.dropout, lora.seed, inside)
    else:
        h = dropped = ops.swiglu(u, out=inside)
    if rows is not None:
        ops.shrink(dropped, _t(lora.a), routes.offsets, lora.scale, rows[:, inner:])
        del dropped
        return ops.combine(grouped(rows, _t(w2), routes.offsets), routes.inverse, weights, add)
    t = ops.shrink(dropped, _t(lora.a), routes.offsets)
    del dropped
    y = grouped(h, _t(plain), routes.offsets)
    delta = ops.expand(t, _t(lora.b), routes.offsets)
    return ops.combine(y, routes.inverse, weights, add, y2=delta, scale2=lora.scale)


def down_backward(
    grad: Tensor, u: Tensor, weights: Tensor, routes: Routes, w2: Tensor, lora: Factors | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `down`: of u [S, 2I], of the routing weights [N, k], and of `lora.a` and `lora.b` (None without).

    The routing weight of a row stays out of the products until the end, so that its own gradient, the product of h with
    the gradient of h, needs neither y nor another pass. B is multiplied by itself, also where it stands in a widened
    weight: a few columns more would be one more tile of the large product, which takes as long as the small one.

    Args:
        grad: [N, H], the gradient of what `down` returned.
    """
    g = ops.gather(grad, routes.tokens)
    row_weights = weights.reshape(-1)[routes.order]
    if lora is None:
        du, _, drow = _swiglu_backward(grouped(g, w2, routes.offsets), u, row_weights)
        return du, drow[routes.inverse], None, None
    rank = lora.a.shape[1]
    plain, lora = _prepared(w2, u.shape[1] // 2, lora)
    q = ops.shrink(g, lora.b, routes.offsets)
    dh, extra = grouped(g, plain, routes.offsets), ops.expand(q, lora.a, routes.offsets)
    if lora.dropout:
        du, dropped, drow = ops.swiglu_dropout_backward(
            dh, extra, u, row_weights, lora.dropout, lora.seed, scale=lora.scale
        )
    else:
        du, dropped, drow = _swiglu_backward(dh.add_(extra, alpha=lora.scale), u, row_weights)
    del dh, extra
    t = ops.shrink(dropped, _t(lora.a), routes.offsets)
    scaled = (row_weights * lora.scale)[:, None]
    da = ops.outer((q * scaled).to(q.dtype), dropped, routes.offsets)
    db = ops.outer(g, (t * scaled).to(t.dtype), routes.offsets)
    return du, drow[routes.inverse], da[:, :rank], db[..., :rank]


def up_backward(
    du: Tensor,
    x: Tensor,
    routes: Routes,
    w1: Tensor,
    lora: Factors | None,
    t: Tensor | None,
    dropped: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `up`: of x [N, H], and of `lora.a` and `lora.b` (None without).

    Args:
        du: [S, 2I], the gradient of u.
        t: what `up` returned beside u.
        dropped: what `up_again` returned besides; None: gathered once more.
    """
    if lora is None or t is None:
        return ops.combine(grouped(du, w1, routes.offsets), routes.inverse, None), None, None
    rank = lora.a.shape[1]
    plain, lora = _prepared(w1, x.shape[1], lora)
    q = ops.shrink(du, lora.b, routes.offsets, lora.scale)
    db = ops.outer(du, t, routes.offsets)
    if dropped is None:
        made = ops.gather(x, routes.tokens, lora.dropout, lora.seed)
        dropped = made[1] if lora.dropout else made
        del made
    da = ops.outer(q, dropped, routes.offsets)
    # Rows of the input's size are the largest there are: two at a time.
    del dropped
    rows, extra = grouped(du, plain, routes.offsets), ops.expand(q, lora.a, routes.offsets)
    if lora.dropout:
        dx = ops.combine_dropout(rows, routes.inverse, extra, lora.dropout, lora.seed)
    else:
        dx = ops.combine(rows, routes.inverse, None, y2=extra)
    return dx, da[:, :rank], db[..., :rank]


# -- weights that have B beside them -------------------------------------------------------------------------------


def widened(width: int, rank: int, dtype: torch.dtype) -> tuple[int, int]:
    """(columns, pitch) of a weight [E, out, width] whose rows go on with those of B: rows [W | B] times [x | t] are
    both products of a forward pass, and their sum, in one. `up`, `down` and their backward passes take such a weight.

    Columns are a multiple of 16 bytes, which is what products take. Rows best begin `pitch` numbers apart: as whole
    lines of the cache, no row is read or written in pieces.
    """
    columns = width + _up_to(rank, _ROW_BYTES // dtype.itemsize)
    return columns, (_up_to(columns, _LINE_BYTES // dtype.itemsize) if rank else width)


def _up_to(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _rows_for(weight: Tensor, width: int, rows: int) -> Tensor | None:
    """Where rows [x | t] for a widened weight go, [rows, its columns]; None for a weight of `width` columns."""
    columns = weight.shape[-1]
    if columns == width:
        return None
    return weight.new_empty(rows, _up_to(columns, _LINE_BYTES // weight.element_size()))[:, :columns]


def _prepared(weight: Tensor, width: int, lora: Factors) -> tuple[Tensor, Factors]:
    """The weight [E, out, width] without B, and factors of a rank that grouped products take, filled up with zeros; B
    is that of a widened weight."""
    missing = -lora.a.shape[1] % (_ROW_BYTES // lora.a.element_size())
    a = lora.a.contiguous()
    if missing:
        a = functional.pad(a, (0, 0, 0, missing))
    if weight.shape[-1] > width:
        return weight[..., :width], replace(lora, a=a, b=weight[..., width:])
    b = lora.b.contiguous()
    return weight, replace(lora, a=a, b=functional.pad(b, (0, missing)) if missing else b)


# -- the whole block -----------------------------------------------------------------------------------------------


def experts(
    module: FrozenWeights,
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
        module: FrozenWeights,
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


def _swiglu_backward(dh: Tensor, u: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    du, h, drow = ops.swiglu_backward(dh, u, row_weights)
    assert drow is not None  # with row weights there is one
    return du, h, drow
