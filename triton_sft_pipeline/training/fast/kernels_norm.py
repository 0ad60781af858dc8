"""Triton kernels of the norms: RMS norm with its residual adds, and the per-head norm with rotation of q and k.

One program holds a whole row (or all heads of a token), so each tensor is read once. Same signatures as twins.py."""

# The arguments of a kernel are written in Triton, where only constants are annotated.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sft_pipeline.training.fast.twins import straight


def _warps(block: int) -> int:
    """16 elements a thread: two accesses of 16 bytes in bfloat16."""
    return min(max(block // 512, 1), 16)


@triton.jit
def _rms_norm(x, weight, y, rstd_out, x_stride, columns: tl.constexpr, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    value = tl.load(x + row.to(tl.int64) * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value, 0) / columns + eps)
    tl.store(rstd_out + row, rstd)
    tl.store(y + row.to(tl.int64) * columns + at, w * (value * rstd), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = straight(x)
    rows, columns = x.shape
    y = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    _rms_norm[(rows,)](x, weight, y, rstd, x.stride(0), columns, eps, block, num_warps=_warps(block))
    return y, rstd


@triton.jit
def _rms_norm_backward(
    dy, x, weight, rstd, add, dx, dy_stride, x_stride, add_stride, columns: tl.constexpr,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    far = row.to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    value = tl.load(x + far * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + far * dy_stride + at, mask=inside, other=0.0).to(tl.float32)
    scaled = grad * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(rstd + row)
    normed = value * r
    result = r * (scaled - normed * (tl.sum(scaled * normed, 0) / columns))
    if ADD:
        result += tl.load(add + far * add_stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + far * columns + at, result, mask=inside)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, add: Tensor | None = None) -> Tensor:
    dy, x = straight(dy), straight(x)
    rows, columns = x.shape
    dx = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(columns)
    added = x if add is None else straight(add)
    _rms_norm_backward[(rows,)](
        dy, x, weight, rstd, added, dx, dy.stride(0), x.stride(0), added.stride(0), columns,
        add is not None, block, num_warps=_warps(block),
    )  # fmt: skip
    return dx


@triton.jit
def _norm_add_norm(
    branch, w1, residual, w2, total_out, y, rstd_branch, rstd_sum, branch_stride, residual_stride,
    columns: tl.constexpr, eps, SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    far = row.to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    value = tl.load(branch + far * branch_stride + at, mask=inside, other=0.0).to(tl.float32)
    rest = tl.load(residual + far * residual_stride + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w1 + at, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value, 0) / columns + eps)
    tl.store(rstd_branch + row, rstd)
    kind = total_out.dtype.element_ty
    normed = (w * (value * rstd)).to(kind).to(tl.float32)
    total = (rest + normed).to(kind)
    tl.store(total_out + far * columns + at, total, mask=inside)
    if SECOND:
        wide = total.to(tl.float32)
        second = tl.rsqrt(tl.sum(wide * wide, 0) / columns + eps)
        tl.store(rstd_sum + row, second)
        v = tl.load(w2 + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + far * columns + at, v * (wide * second), mask=inside)


def norm_add(branch: Tensor, weight: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    branch, residual = straight(branch), straight(residual)
    rows, columns = branch.shape
    total = torch.empty((rows, columns), dtype=branch.dtype, device=branch.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=branch.device)
    block = triton.next_power_of_2(columns)
    _norm_add_norm[(rows,)](
        branch, weight, residual, weight, total, total, rstd, rstd, branch.stride(0), residual.stride(0),
        columns, eps, False, block, num_warps=_warps(block),
    )  # fmt: skip
    return total, rstd


def norm_add_norm(
    branch: Tensor, w1: Tensor, residual: Tensor, w2: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    branch, residual = straight(branch), straight(residual)
    rows, columns = branch.shape
    total = torch.empty((rows, columns), dtype=branch.dtype, device=branch.device)
    y = torch.empty_like(total)
    rstd_branch = torch.empty(rows, dtype=torch.float32, device=branch.device)
    rstd_sum = torch.empty_like(rstd_branch)
    block = triton.next_power_of_2(columns)
    _norm_add_norm[(rows,)](
        branch, w1, residual, w2, total, y, rstd_branch, rstd_sum, branch.stride(0), residual.stride(0),
        columns, eps, True, block, num_warps=_warps(block),
    )  # fmt: skip
    return total, y, rstd_branch, rstd_sum


# -- q and k: the two halves of a head are separate tiles, so that rotation needs no exchange between threads ------


@triton.jit
def _halves(base, heads, columns, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Both halves of every head of a token, float32 [BLOCK_H, BLOCK_D]."""
    inside = (heads[:, None] < HEADS) & (columns[None, :] < D // 2)
    at = base + heads[:, None] * D + columns[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(at + D // 2, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _angles(cos, sin, token, stride, columns, D: tl.constexpr):
    inside = columns < D // 2
    base = token.to(tl.int64) * stride + columns
    c1 = tl.load(cos + base, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + base + D // 2, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin + base, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin + base + D // 2, mask=inside, other=0.0).to(tl.float32)
    return c1[None, :], c2[None, :], s1[None, :], s2[None, :]


@triton.jit
def _norm_heads(
    source, weight, out, rstd_out, cos, sin, angle_stride, eps, token,
    HEADS: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    heads = tl.arange(0, BLOCK_H)
    columns = tl.arange(0, BLOCK_D)
    x1, x2 = _halves(source, heads, columns, HEADS, D, BLOCK_H, BLOCK_D)
    w1 = tl.load(weight + columns, mask=columns < D // 2, other=0.0).to(tl.float32)
    w2 = tl.load(weight + D // 2 + columns, mask=columns < D // 2, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / D + eps)
    kind = out.dtype.element_ty
    y1 = (w1[None, :] * (x1 * rstd[:, None])).to(kind)
    y2 = (w2[None, :] * (x2 * rstd[:, None])).to(kind)
    if ROPE:
        c1, c2, s1, s2 = _angles(cos, sin, token, angle_stride, columns, D)
        a = y1.to(tl.float32)
        b = y2.to(tl.float32)
        y1 = (a * c1 - b * s1).to(kind)
        y2 = (b * c2 + a * s2).to(kind)
    inside = (heads[:, None] < HEADS) & (columns[None, :] < D // 2)
    at = out + token.to(tl.int64) * (HEADS * D) + heads[:, None] * D + columns[None, :]
    tl.store(at, y1, mask=inside)
    tl.store(at + D // 2, y2, mask=inside)
    tl.store(rstd_out + token * HEADS + heads, rstd, mask=heads < HEADS)


@triton.jit
def _qk_norm_rope(
    qkv, q_weight, k_weight, cos, sin, q, k, rstd_q, rstd_k, qkv_stride, angle_stride, eps,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    source = qkv + token.to(tl.int64) * qkv_stride
    _norm_heads(source, q_weight, q, rstd_q, cos, sin, angle_stride, eps, token, HEADS, D, ROPE, BLOCK_Q, BLOCK_D)
    _norm_heads(
        source + HEADS * D, k_weight, k, rstd_k, cos, sin, angle_stride, eps, token, KV, D, ROPE, BLOCK_K, BLOCK_D
    )


def _blocks(heads: int, kv_heads: int, head_dim: int) -> tuple[int, int, int]:
    return triton.next_power_of_2(heads), triton.next_power_of_2(kv_heads), triton.next_power_of_2(head_dim // 2)


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
    rows = qkv.shape[0]
    q = torch.empty((rows, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    k = torch.empty((rows, kv_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    rstd_q = torch.empty((rows, heads), dtype=torch.float32, device=qkv.device)
    rstd_k = torch.empty((rows, kv_heads), dtype=torch.float32, device=qkv.device)
    rope = cos is not None and sin is not None
    cosine, sine = _same_stride(cos, sin) if rope else (qkv, qkv)
    _qk_norm_rope[(rows,)](
        qkv, q_weight, k_weight, cosine, sine, q, k, rstd_q, rstd_k, qkv.stride(0), cosine.stride(0), eps,
        heads, kv_heads, head_dim, rope, *_blocks(heads, kv_heads, head_dim), num_warps=4,
    )  # fmt: skip
    return q, k, rstd_q, rstd_k


def _same_stride(cos: Any, sin: Any) -> tuple[Tensor, Tensor]:
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


@triton.jit
def _norm_heads_backward(
    grad, source, weight, rstd, cos, sin, angle_stride, out, token,
    HEADS: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    heads = tl.arange(0, BLOCK_H)
    columns = tl.arange(0, BLOCK_D)
    x1, x2 = _halves(source, heads, columns, HEADS, D, BLOCK_H, BLOCK_D)
    g1, g2 = _halves(grad + token.to(tl.int64) * (HEADS * D), heads, columns, HEADS, D, BLOCK_H, BLOCK_D)
    if ROPE:
        c1, c2, s1, s2 = _angles(cos, sin, token, angle_stride, columns, D)
        a = g1
        g1 = a * c1 + g2 * s2
        g2 = g2 * c2 - a * s1
    r = tl.load(rstd + token * HEADS + heads, mask=heads < HEADS, other=0.0)[:, None]
    g1 *= tl.load(weight + columns, mask=columns < D // 2, other=0.0).to(tl.float32)[None, :]
    g2 *= tl.load(weight + D // 2 + columns, mask=columns < D // 2, other=0.0).to(tl.float32)[None, :]
    x1 *= r
    x2 *= r
    mean = (tl.sum(g1 * x1 + g2 * x2, 1) / D)[:, None]
    inside = (heads[:, None] < HEADS) & (columns[None, :] < D // 2)
    at = out + heads[:, None] * D + columns[None, :]
    tl.store(at, r * (g1 - x1 * mean), mask=inside)
    tl.store(at + D // 2, r * (g2 - x2 * mean), mask=inside)


@triton.jit
def _qk_norm_rope_backward(
    dq, dk, qkv, q_weight, k_weight, rstd_q, rstd_k, cos, sin, out, qkv_stride, angle_stride, out_stride,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    source = qkv + token.to(tl.int64) * qkv_stride
    to = out + token.to(tl.int64) * out_stride
    _norm_heads_backward(
        dq, source, q_weight, rstd_q, cos, sin, angle_stride, to, token, HEADS, D, ROPE, BLOCK_Q, BLOCK_D
    )
    _norm_heads_backward(
        dk, source + HEADS * D, k_weight, rstd_k, cos, sin, angle_stride, to + HEADS * D, token,
        KV, D, ROPE, BLOCK_K, BLOCK_D,
    )  # fmt: skip


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
    rows, heads, head_dim = dq.shape
    kv_heads = dk.shape[1]
    rope = cos is not None and sin is not None
    cosine, sine = _same_stride(cos, sin) if rope else (qkv, qkv)
    _qk_norm_rope_backward[(rows,)](
        dq.contiguous(), dk.contiguous(), qkv, q_weight, k_weight, rstd_q, rstd_k, cosine, sine, out,
        qkv.stride(0), cosine.stride(0), out.stride(0),
        heads, kv_heads, head_dim, rope, *_blocks(heads, kv_heads, head_dim), num_warps=4,
    )  # fmt: skip
