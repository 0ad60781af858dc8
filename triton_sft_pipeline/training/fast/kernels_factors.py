"""Triton kernels of the products with experts' LoRA factors: rows of many numbers times a matrix of few columns, and
back. Each reads or writes the large side once, where a general grouped product spends its tiles on columns that are not
there. Same signatures as twins.py."""

# The arguments of a kernel are written in Triton, where only constants are annotated.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sft_pipeline.training.fast.twins import straight

# Where a factor has fewer columns than a tile, loads wrap around instead of being masked: neighbours in memory stay
# neighbours, and what the columns too many compute is not stored.

# -- which rows a program has --------------------------------------------------------------------------------------


@triton.jit
def _rows_of(ends, program, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr):
    """(expert, first row, row behind the expert's last) of the program-th tile of at most ROWS rows of one expert; an
    expert from E on where there are fewer tiles. Tiles are numbered expert by expert."""
    each = tl.arange(0, BLOCK_E)
    end = tl.load(ends + each, mask=each < E, other=0)
    start = tl.load(ends + each - 1, mask=(each > 0) & (each < E), other=0)
    tiles = tl.where(each < E, (end - start + ROWS - 1) // ROWS, 0)
    upto = tl.cumsum(tiles, 0)
    # Behind the last expert `upto` stays as it is: a program without rows counts them, too.
    expert = tl.sum((upto <= program).to(tl.int32), 0)
    mine = each == expert
    first = tl.sum(tl.where(mine, start + (program - upto + tiles) * ROWS, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


def _tiles(rows: int, experts: int, height: int) -> int:
    """Programs that suffice however the rows are shared out."""
    return triton.cdiv(rows, height) + experts


def _columns(rank: int) -> int:
    """The factor's columns of a tile: tensor cores take no fewer than 16."""
    return max(triton.next_power_of_2(rank), 16)


# -- shrink: [S, K] to [S, r] --------------------------------------------------------------------------------------


@triton.jit
def _shrink(
    x, w, ends, out, x_stride, w_expert, w_row, w_column, out_stride, scale, K: tl.constexpr, R: tl.constexpr,
    E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    expert, first, last = _rows_of(ends, tl.program_id(0), E, BLOCK_E, ROWS)
    if expert < E:
        row = first + tl.arange(0, ROWS)
        here = (row < last)[:, None]
        rank = tl.arange(0, BLOCK_R)[None, :]
        step = tl.arange(0, BLOCK_K)
        at = x + row.to(tl.int64)[:, None] * x_stride + step[None, :]
        factor = w + expert.to(tl.int64) * w_expert + step[:, None] * w_row + (rank % R) * w_column
        total = tl.zeros([ROWS, BLOCK_R], tl.float32)
        for k in range(0, K, BLOCK_K):
            inside = k + step < K
            large = tl.load(at + k, mask=here & inside[None, :], other=0.0)
            small = tl.load(factor + k * w_row, mask=inside[:, None], other=0.0)
            total = tl.dot(large, small, total, input_precision="ieee")
        tl.store(out + row.to(tl.int64)[:, None] * out_stride + rank, total * scale, mask=here & (rank < R))


def shrink(x: Tensor, w: Tensor, offsets: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    x = straight(x)
    experts, width, rank = w.shape
    if out is None:
        out = torch.empty((x.shape[0], rank), dtype=x.dtype, device=x.device)
    block = _columns(rank)
    # Here as below, the best of five or six tiles each for 8 and for 64 columns on an H200; between them it is a guess.
    deep, stages = (64, 5) if block > 32 else (128, 4)
    _shrink[(_tiles(x.shape[0], experts, 64),)](
        x, w, offsets, out, x.stride(0), *w.stride(), out.stride(0), float(scale), width, rank, experts,
        triton.next_power_of_2(experts), 64, deep, block, num_stages=stages,
    )  # fmt: skip
    return out


# -- expand: [S, r] to [S, n] --------------------------------------------------------------------------------------


@triton.jit
def _expand(
    t, w, ends, out, t_stride, w_expert, w_row, w_column, N: tl.constexpr, R: tl.constexpr, E: tl.constexpr,
    BLOCK_E: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    expert, first, last = _rows_of(ends, tl.program_id(0), E, BLOCK_E, ROWS)
    if expert < E:
        row = first + tl.arange(0, ROWS)
        here = (row < last)[:, None]
        rank = tl.arange(0, BLOCK_R)
        step = tl.arange(0, BLOCK_N)
        place = row.to(tl.int64)[:, None]
        # Zeros in the columns too many: here they are summed over.
        small = tl.load(t + place * t_stride + rank[None, :], mask=here & (rank < R)[None, :], other=0.0)
        factor = w + expert.to(tl.int64) * w_expert + (rank % R)[:, None] * w_row + step[None, :] * w_column
        for n in range(0, N, BLOCK_N):
            inside = (n + step < N)[None, :]
            large = tl.load(factor + n * w_column, mask=inside, other=0.0)
            made = tl.dot(small, large, input_precision="ieee")
            tl.store(out + place * N + n + step[None, :], made, mask=here & inside)


def expand(t: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    t = straight(t)
    experts, rank, width = w.shape
    out = torch.empty((t.shape[0], width), dtype=t.dtype, device=t.device)
    block = _columns(rank)
    rows = 64 if block > 32 else 32
    _expand[(_tiles(t.shape[0], experts, rows),)](
        t, w, offsets, out, t.stride(0), *w.stride(), width, rank, experts, triton.next_power_of_2(experts), rows, 128,
        block, num_stages=3,
    )  # fmt: skip
    return out


# -- outer: [S, K] and [S, r] to [E, K, r] -------------------------------------------------------------------------


@triton.jit
def _outer(
    x, t, ends, out, x_stride, t_stride, out_row, out_column, K: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    last = tl.load(ends + expert)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = column < K
    rank = tl.arange(0, BLOCK_R)[None, :]
    line = tl.arange(0, ROWS)
    total = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    for row in range(first, last, ROWS):
        here = (row + line < last)[:, None]
        at = (row + line).to(tl.int64)[:, None]
        large = tl.load(x + at * x_stride + column[None, :], mask=here & inside[None, :], other=0.0)
        small = tl.load(t + at * t_stride + rank % R, mask=here, other=0.0)
        total = tl.dot(tl.trans(large), small, total, input_precision="ieee")
    to = out + expert.to(tl.int64) * (K * R) + column[:, None] * out_row + rank * out_column
    tl.store(to, total, mask=inside[:, None] & (rank < R))


def outer(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    x, y = straight(x), straight(y)
    experts = offsets.numel()
    out = torch.empty((experts, x.shape[1], y.shape[1]), dtype=x.dtype, device=x.device)
    turned = x.shape[1] < y.shape[1]
    large, small = (y, x) if turned else (x, y)
    width, rank = large.shape[1], small.shape[1]
    block = _columns(rank)
    rows, stages = (64, 4) if block > 32 else (128, 3)
    _outer[triton.cdiv(width, 64), experts](
        large, small, offsets, out, large.stride(0), small.stride(0), *((1, width) if turned else (rank, 1)), width,
        rank, rows, 64, block, num_stages=stages,
    )  # fmt: skip
    return out
