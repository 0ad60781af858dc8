"""What every fused operation computes, in plain torch: used on the CPU, with TRITON_SFT_PLAIN=1, and as the reference
that the kernels must agree with.

They take any floating type. Sums are in float32 (in float64 for float64 input), and a value that the stock model rounds
to its own type is rounded here too. None of them is differentiable by autograd on purpose: the backward of each is a
function beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from triton_sft_pipeline.training.fast.products import grouped

LANES = 8
"""Columns that share one call of Philox: 4 words of 32 bits give 8 draws of 16 bits."""

_LOW = 0xFFFFFFFF


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# -- norms ---------------------------------------------------------------------------------------------------------


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt((x * x).mean(-1) + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    rstd = _rstd(wide, eps)
    return (_wide(weight) * (wide * rstd[..., None])).to(x.dtype), rstd


def _norm_gradient(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """dx = rstd (w dy - xhat mean(w dy xhat)), in the wide type."""
    normed = _wide(x) * rstd[..., None]
    scaled = _wide(dy) * _wide(weight)
    return rstd[..., None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, add: Tensor | None = None) -> Tensor:
    dx = _norm_gradient(dy, x, weight, rstd)
    return (dx if add is None else dx + _wide(add)).to(x.dtype)


def norm_add(branch: Tensor, weight: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, rstd = rms_norm(branch, weight, eps)
    return residual + normed, rstd


def norm_add_norm(
    branch: Tensor, w1: Tensor, residual: Tensor, w2: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, rstd_branch = norm_add(branch, w1, residual, eps)
    y, rstd_sum = rms_norm(total, w2, eps)
    return total, y, rstd_branch, rstd_sum


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _unrotate_half(x: Tensor) -> Tensor:
    """The transpose of _rotate_half."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, -first), dim=-1)


def _heads_of(qkv: Tensor, start: int, heads: int, head_dim: int) -> Tensor:
    return qkv[:, start : start + heads * head_dim].unflatten(-1, (heads, head_dim))


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def one(start: int, count: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        normed, rstd = rms_norm(_heads_of(qkv, start, count, head_dim), weight, eps)
        if cos is not None and sin is not None:
            wide = _wide(normed)
            rotated = wide * _wide(cos)[:, None] + _rotate_half(wide) * _wide(sin)[:, None]
            normed = rotated.to(qkv.dtype)
        return normed.contiguous(), rstd.contiguous()

    q, rstd_q = one(0, heads, q_weight)
    k, rstd_k = one(heads * head_dim, kv_heads, k_weight)
    return q, k, rstd_q, rstd_k


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
) -> None:
    start = 0
    for grad, weight, rstd in ((dq, q_weight, rstd_q), (dk, k_weight, rstd_k)):
        count, head_dim = grad.shape[1:]
        wide = _wide(grad)
        if cos is not None and sin is not None:
            wide = wide * _wide(cos)[:, None] + _unrotate_half(wide * _wide(sin)[:, None])
        dx = _norm_gradient(wide, _heads_of(qkv, start, count, head_dim), weight, rstd)
        out[:, start : start + count * head_dim] = dx.flatten(1).to(out.dtype)
        start += count * head_dim


# -- gates ---------------------------------------------------------------------------------------------------------


def gate_mul(o: Tensor, gate: Tensor) -> Tensor:
    return (_wide(o) * torch.sigmoid(_wide(gate))).to(o.dtype)


def gate_mul_backward(dy: Tensor, o: Tensor, gate: Tensor, dgate_out: Tensor) -> Tensor:
    share = torch.sigmoid(_wide(gate))
    wide = _wide(dy) * share
    dgate_out.copy_(wide * _wide(o) * (1 - share))
    return wide.to(o.dtype)


def gate_mul_dropout(
    o: Tensor, gate: Tensor, p: float, seed: int | Tensor, both: bool = True
) -> tuple[Tensor | None, Tensor]:
    y = gate_mul(o, gate)
    return y if both else None, dropout(y, p, seed)


def gate_mul_dropout_backward(
    dy: Tensor, extra: Tensor, o: Tensor, gate: Tensor, dgate_out: Tensor, p: float, seed: int | Tensor
) -> Tensor:
    return gate_mul_backward(dropout(_wide(extra), p, seed, _wide(dy)), o, gate, dgate_out).to(o.dtype)


