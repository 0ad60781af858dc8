"""A whole AFMoE decoder layer, attention and MLP, as one differentiable function with a hand-written backward pass.

With x the input, n1..n4 the four norms and @ a linear layer with its LoRA:

    q, k, v, g = n1(x) @ (Wq, Wk, Wv, Wg);  q, k = rope(norm(q), norm(k))
    o = attention(q, k, v);  a = (o * sigmoid(g)) @ Wo;  m = x + n2(a)
    f = mlp(n3(m));  out = m + n4(f)          mlp: SwiGLU, or shared experts + routed experts

Of the forward pass only x, o, a, f and the routing are kept; everything between is computed again in the backward
pass, except attention and the last products of the MLP, whose inputs are enough. Where memory is short, a or both o
and a are computed again, too. Frozen weights are unpacked into scratch memory once a pass. Everything runs in the type
of x, whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_sft_pipeline.training.experts import math
from triton_sft_pipeline.training.experts.adapter import join_a, split_a, view_b
from triton_sft_pipeline.training.experts.math import Factors, Routes
from triton_sft_pipeline.training.fast import linear, ops
from triton_sft_pipeline.training.fast.attention import Documents, flash, flash_backward
from triton_sft_pipeline.training.fast.linear import Projection
from triton_sft_pipeline.training.fast.parts import LayerParts, RoutedPart
from triton_sft_pipeline.training.fast.scratch import Scratch

Gradients = list[Tensor | None]


@dataclass(frozen=True)
class LayerCall:
    """What one pass through one layer is given besides its input.

    Attributes:
        parts: the layer.
        documents: who sees whom.
        cos, sin: [N, head_dim], RoPE's tables in the type of x; used by layers with a window only.
        seeds: `parts.SEEDS` seeds of dropout masks; in the device's memory where the pass is recorded, because a graph
            would keep a number for ever.
        keep_attention: keep o for the backward pass.
        keep_branch: keep a as well; without o there is no point in it.
        scratch: shared by all layers.
    """

    parts: LayerParts
    documents: Documents
    cos: Tensor
    sin: Tensor
    seeds: Sequence[int | Tensor] | Tensor
    keep_attention: bool
    keep_branch: bool
    scratch: Scratch


def decoder_layer(x: Tensor, call: LayerCall) -> Tensor:
    """The layer's output for `x` [rows, tokens, H]; differentiable in x and in the adapters' weights."""
    out: Tensor = _DecoderLayer.apply(x, call, *call.parts.parameters())
    return out


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: LayerCall, *factors: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            out, kept = forward_pass(call, flat, factors)
        ctx.call, ctx.shape, ctx.count = call, x.shape, len(kept)
        ctx.save_for_backward(flat, *kept, *factors)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        kept, factors = rest[: ctx.count], rest[ctx.count :]
        with torch.autocast(x.device.type, enabled=False):
            # An expanded gradient (that of a sum) has strides that no kernel takes.
            dx, gradients = backward_pass(ctx.call, grad.reshape(x.shape).contiguous(), x, kept, factors)
        return dx.view(ctx.shape), None, *gradients


def forward_pass(
    call: LayerCall, x: Tensor, factors: Sequence[Tensor | None]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The layer's output for `x` [N, H], and what `backward_pass` needs besides x and the factors.

    Args:
        factors: the adapters' weights, as `LayerParts.parameters` lists them.
    """
    parts = call.parts
    attention = _attention(call, x, factors, None).kept()
    middle, y, _, _ = ops.norm_add_norm(attention[3], parts.norms[1].weight, x, parts.norms[2].weight, parts.eps)
    keep = (call.keep_attention,) * 3 + (call.keep_attention and call.keep_branch,)
    kept = [tensor if wanted else None for tensor, wanted in zip(attention, keep, strict=True)]
    # The MLP needs the room.
    del attention
    mlp, routing = _mlp(call, y, factors)
    out, rstd = ops.norm_add(mlp, parts.norms[3].weight, middle, parts.eps)
    return out, (mlp, rstd, *kept, *routing)


