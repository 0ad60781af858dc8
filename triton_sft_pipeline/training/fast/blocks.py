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

from triton_sft_pipeline.training.fast import ops

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
        The output, new and contiguous, and for `backward` the logarithms of the softmax's denominators: float32
        [rows * blocks, heads, window], or [rows, heads, tokens] where the window makes no blocks.
    """
    tokens = q.shape[1]
    if window is None or window >= tokens:
        out, log_sum = causal.forward(q, k, v)
        return out.contiguous(), log_sum
    own, own_sum = (t.contiguous() for t in causal.forward(*(_cut(t, window) for t in (q, k, v))))
    before, before_sum = causal.forward(*ops.reverse_blocks((q,), (k, v), window))
    own = own.view(q.shape)
    return own, ops.merge_blocks(own, own_sum, before, before_sum)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, window: int | None, causal: Causal
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the other arguments as `forward` took and returned them."""
    tokens = q.shape[1]
    if window is None or window >= tokens:
        dq, dk, dv = causal.backward(grad, q, k, v, out, log_sum)
        return dq.contiguous(), dk.contiguous(), dv.contiguous()
    cut = [_cut(t, window) for t in (grad, q, k, v, out)]
    own = causal.backward(cut[0], cut[1], cut[2], cut[3], cut[4], log_sum)
    dq, dk, dv = (found.contiguous().view(t.shape) for found, t in zip(own, (q, k, v), strict=True))
    turned = ops.reverse_blocks((grad, q, out), (k, v), window, log_sum)
    late_grad, late_q, late_out, early_k, early_v, sums = turned
    ops.add_reversed(dq, dk, dv, causal.backward(late_grad, late_q, early_k, early_v, late_out, sums), window)
    return dq, dk, dv


def _cut(tensor: Tensor, window: int) -> Tensor:
    """[rows * blocks, window, heads, head_dim]"""
    return tensor.unflatten(1, (-1, window)).flatten(0, 1)


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