def swiglu(u: Tensor, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    if add is not None:
        u.add_(add)
    gate, up = u.chunk(2, dim=-1)
    h = torch.nn.functional.silu(gate) * up
    return h if out is None else out.copy_(h)


def swiglu_backward(dh: Tensor, u: Tensor, row_weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    gate, up = (_wide(half) for half in u.chunk(2, dim=-1))
    h = swiglu(u)
    grad = _wide(dh)
    drow = None
    if row_weight is not None:
        drow = (grad * _wide(h)).sum(-1)
        grad = grad * row_weight[:, None]
    share = torch.sigmoid(gate)
    dgate = grad * up * share * (1 + gate * (1 - share))
    return torch.cat((dgate, grad * gate * share), dim=-1).to(u.dtype), h, drow


# -- blocks of attention -------------------------------------------------------------------------------------------


def _later(tensor: Tensor, window: int) -> Tensor:
    """All blocks but the first of a row without their last token, a view."""
    return tensor.unflatten(1, (-1, window))[:, 1:, :-1]


def _earlier(tensor: Tensor, window: int) -> Tensor:
    """All blocks but the last of a row without their first token, a view."""
    return tensor.unflatten(1, (-1, window))[:, :-1, 1:]


def reverse_blocks(
    late: Sequence[Tensor], early: Sequence[Tensor], window: int, log_sum: Tensor | None = None
) -> tuple[Tensor, ...]:
    cut = [_later(t, window) for t in late] + [_earlier(t, window) for t in early]
    turned = tuple(t.flatten(0, 1).flip(1) for t in cut)
    if log_sum is None:
        return turned
    return *turned, log_sum.unflatten(0, (len(late[0]), -1))[:, 1:, :, :-1].flatten(0, 1).flip(-1)


def merge_blocks(own: Tensor, own_sum: Tensor, before: Tensor, before_sum: Tensor) -> Tensor:
    late = _later(own, own_sum.shape[-1])
    turned = before.flip(1).view(late.shape)
    merged_sum = own_sum.clone()
    # [rows, blocks, heads, tokens]
    sums = merged_sum.unflatten(0, (len(own), -1))[:, 1:, :, :-1]
    others = before_sum.flip(-1).view(sums.shape)
    share = torch.sigmoid(others - sums).transpose(-1, -2)[..., None]
    late.copy_(_wide(late) + (_wide(turned) - _wide(late)) * share)
    sums.copy_(torch.logaddexp(sums, others))
    return merged_sum


def add_reversed(dq: Tensor, dk: Tensor, dv: Tensor, turned: Sequence[Tensor], window: int) -> None:
    for target, source in zip((_later(dq, window), _earlier(dk, window), _earlier(dv, window)), turned, strict=True):
        target += source.flip(1).view(target.shape)


# -- rows ----------------------------------------------------------------------------------------------------------


def _multiply_high_low(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The two words of a 32-bit product. An int64 product may overflow into the sign; its bits are right all the
    same."""
    product = b * a
    return (product >> 32) & _LOW, product & _LOW


def _philox(seed: int | Tensor, counter: Tensor, rounds: int = 7) -> list[Tensor]:
    """Philox 4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), four words in int64 for each
    counter. Seven rounds are the fewest that pass BigCrush there."""
    key_a, key_b = seed & _LOW, (seed >> 32) & _LOW
    zero = torch.zeros_like(counter)
    c0, c1, c2, c3 = counter & _LOW, zero, zero, zero
    for _ in range(rounds):
        high_a, low_a = _multiply_high_low(0xD2511F53, c0)
        high_b, low_b = _multiply_high_low(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ key_a, low_b, high_a ^ c3 ^ key_b, low_a
        key_a, key_b = (key_a + 0x9E3779B9) & _LOW, (key_b + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def straight(x: Tensor) -> Tensor:
    """The same with neighbouring columns side by side, which autograd's expanded gradients have not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dropout_threshold(p: float) -> int:
    """The probability in steps of 2^-16."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"a dropout probability lies in [0, 1), not at {p}")
    return round(p * 65536)


def check_seed(seed: Tensor) -> Tensor:
    """The same without dimensions; ValueError unless it is one int64."""
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"a seed is one int64, not {seed.numel()} {seed.dtype}")
    return seed.reshape(())


def dropout_mask(rows: int, columns: int, p: float, seed: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Which elements are kept, bool [rows, columns]: a function of seed, row, column and the number of columns only.

    Column s * ceil(columns / 8) + g of a row is decided by the s-th 16-bit draw of its g-th counter, so that eight
    far-away columns share a counter and a thread of the kernel keeps to neighbouring addresses."""
    width = -(-columns // LANES)
    counter = torch.arange(rows * width, dtype=torch.int64, device=device).view(rows, width)
    words = _philox(check_seed(seed) if isinstance(seed, Tensor) else seed, counter)
    draws = [(words[lane % 4] >> (16 * (lane // 4))) & 0xFFFF for lane in range(LANES)]
    return torch.cat(draws, dim=1)[:, :columns] >= dropout_threshold(p)


def dropout(x: Tensor, p: float, seed: int | Tensor, add: Tensor | None = None, scale: float = 1.0) -> Tensor:
    keep = dropout_mask(x.shape[0], x.shape[1], p, seed, x.device)
    dropped = torch.where(keep, _wide(x) * (scale / (1 - p)), 0.0)
    return (dropped if add is None else dropped + _wide(add)).to(x.dtype)


def swiglu_dropout(u: Tensor, p: float, seed: int | Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    h = swiglu(u, None, out)
    return h, dropout(h, p, seed)


def swiglu_dropout_backward(
    dh: Tensor, extra: Tensor, u: Tensor, row_weight: Tensor | None, p: float, seed: int | Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    total = dropout(_wide(extra), p, seed, _wide(dh), scale)
    du, h, drow = swiglu_backward(total, u, row_weight)
    return du, dropout(h, p, seed), drow


def gather(x: Tensor, index: Tensor, p: float = 0.0, seed: int | Tensor = 0, out: Tensor | None = None) -> Any:
    rows = x[index] if out is None else out.copy_(x[index])
    return (rows, dropout(rows, p, seed)) if p > 0 else rows


def combine_dropout(y: Tensor, inverse: Tensor, y2: Tensor, p: float, seed: int | Tensor) -> Tensor:
    return combine(dropout(_wide(y2), p, seed, _wide(y)), inverse, None).to(y.dtype)


def combine(
    y: Tensor,
    inverse: Tensor,
    weights: Tensor | None,
    add: Tensor | None = None,
    y2: Tensor | None = None,
    scale2: float = 1.0,
) -> Tensor:
    total: Tensor | None = None
    for choice in range(inverse.shape[1]):
        rows = inverse[:, choice]
        term = _wide(y[rows])
        if y2 is not None:
            term = term + _wide(y2[rows]) * scale2
        if weights is not None:
            term = term * weights[:, choice, None]
        total = term if total is None else total + term
    assert total is not None
    rounded = total.to(y.dtype)
    return rounded if add is None else rounded + add


# -- experts' adapters ---------------------------------------------------------------------------------------------


def fill_b(b: Tensor, out: Tensor) -> None:
    rank = b.shape[-1]
    out[..., :rank].copy_(b)
    if out.shape[-1] > rank:
        out[..., rank:].zero_()


def join_b(b: Tensor) -> Tensor:
    return b.permute(1, 2, 0).reshape(b.shape[1], -1)


# -- products with experts' factors --------------------------------------------------------------------------------


def shrink(x: Tensor, w: Tensor, offsets: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    t = grouped(x, w, offsets)
    if out is not None:
        return torch.mul(t, scale, out=out)
    return t.mul_(scale) if scale != 1.0 else t


def expand(t: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return grouped(t, w, offsets)


def outer(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    return grouped(x.t(), y, offsets)


# -- routing -------------------------------------------------------------------------------------------------------


def router(logits: Tensor, bias: Tensor, k: int, route_scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.sigmoid(_wide(logits))
    order = torch.sort(scores + bias, dim=1, descending=True, stable=True).indices
    index = order[:, :k].contiguous()
    top = scores.gather(1, index)
    return top / (top.sum(-1, keepdim=True) + 1e-20) * route_scale, index


def router_backward(dweights: Tensor, logits: Tensor, index: Tensor, route_scale: float) -> Tensor:
    top = torch.sigmoid(_wide(logits).gather(1, index))
    total = top.sum(-1, keepdim=True) + 1e-20
    share = (dweights * top).sum(-1, keepdim=True) / total
    dtop = route_scale * (dweights - share) / total
    return torch.zeros_like(logits).scatter_(1, index, (dtop * top * (1 - top)).to(logits.dtype))


def sort_routes(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    expert, order = torch.sort(index.reshape(-1), stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    edges = torch.arange(num_experts, device=expert.device)
    offsets = torch.searchsorted(expert, edges, right=True).to(torch.int32)
    return order, inverse.view(index.shape), order // index.shape[1], offsets


# -- four bits -----------------------------------------------------------------------------------------------------


@cache
def code_tables(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 values of a 4-bit code and the 256 of bitsandbytes' dynamic 8-bit map for scales, float32 on `device`."""
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    return get_4bit_type(quant_type, device=device), create_dynamic_map().to(device)


def block_scales(absmax: Tensor, nested: Tensor | None, offset: Tensor | None, code8: Tensor) -> Tensor:
    """The scale of every block of 64 weights, float32 [E, nb]: code8[absmax] * nested + offset when the scales are
    quantised themselves (in blocks of 256 that never span two experts), else `absmax` as it is."""
    if nested is None or offset is None:
        return absmax.float().reshape(-1, absmax.shape[-1]) if absmax.dim() > 1 else absmax.float().view(1, -1)
    experts = offset.numel()
    quantised = absmax.reshape(experts, -1)
    spread = nested.reshape(experts, -1).repeat_interleave(256, dim=1)[:, : quantised.shape[1]]
    return code8[quantised.int()] * spread + offset.to(absmax.device).reshape(-1, 1)


def dequantize(
    codes: Tensor, absmax: Tensor, nested: Tensor | None, offset: Tensor | None, quant_type: str, out: Tensor
) -> Tensor:
    scales = block_scales(absmax, nested, offset, code_tables(quant_type, codes.device)[1])
    dtype = out.dtype if out.dtype in (torch.bfloat16, torch.float16) else torch.float32
    flat = torch.ops.bitsandbytes.dequantize_4bit(
        codes.reshape(-1, 1), scales.reshape(-1), 64, quant_type, (out.numel() // out.shape[-1], out.shape[-1]), dtype
    )
    return out.copy_(flat.view(out.shape))