def backward_pass(
    call: LayerCall,
    grad: Tensor,
    x: Tensor,
    kept: Sequence[Tensor | None],
    factors: Sequence[Tensor | None],
) -> tuple[Tensor, Gradients]:
    """The gradients of x [N, H] and of the factors, in their order, given that of the output [N, H], contiguous.

    Args:
        kept: what `forward_pass` returned.
    """
    mlp, rstd, *rest = kept
    assert mlp is not None and rstd is not None
    return _backward(call, grad, x, mlp, rstd, rest[:4], rest[4:], factors)


def _backward(
    call: LayerCall,
    grad: Tensor,
    x: Tensor,
    mlp: Tensor,
    rstd: Tensor,
    kept: Sequence[Tensor | None],
    routing: Sequence[Tensor | None],
    factors: Sequence[Tensor | None],
) -> tuple[Tensor, Gradients]:
    """The gradients of x [N, H] and of the factors, in their order."""
    parts = call.parts
    norms = [norm.weight for norm in parts.norms]
    attention = None
    if kept[0] is None:
        # Of this pass, too, only what is expensive stays while the MLP goes backwards: the micro-batch is long.
        kept = _attention(call, x, factors, None).kept()
    elif kept[3] is None:
        attention = _attention(call, x, factors, kept)
        kept = attention.kept()
    branch = kept[3]
    middle, y, rstd_branch, rstd_middle = ops.norm_add_norm(branch, norms[1], x, norms[2], parts.eps)
    dmlp = ops.rms_norm_backward(grad, mlp, norms[3], rstd)
    dy, mlp_gradients = _mlp_backward(call, dmlp, y, routing, factors)
    dmiddle = ops.rms_norm_backward(dy, middle, norms[2], rstd_middle, grad)
    del dmlp, dy, middle, y
    dbranch = ops.rms_norm_backward(dmiddle, branch, norms[1], rstd_branch)
    attention = attention or _attention(call, x, factors, kept)
    dnormed, attention_gradients = _attention_backward(call, dbranch, attention)
    dx = ops.rms_norm_backward(dnormed, x, norms[0], attention.rstd, dmiddle)
    return dx, attention_gradients + mlp_gradients


# -- attention -----------------------------------------------------------------------------------------------------


