"""Attention over documents: the plain one against torch's own with a mask, the flash kernels against the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from triton_sft_pipeline.training.fast.attention import Documents, find_documents, flash, flash_backward

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def reference(q: Tensor, k: Tensor, v: Tensor, window: int | None, lengths: list[int]) -> Tensor:
    """Each document alone through torch's attention, with a mask that is written out."""
    outs, start = [], 0
    for length in lengths:
        part = [x[start : start + length].transpose(0, 1) for x in (q, k, v)]
        mask = torch.zeros(length, length, dtype=torch.bool, device=q.device)
        for row in range(length):
            mask[row, max(0, row + 1 - (window or length)) : row + 1] = True
        repeat = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(repeat, 0) for x in part[1:])
        outs.append(functional.scaled_dot_product_attention(part[0], keys, values, attn_mask=mask).transpose(0, 1))
        start += length
    return torch.cat(outs)


def random_inputs(tokens: int, dtype: torch.dtype, device: str = "cpu", dim: int = HEAD_DIM) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, HEADS, dim), (tokens, KV_HEADS, dim), (tokens, KV_HEADS, dim), (tokens, HEADS, dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("lengths", [[12], [6, 6], [7, 1, 4]], ids=["one", "two-alike", "three"])
def test_output_and_gradients_are_those_of_masked_attention(window: int | None, lengths: list[int]) -> None:
    q, k, v, grad = random_inputs(12, torch.float64)
    for x in (q, k, v):
        x.requires_grad_()
    expected = reference(q, k, v, window, lengths)
    expected.backward(grad)

    documents = _documents(lengths)
    with torch.no_grad():
        out, log_sum, random = flash(q, k, v, window, documents.ends, documents.longest)
        found = flash_backward(grad, q, k, v, out, log_sum, random, window, documents.ends, documents.longest)

    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for gradient, x in zip(found, (q, k, v), strict=True):
        torch.testing.assert_close(gradient, x.grad, rtol=1e-11, atol=1e-11)


def test_the_log_sum_is_that_of_the_scores() -> None:
    q, k, v, _ = random_inputs(5, torch.float64)
    _, log_sum, _ = flash(q, k, v, None, None, 5)
    scores = q[4, 3] @ k[:, 1].T * HEAD_DIM**-0.5
    torch.testing.assert_close(log_sum[3, 4], scores.logsumexp(0))


def test_half_precision_keeps_its_type() -> None:
    q, k, v, grad = random_inputs(6, torch.bfloat16)
    out, log_sum, random = flash(q, k, v, 3, None, 6)
    assert out.dtype == torch.bfloat16
    found = flash_backward(grad, q, k, v, out, log_sum, random, 3, None, 6)
    assert [(x.dtype, x.shape) for x in found] == [(torch.bfloat16, x.shape) for x in (q, k, v)]


def test_rows_without_positions_are_documents() -> None:
    assert find_documents(None, 3, 7) == Documents(None, 7)
    assert find_documents(torch.arange(7)[None], 3, 7) == Documents(None, 7)


def test_a_document_begins_where_positions_begin_again() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    documents = find_documents(positions, 2, 5)
    assert documents.ends is not None and documents.ends.dtype == torch.int32
    assert documents.ends.tolist() == [0, 3, 5, 6, 10]
    assert documents.longest == 4


def test_a_row_begins_a_document_whatever_its_first_position() -> None:
    documents = find_documents(torch.tensor([[4, 5, 0], [4, 5, 6]]), 2, 3)
    assert documents.ends is not None
    assert documents.ends.tolist() == [0, 2, 3, 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("window", [None, 100, 128, 512])
@pytest.mark.parametrize("lengths", [[512], [256, 256], [300, 12, 200], [500]], ids=["one", "two", "three", "odd"])
def test_flash_kernels_agree_with_masked_attention(window: int | None, lengths: list[int]) -> None:
    q, k, v, grad = random_inputs(sum(lengths), torch.bfloat16, "cuda", 128)
    wide = [x.float().requires_grad_() for x in (q, k, v)]
    expected = reference(*wide, window, lengths)
    expected.backward(grad.float())

    documents = _documents(lengths)
    ends = None if documents.ends is None else documents.ends.cuda()
    # Values come as columns of a wider matrix.
    v = torch.cat((v.flatten(1), v.flatten(1)), 1)[:, : KV_HEADS * 128].unflatten(1, (KV_HEADS, 128))
    out, log_sum, random = flash(q, k, v, window, ends, documents.longest)
    found = flash_backward(grad, q, k, v, out, log_sum, random, window, ends, documents.longest)

    assert _error(out, expected) < 1e-2
    for gradient, x in zip(found, wide, strict=True):
        assert x.grad is not None
        assert _error(gradient, x.grad) < 1e-2


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


def _documents(lengths: list[int]) -> Documents:
    if len(set(lengths)) == 1:
        return Documents(None, lengths[0])
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Documents(ends, max(lengths))
