"""Causal attention over whole documents, with an optional sliding window: torch's flash kernels on CUDA, cuDNN's
where the GPU is a Hopper or newer and documents are as long as whole windows, a plain masked softmax elsewhere.

Both directions are plain functions on [N, heads, head_dim] tensors, N being all tokens of a micro-batch one after the
other, so that a caller can keep the output of the forward pass and never compute it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from triton_sft_pipeline.training.fast import blocks
from triton_sft_pipeline.training.fast.blocks import CUDNN


@dataclass(frozen=True)
class Documents:
    """Which tokens of a micro-batch may see each other: those of one document.

    Attributes:
        ends: int32 [documents + 1], 0 and then where each document ends; None when all documents are `longest` tokens.
        longest: tokens of the longest document.
    """

    ends: Tensor | None
    longest: int


def find_documents(position_ids: Tensor | None, rows: int, tokens: int) -> Documents:
    """Documents of a batch of `rows` rows of `tokens` tokens, none of them padding: one begins with every row and
    wherever `position_ids` ([1 or rows, tokens]) is 0. None stands for one document a row.

    With position_ids this waits for the device once.
    """
    if position_ids is None:
        return Documents(None, tokens)
    begins = (position_ids == 0).expand(rows, tokens).clone()
    begins[:, 0] = True
    starts = begins.reshape(-1).nonzero().flatten().tolist()
    if len(starts) == rows:
        return Documents(None, tokens)
    ends = [*starts, rows * tokens]
    longest = max(after - before for before, after in pairwise(ends))
    return Documents(torch.tensor(ends, dtype=torch.int32, device=position_ids.device), longest)


def flash(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None, max_len: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """softmax(q k^T / sqrt(head_dim)) v, each token seeing the tokens of its document up to itself.

    Args:
        q: [N, heads, head_dim]; rows may be strided.
        k, v: [N, kv_heads, head_dim]; kv_heads divides heads.
        window: how many tokens, itself included, a token sees at most; None: all before it.
        cu_seqlens: `Documents.ends`.
        max_len: `Documents.longest`.

    Returns:
        The output [N, heads, head_dim], the logarithm of the softmax's denominator, and what the kernel says of its
        random numbers; the last two are for `flash_backward`.
    """
    if not q.is_cuda:
        weights, log_sum = _softmax(q, k, window, cu_seqlens, max_len)
        out = torch.einsum("hnm,mhd->nhd", weights, _repeated(v, q)).to(q.dtype)
        return out, log_sum, None
    if _by_cudnn(q, window, cu_seqlens, max_len):
        rows = [tensor.unflatten(0, (-1, max_len)) for tensor in (q, k, v)]
        out, log_sum = blocks.forward(rows[0], rows[1], rows[2], window, CUDNN)
        return out.view(q.shape), log_sum, None
    left, right, causal = _window(window)
    out, log_sum, random, _, _ = torch.ops.aten._flash_attention_forward(
        *(_rows(tensor, cu_seqlens, max_len) for tensor in (q, k, v)),
        cu_seqlens,
        cu_seqlens,
        max_len,
        max_len,
        0.0,
        causal,
        False,
        scale=q.shape[-1] ** -0.5,
        window_size_left=left,
        window_size_right=right,
    )
    return out.view(q.shape), log_sum, random


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    random: Tensor | None,
    window: int | None,
    cu_seqlens: Tensor | None,
    max_len: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given that of `out` and what `flash` returned; the other arguments as there."""
    if not q.is_cuda:
        return _plain_backward(grad, q, k, v, out, window, cu_seqlens, max_len)
    if _by_cudnn(q, window, cu_seqlens, max_len):
        rows = [tensor.unflatten(0, (-1, max_len)) for tensor in (grad, q, k, v, out)]
        dq, dk, dv = blocks.backward(rows[0], rows[1], rows[2], rows[3], rows[4], log_sum, window, CUDNN)
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)
    left, right, causal = _window(window)
    rows = [_rows(tensor, cu_seqlens, max_len) for tensor in (grad, q, k, v, out)]
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        *rows,
        log_sum,
        cu_seqlens,
        cu_seqlens,
        max_len,
        max_len,
        0.0,
        causal,
        random,
        # The kernel's argument for an attention bias, which there is none of.
        q.new_empty(0),
        scale=q.shape[-1] ** -0.5,
        window_size_left=left,
        window_size_right=right,
    )
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


def _by_cudnn(q: Tensor, window: int | None, cu_seqlens: Tensor | None, max_len: int) -> bool:
    """Whether cuDNN's kernels serve: nearly twice as fast, but they know no window other than by blocks of its size,
    and each length costs a second of preparation, hence only lengths that come again (graphs round theirs up)."""
    if cu_seqlens is not None or max_len % 64 or (window is not None and window < max_len and max_len % window):
        return False
    fits = q.shape[-1] in (64, 128) and q.dtype in (torch.bfloat16, torch.float16)
    return fits and torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(q.device) >= (9, 0)


def _window(window: int | None) -> tuple[int | None, int | None, bool]:
    """window_size_left, window_size_right and is_causal. The kernel counts the tokens before the token itself."""
    return (None, None, True) if window is None else (window - 1, 0, False)


def _rows(tensor: Tensor, cu_seqlens: Tensor | None, max_len: int) -> Tensor:
    """[rows, max_len, heads, head_dim] for documents of one length, as it is for documents of many."""
    return tensor.unflatten(0, (-1, max_len)) if cu_seqlens is None else tensor


def _repeated(tensor: Tensor, q: Tensor) -> Tensor:
    """One kv head for each query head, in the type that sums are done in."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(wide).repeat_interleave(q.shape[1] // tensor.shape[1], dim=1)


def _softmax(
    q: Tensor, k: Tensor, window: int | None, cu_seqlens: Tensor | None, max_len: int
) -> tuple[Tensor, Tensor]:
    """Attention weights [heads, N, N] and the logarithms of their denominators [heads, N]."""
    place = torch.arange(len(q), device=q.device)
    if cu_seqlens is None:
        document = place // max_len
    else:
        document = torch.searchsorted(cu_seqlens.to(place.dtype), place, right=True)
    distance = place[:, None] - place[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    keys = _repeated(k, q)
    scores = torch.einsum("nhd,mhd->hnm", q.to(keys.dtype), keys) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, float("-inf"))
    log_sum = scores.logsumexp(-1)
    return (scores - log_sum[..., None]).exp(), log_sum


def _plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    window: int | None,
    cu_seqlens: Tensor | None,
    max_len: int,
) -> tuple[Tensor, Tensor, Tensor]:
    weights, _ = _softmax(q, k, window, cu_seqlens, max_len)
    keys, values = _repeated(k, q), _repeated(v, q)
    grad = grad.to(keys.dtype)
    dweights = torch.einsum("nhd,mhd->hnm", grad, values)
    # The sum over a row of weights * dweights is that of grad * out.
    mean = (grad * out.to(grad.dtype)).sum(-1).t()[..., None]
    dscores = weights * (dweights - mean) * q.shape[-1] ** -0.5
    dq = torch.einsum("hnm,mhd->nhd", dscores, keys)
    dk = torch.einsum("hnm,nhd->mhd", dscores, q.to(keys.dtype))
    dv = torch.einsum("hnm,nhd->mhd", weights, grad)
    dk, dv = (d.unflatten(1, (k.shape[1], -1)).sum(2) for d in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