@dataclass
class _Attention:
    """Attention's part of a forward pass, first or repeated; names as in the module's formulas."""

    rstd: Tensor
    qkvg: Tensor
    dropped: Tensor | None
    t: Tensor | None
    q: Tensor
    k: Tensor
    rstd_q: Tensor
    rstd_k: Tensor
    o: Tensor
    log_sum: Tensor
    random: Tensor | None
    into: Projection
    out: Projection
    gated: Tensor
    """What the output projection's adapter sees: o * sigmoid(g), through its mask if it has one."""
    branch: Tensor
    """a: what attention adds to the residual, before its norm."""

    def kept(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """What makes another pass cheap."""
        return self.o, self.log_sum, self.random, self.branch


def _attention(
    call: LayerCall, x: Tensor, factors: Sequence[Tensor | None], kept: Sequence[Tensor | None] | None
) -> _Attention:
    """Attention's forward pass; what `kept` holds (o, its log-sum, the kernel's random numbers, a) is not computed
    again."""
    parts = call.parts
    normed, rstd = ops.rms_norm(x, parts.norms[0].weight, parts.eps)
    into, out = (_load(call, place, factors, x) for place in (0, 1))
    qkvg, dropped, t = linear.forward(into, normed)
    cos, sin = (call.cos, call.sin) if parts.window is not None else (None, None)
    q, k, rstd_q, rstd_k = ops.qk_norm_rope(
        qkvg, parts.q_norm.weight, parts.k_norm.weight, parts.eps, cos, sin, parts.heads, parts.kv_heads, parts.head_dim
    )
    if kept is None:
        documents = call.documents
        o, log_sum, random = flash(q, k, _values(parts, qkvg), parts.window, documents.ends, documents.longest)
    else:
        o, log_sum, random = kept[:3]  # type: ignore[assignment]
    gates, branch = _gates(parts, qkvg), None if kept is None else kept[3]
    if out.drops:
        whole, gated = ops.gate_mul_dropout(o.flatten(1), gates, out.dropout, out.seed, both=branch is None)
    else:
        whole = gated = ops.gate_mul(o.flatten(1), gates)
    if branch is None:
        assert whole is not None
        branch = linear.forward(out, whole, gated)[0]
    del whole
    return _Attention(rstd, qkvg, dropped, t, q, k, rstd_q, rstd_k, o, log_sum, random, into, out, gated, branch)


def _attention_backward(call: LayerCall, grad: Tensor, a: _Attention) -> tuple[Tensor, Gradients]:
    """The gradients of n1(x) and of attention's factors, given that of a."""
    parts, documents = call.parts, call.documents
    dgated, extra, dt = linear.input_gradients(a.out, grad)
    out_gradients = linear.factor_gradients(a.out, grad, dt, *linear.reduce(a.out, None, a.gated))
    dqkvg = torch.empty_like(a.qkvg)
    o, gates, dgates = a.o.flatten(1), _gates(parts, a.qkvg), _gates(parts, dqkvg)
    if extra is None:
        do = ops.gate_mul_backward(dgated, o, gates, dgates)
    else:
        do = ops.gate_mul_dropout_backward(dgated, extra, o, gates, dgates, a.out.dropout, a.out.seed)
    del dgated, extra
    dq, dk, dv = flash_backward(
        do.view(a.o.shape),
        a.q,
        a.k,
        _values(parts, a.qkvg),
        a.o,
        a.log_sum,
        a.random,
        parts.window,
        documents.ends,
        documents.longest,
    )
    _values(parts, dqkvg).copy_(dv)
    cos, sin = (call.cos, call.sin) if parts.window is not None else (None, None)
    ops.qk_norm_rope_backward(
        dq, dk, a.qkvg, parts.q_norm.weight, parts.k_norm.weight, a.rstd_q, a.rstd_k, cos, sin, dqkvg
    )
    dnormed, dt = linear.input_gradient(a.into, dqkvg)
    return dnormed, linear.factor_gradients(a.into, dqkvg, dt, a.dropped, a.t) + out_gradients


def _values(parts: LayerParts, qkvg: Tensor) -> Tensor:
    """v's columns as [N, kv_heads, head_dim], a view."""
    start, end = parts.groups[0].columns[2:4]
    return qkvg[:, start:end].unflatten(1, (parts.kv_heads, parts.head_dim))


def _gates(parts: LayerParts, qkvg: Tensor) -> Tensor:
    """g's columns [N, heads * head_dim], a view."""
    return qkvg[:, parts.groups[0].columns[3] :]


# -- the MLP -------------------------------------------------------------------------------------------------------


def _mlp(call: LayerCall, y: Tensor, factors: Sequence[Tensor | None]) -> tuple[Tensor, Sequence[Tensor | None]]:
    """f [N, H], and what the backward pass needs of the routing: weights, index, logits and the four of `Routes`."""
    into, out = (_load(call, place, factors, y) for place in (2, 3))
    f = linear.forward(out, *_swiglu(linear.forward(into, y)[0], out))[0]
    routed = call.parts.routed
    if routed is None:
        return f, (None,) * 7
    logits = torch.mm(y, routed.router.weight.to(y.dtype).t())
    weights, index = ops.router(logits, routed.bias, routed.chosen, routed.route_scale)
    routes = math.route(index, routed.experts.num_experts)
    first, second = _expert_factors(call, routed, factors)
    u, _ = math.up(y, routes, _expert_weight(call, routed, "gate_up_proj", first), first)
    f = math.down(u, weights, routes, _expert_weight(call, routed, "down_proj", second), second, add=f)
    return f, (weights, index, logits, routes.order, routes.inverse, routes.tokens, routes.offsets)


def _swiglu(u: Tensor, out: Projection) -> tuple[Tensor, Tensor | None]:
    """h, and h as the adapter of `out` sees it if that is known along the way."""
    return ops.swiglu_dropout(u, out.dropout, out.seed) if out.drops else (ops.swiglu(u), None)


def _mlp_backward(
    call: LayerCall,
    grad: Tensor,
    y: Tensor,
    routing: Sequence[Tensor | None],
    factors: Sequence[Tensor | None],
) -> tuple[Tensor, Gradients]:
    """The gradients of y [N, H] and of the MLP's factors, given that of f."""
    dy, expert_gradients = _routed_backward(call, grad, y, routing, factors)
    into, out = (_load(call, place, factors, y) for place in (2, 3))
    u, dropped, t = linear.forward(into, y)
    dh, extra, dt = linear.input_gradients(out, grad)
    if extra is None:
        du, h, _ = ops.swiglu_backward(dh, u)
    else:
        du, h, _ = ops.swiglu_dropout_backward(dh, extra, u, None, out.dropout, out.seed)
    out_gradients = linear.factor_gradients(out, grad, dt, *linear.reduce(out, None, h))
    dy, dt = linear.input_gradient(into, du, dy)
    return dy, [*linear.factor_gradients(into, du, dt, dropped, t), *out_gradients, *expert_gradients]


def _routed_backward(
    call: LayerCall,
    grad: Tensor,
    y: Tensor,
    routing: Sequence[Tensor | None],
    factors: Sequence[Tensor | None],
) -> tuple[Tensor | None, Gradients]:
    """The routed experts' and the router's share of the gradient of y, and the gradients of the experts' factors."""
    routed = call.parts.routed
    if routed is None:
        return None, []
    weights, index, logits, *sorted_ = routing
    assert weights is not None and index is not None and logits is not None
    routes = Routes(*sorted_)  # type: ignore[arg-type]
    first, second = _expert_factors(call, routed, factors)
    w1 = _expert_weight(call, routed, "gate_up_proj", first)
    u, t, dropped = math.up_again(y, routes, w1, first)
    w2 = _expert_weight(call, routed, "down_proj", second)
    du, dweights, *down_gradients = math.down_backward(grad, u, weights, routes, w2, second)
    del u
    dy, *up_gradients = math.up_backward(du, y, routes, w1, first, t, dropped)
    dlogits = ops.router_backward(dweights, logits, index, routed.route_scale)
    dy.addmm_(dlogits, routed.router.weight.to(y.dtype))
    return dy, [_joined(g, place) for place, g in enumerate((*up_gradients, *down_gradients))]


def _joined(gradient: Tensor | None, place: int) -> Tensor | None:
    """A factor's gradient in the layout in which PEFT stores the factor: A, B, A, B."""
    if gradient is None:
        return None
    return ops.join_b(gradient) if place % 2 else join_a(gradient)


def _expert_factors(
    call: LayerCall, routed: RoutedPart, factors: Sequence[Tensor | None]
) -> tuple[Factors | None, Factors | None]:
    def one(place: int) -> Factors | None:
        a, b = factors[len(factors) - 4 + 2 * place : len(factors) - 2 + 2 * place]
        scale = routed.scales[place]
        if a is None or b is None or scale is None:
            return None
        count, dtype = routed.experts.num_experts, call.cos.dtype
        split = split_a(a.to(dtype), count), view_b(b.to(dtype), count)
        return Factors(*split, scale, routed.dropouts[place], call.seeds[4 + place])

    return one(0), one(1)


def _expert_weight(call: LayerCall, routed: RoutedPart, name: str, lora: Factors | None) -> Tensor:
    """All experts' weights [E, out, in]; packed ones are unpacked into scratch memory, and widened by B."""
    experts, dtype = routed.experts, call.cos.dtype
    if not experts.is_packed:
        return experts.weight(name).to(dtype)
    count, rows, width = experts.shape_of(name)
    together = lora is not None and experts.compute_dtype == dtype
    columns, pitch = math.widened(width, lora.b.shape[-1] if lora is not None and together else 0, dtype)
    out = call.scratch.take(name, (count, rows, pitch), experts.compute_dtype, call.cos.device)[..., :columns]
    experts.weight(name, out=out[..., :width])
    if lora is not None and together:
        ops.fill_b(lora.b, out[..., width:])
    return out.to(dtype)


def _load(call: LayerCall, place: int, factors: Sequence[Tensor | None], like: Tensor) -> Projection:
    """The place-th group of linear layers, ready to multiply with."""
    mine = factors[call.parts.places[place]]
    return linear.load(call.parts.groups[place], mine, call.scratch, like, call.seeds[place])  # type: ignore[arg-type]
