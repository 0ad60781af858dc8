"""A window out of blocks: what attention with a mask gives, with a causal attention that knows no window."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from triton_sft_pipeline.training.fast import attention, blocks

HEADS, KV_HEADS, DIM = 4, 2, 8


def plain_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, log_sum, _ = attention.flash(*(t.flatten(0, 1) for t in (q, k, v)), None, None, q.shape[1])
    return out.view(q.shape), log_sum.unflatten(1, (len(q), -1)).transpose(0, 1).contiguous()


def plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """By the formula of flash attention, out of `out` and `log_sum` alone: what the merging relies on."""
    repeat = q.shape[2] // k.shape[2]
    keys, values = (t.repeat_interleave(repeat, 2) for t in (k, v))
    scale = q.shape[-1] ** -0.5
    scores = torch.einsum("rnhd,rmhd->rhnm", q, keys) * scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = (scores - log_sum[..., None]).exp().masked_fill(hidden, 0.0)
    dweights = torch.einsum("rnhd,rmhd->rhnm", grad, values)
    mean = (grad * out).sum(-1).transpose(1, 2)[..., None]
    dscores = weights * (dweights - mean) * scale
    dq = torch.einsum("rhnm,rmhd->rnhd", dscores, keys)
    dk = torch.einsum("rhnm,rnhd->rmhd", dscores, q)
    dv = torch.einsum("rhnm,rnhd->rmhd", weights, grad)
    return dq, *(d.unflatten(2, (k.shape[2], -1)).sum(3) for d in (dk, dv))


PLAIN = blocks.Causal(plain_forward, plain_backward)


def inputs(rows: int, tokens: int, dtype: torch.dtype, device: str = "cpu", dim: int = DIM) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [
        torch.randn(rows, tokens, h, dim, generator=generator, dtype=torch.float64).to(device, dtype) for h in heads
    ]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("tokens", "window"), [(12, None), (12, 12), (12, 40), (12, 6), (12, 4), (12, 2), (12, 1)])
def test_output_denominator_and_gradients_are_those_of_a_mask(rows: int, tokens: int, window: int | None) -> None:
    q, k, v, grad = inputs(rows, tokens, torch.float64)
    out, log_sum = blocks.forward(q, k, v, window, PLAIN)
    found = blocks.backward(grad, q, k, v, out, log_sum, window, PLAIN)

    flat = [t.flatten(0, 1) for t in (q, k, v)]
    expected, expected_sum, _ = attention.flash(*flat, window, None, tokens)
    torch.testing.assert_close(out.flatten(0, 1), expected)
    if window is not None and window < tokens:
        log_sum = log_sum.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(log_sum, expected_sum.unflatten(1, (rows, -1)).transpose(0, 1))
    expected_gradients = attention.flash_backward(
        grad.flatten(0, 1), *flat, expected, expected_sum, None, window, None, tokens
    )
    for one, other in zip(found, expected_gradients, strict=True):
        torch.testing.assert_close(one.flatten(0, 1), other)


def test_a_token_beyond_the_window_changes_nothing() -> None:
    q, k, v, _ = inputs(1, 12, torch.float64)
    before, _ = blocks.forward(q, k, v, 4, PLAIN)
    k[:, 3], v[:, 3] = 9.0, 9.0
    after, _ = blocks.forward(q, k, v, 4, PLAIN)
    changed = (before != after).flatten(2).any(-1)[0].tolist()
    assert changed == [False] * 3 + [True] * 4 + [False] * 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("tokens", "window"), [(512, None), (512, 256), (512, 128)])
def test_cudnns_blocks_are_as_near_as_flash_to_attention_in_float32(tokens: int, window: int | None) -> None:
    q, k, v, grad = inputs(2, tokens, torch.bfloat16, "cuda", 128)
    out, log_sum = blocks.forward(q, k, v, window, blocks.CUDNN)
    found = [out, *blocks.backward(grad, q, k, v, out, log_sum, window, blocks.CUDNN)]

    wide = [t.cpu().float() for t in (q, k, v)]
    exact, exact_sum = blocks.forward(*wide, window, PLAIN)
    exact_gradients = blocks.backward(grad.cpu().float(), *wide, exact, exact_sum, window, PLAIN)
    for one, other in zip(found, [exact, *exact_gradients], strict=True):
        assert float((one.cpu().float() - other).norm() / other.norm()) < 1e-2
