"""Grouped matrix products: rows of one matrix, group by group, each group with a matrix of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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
