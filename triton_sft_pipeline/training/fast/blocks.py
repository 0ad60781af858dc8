"""Causal attention with a sliding window out of causal attention without one, for kernels that know no window.

Cut a document into blocks of the window's length W. A query sees its own block causally, and of the block before it
the keys that are less than W tokens away: of the query at place i those at places above i. With both blocks read
backwards that is causal attention too, one place shifted. So a window costs two calls over blocks instead of one over
the document, and no product is computed that nobody needs.

The two halves are merged by the logarithms of their denominators, as in ring attention (Liu et al. 2023, "Ring
Attention with Blockwise Transformers for Near-Infinite Context"). Backwards each half gets the merged output and
denominator: then its weights, exp(score - log_sum), are those of the whole, and gradients add up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Causal(NamedTuple):
    """Causal attention over rows of one length.

    Attributes:
        forward: (q, k, v), each [rows, tokens, heads, head_dim] -> output of q's shape, and float32
            [rows, heads, tokens] logarithms of the softmax's denominators; both new.
        backward: (gradient of the output, q, k, v, output, log_sum) -> gradients of q, k and v.
    """

    forward: Forward
    backward: Backward


def forward(q: Tensor, k: Tensor, v: Tensor, window: int | None, causal: Causal) -> tuple[Tensor, Tensor]:
    """Attention of [rows, tokens, heads, head_dim] with a window that is None or divides `tokens` or exceeds it.

    Returns:
        The output, and float32 [rows, heads, tokens] for `backward`.
    """
    rows, tokens = q.shape[:2]
    if window is None or window >= tokens:
        out, log_sum = causal.forward(q, k, v)
        return out.contiguous(), log_sum
    out, log_sum = causal.forward(_cut(q, window), _cut(k, window), _cut(v, window))
    # [rows, blocks, ...], written to below: what the later blocks see of the block before is added.
    own, own_sum = (t.contiguous().unflatten(0, (rows, -1)) for t in (out, log_sum))
    before, before_sum = causal.forward(_later(q, window), _earlier(k, window), _earlier(v, window))
    before = before.flip(1).unflatten(0, (rows, -1))
    before_sum = before_sum.flip(-1).unflatten(0, (rows, -1))
    # The last query of a block sees nothing before the block.
    late, late_sum = own[:, 1:, :-1], own_sum[:, 1:, :, :-1]
    merged_sum = torch.logaddexp(late_sum, before_sum)
    share = (before_sum - merged_sum).exp().transpose(-1, -2)[..., None]
    # In the type of `share`, which is wider.
    late.copy_(late + (before - late) * share)
    late_sum.copy_(merged_sum)
    return own.reshape(q.shape), own_sum.transpose(1, 2).reshape(rows, q.shape[2], tokens)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, window: int | None, causal: Causal
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the other arguments as `forward` took and returned them."""
    rows, tokens = q.shape[:2]
    if window is None or window >= tokens:
        dq, dk, dv = causal.backward(grad, q, k, v, out, log_sum)
        return dq.contiguous(), dk.contiguous(), dv.contiguous()
    sums = log_sum.unflatten(-1, (-1, window)).transpose(1, 2)
    cut = [_cut(t, window) for t in (grad, q, k, v, out)]
    own = causal.backward(cut[0], cut[1], cut[2], cut[3], cut[4], sums.flatten(0, 1).contiguous())
    dq, dk, dv = (t.contiguous().unflatten(0, (rows, -1)) for t in own)
    late_grad, late_q, late_out = (_later(t, window) for t in (grad, q, out))
    early_k, early_v = (_earlier(t, window) for t in (k, v))
    later_sums = sums[:, 1:, :, :-1].flatten(0, 1).flip(-1).contiguous()
    found = causal.backward(late_grad, late_q, early_k, early_v, late_out, later_sums)
    dq_late, dk_early, dv_early = (t.flip(1).unflatten(0, (rows, -1)) for t in found)
    dq[:, 1:, :-1] += dq_late
    dk[:, :-1, 1:] += dk_early
    dv[:, :-1, 1:] += dv_early
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


def _cut(tensor: Tensor, window: int) -> Tensor:
    """[rows * blocks, window, heads, head_dim]"""
    return tensor.unflatten(1, (-1, window)).flatten(0, 1)


def _later(tensor: Tensor, window: int) -> Tensor:
    """All blocks but the first of a row, backwards, without their last token."""
    return tensor.unflatten(1, (-1, window))[:, 1:, :-1].flatten(0, 1).flip(1)


def _earlier(tensor: Tensor, window: int) -> Tensor:
    """All blocks but the last of a row, backwards, without their first token."""
    return tensor.unflatten(1, (-1, window))[:, :-1, 1:].flatten(0, 1).flip(1)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, log_sum, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), None, True, 0.0, True, False, scale=q.shape[-1] ** -0.5
    )
    return out.transpose(1, 2), log_sum.squeeze(-1)


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # Of dropout, which there is none of.
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(t.transpose(1, 2) for t in (grad, q, k, v, out)),
        *(log_sum.unsqueeze(-1), unused, unused, None, None, None, q.shape[1], k.shape[1], 0.0, True),
        scale=q.shape[-1] ** -0.5,
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


CUDNN = Causal(_cudnn_forward, _cudnn_backward)
