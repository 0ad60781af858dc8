"""Triton kernels around attention by blocks (blocks.py): they read blocks backwards, and bring two halves together.
Same signatures as twins.py.

A program holds a token. Of a token in a later block, reversed place p is place window - 2 - p; of the keys that it is
compared with, in the block before, it is place window - 1 - p."""

# The arguments of a kernel are written in Triton, where only constants are annotated.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


def _flat(tensor: Tensor) -> Tensor:
    """[rows * tokens, heads * head_dim], a view of everything that the layer has."""
    return tensor.flatten(0, 1).flatten(1)


def _tiles(late: int, early: int) -> tuple[int, int, int]:
    """(elements of a late row, of an early row, warps). At least an element a thread: where several threads hold the
    same element, one might read what another has already written."""
    block = triton.next_power_of_2(late)
    warps = min(max(block // 512, 1), 8)
    return max(block, 32 * warps), max(triton.next_power_of_2(early), 32 * warps), warps


@triton.jit
def _places(program, blocks, WINDOW: tl.constexpr):
    """Of a program: which pair of blocks, which place in it, and the tokens of either block."""
    pair = program // (WINDOW - 1)
    place = program % (WINDOW - 1)
    block = (pair // (blocks - 1)) * blocks + pair % (blocks - 1) + 1
    late = block.to(tl.int64) * WINDOW + (WINDOW - 2 - place)
    return pair, place, block, late, late - (WINDOW - 1)


@triton.jit
def _copy(source, target, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < COLUMNS
    tl.store(target + at, tl.load(source + at, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def _reverse_blocks(
    late0, late1, late2, early0, early1, sums, late0_out, late1_out, late2_out, early0_out, early1_out, sums_out,
    late0_stride, late1_stride, late2_stride, early0_stride, early1_stride, blocks,
    WINDOW: tl.constexpr, LATE: tl.constexpr, EARLY: tl.constexpr, HEADS: tl.constexpr, COUNT: tl.constexpr,
    SUMS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    far = program.to(tl.int64)
    pair, place, block, late, early = _places(program, blocks, WINDOW)
    _copy(late0 + late * late0_stride, late0_out + far * LATE, LATE, BLOCK_L)
    if COUNT > 1:
        _copy(late1 + late * late1_stride, late1_out + far * LATE, LATE, BLOCK_L)
    if COUNT > 2:
        _copy(late2 + late * late2_stride, late2_out + far * LATE, LATE, BLOCK_L)
    _copy(early0 + early * early0_stride, early0_out + far * EARLY, EARLY, BLOCK_E)
    _copy(early1 + early * early1_stride, early1_out + far * EARLY, EARLY, BLOCK_E)
    if SUMS:
        head = tl.arange(0, BLOCK_H)
        there = head < HEADS
        value = tl.load(sums + (block * HEADS + head) * WINDOW + (WINDOW - 2 - place), mask=there)
        tl.store(sums_out + (pair * HEADS + head) * (WINDOW - 1) + place, value, mask=there)


def reverse_blocks(
    late: Sequence[Tensor], early: Sequence[Tensor], window: int, log_sum: Tensor | None = None
) -> tuple[Tensor, ...]:
    rows, tokens, heads, head_dim = late[0].shape
    pairs = rows * (tokens // window - 1)
    sources = [_flat(t) for t in (*late, *early)]
    targets = [t.new_empty(pairs, window - 1, *t.shape[2:]) for t in (*late, *early)]
    # Arguments that the kernel never looks at.
    spare = 3 - len(late)
    if log_sum is None:
        sums, sums_out = sources[0], targets[0]
    else:
        sums, sums_out = log_sum.contiguous(), log_sum.new_empty(pairs, heads, window - 1)
    count, columns = len(late), (heads * head_dim, sources[-1].shape[1])
    wide, narrow, warps = _tiles(*columns)
    _reverse_blocks[(pairs * (window - 1),)](
        *sources[:count], *sources[:1] * spare, *sources[count:], sums,
        *targets[:count], *targets[:1] * spare, *targets[count:], sums_out,
        *(t.stride(0) for t in (*sources[:count], *sources[:1] * spare, *sources[count:])), tokens // window,
        window, *columns, heads, count, log_sum is not None, wide, narrow, triton.next_power_of_2(heads),
        num_warps=warps,
    )  # fmt: skip
    return (*targets,) if log_sum is None else (*targets, sums_out)


@triton.jit(do_not_specialize=["blocks"])
def _merge_blocks(
    own, own_sum, before, before_sum, merged_sum, blocks,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = program // WINDOW
    place = program % WINDOW
    head = tl.arange(0, BLOCK_H)
    there = head < HEADS
    sum_at = (block * HEADS + head) * WINDOW + place
    mine = tl.load(own_sum + sum_at, mask=there, other=0.0)
    if (block % blocks > 0) & (place < WINDOW - 1):
        pair = (block // blocks) * (blocks - 1) + block % blocks - 1
        turned = WINDOW - 2 - place
        theirs = tl.load(before_sum + (pair * HEADS + head) * (WINDOW - 1) + turned, mask=there, other=0.0)
        merged = tl.maximum(mine, theirs) + tl.log(1.0 + tl.exp(-tl.abs(mine - theirs)))
        tl.store(merged_sum + sum_at, merged, mask=there)
        share = tl.sigmoid(theirs - mine)[:, None]
        column = tl.arange(0, BLOCK_D)[None, :]
        inside = there[:, None] & (column < D)
        within = head[:, None] * D + column
        to = own + program.to(tl.int64) * (HEADS * D) + within
        other = before + (pair.to(tl.int64) * (WINDOW - 1) + turned) * (HEADS * D) + within
        a = tl.load(to, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(other, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, a + (b - a) * share, mask=inside)
    else:
        tl.store(merged_sum + sum_at, mine, mask=there)


def merge_blocks(own: Tensor, own_sum: Tensor, before: Tensor, before_sum: Tensor) -> Tensor:
    rows, tokens, heads, head_dim = own.shape
    window = own_sum.shape[-1]
    # Not in place: several threads hold the same denominator.
    merged = torch.empty_like(own_sum, memory_format=torch.contiguous_format)
    block_h, block_d = triton.next_power_of_2(heads), triton.next_power_of_2(head_dim)
    _merge_blocks[(rows * tokens,)](
        own, own_sum.contiguous(), before.contiguous(), before_sum.contiguous(), merged, tokens // window,
        window, heads, head_dim, block_h, block_d, num_warps=min(max(block_h * block_d // 512, 1), 8),
    )  # fmt: skip
    return merged


@triton.jit
def _add(target, source, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < COLUMNS
    value = tl.load(target + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + at, value, mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def _add_reversed(
    late, early0, early1, late_turned, early0_turned, early1_turned, blocks,
    WINDOW: tl.constexpr, LATE: tl.constexpr, EARLY: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    far = program.to(tl.int64)
    _, _, _, to, before = _places(program, blocks, WINDOW)
    _add(late + to * LATE, late_turned + far * LATE, LATE, BLOCK_L)
    _add(early0 + before * EARLY, early0_turned + far * EARLY, EARLY, BLOCK_E)
    _add(early1 + before * EARLY, early1_turned + far * EARLY, EARLY, BLOCK_E)


def add_reversed(dq: Tensor, dk: Tensor, dv: Tensor, turned: Sequence[Tensor], window: int) -> None:
    rows, tokens, heads, head_dim = dq.shape
    columns = heads * head_dim, dk.shape[2] * head_dim
    wide, narrow, warps = _tiles(*columns)
    _add_reversed[(rows * (tokens // window - 1) * (window - 1),)](
        dq, dk, dv, *(t.contiguous() for t in turned), tokens // window,
        window, *columns, wide, narrow, num_warps=warps,
    )  # fmt: skip
