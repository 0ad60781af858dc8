"""Triton kernels of the expert block: router, counting sort of the routes, gather and combine. Same signatures as
twins.py."""

# The arguments of a kernel are written in Triton, where only constants are annotated.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sft_pipeline.training.fast import twins
from triton_sft_pipeline.training.fast.kernels_rows import draw, lane_tile, philox_words, seed_argument, tile
from triton_sft_pipeline.training.fast.twins import LANES, dropout_threshold, straight

# -- gather and combine --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _gather(x, index, out, rows, x_stride, out_stride, columns: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = tl.load(index + line, mask=line < rows, other=0)[:, None]
    row = line[:, None].to(tl.int64)
    at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (at < columns)
    tl.store(out + row * out_stride + at, tl.load(x + source * x_stride + at, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def _gather_dropout(
    x, index, out, dropped, seed, threshold, factor, rows, x_stride, out_stride, columns: tl.constexpr,
    group: tl.constexpr, SEED: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = tl.load(index + line, mask=line < rows, other=0)[:, None]
    row = line[:, None].to(tl.int64)
    near = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    words = philox_words(seed, line[:, None] * group + near, SEED)
    for lane in tl.static_range(LANES):
        at = near + lane * group
        inside = (row < rows) & (near < group) & (at < columns)
        value = tl.load(x + source * x_stride + at, mask=inside)
        tl.store(out + row * out_stride + at, value, mask=inside)
        kept = tl.where(draw(words, lane) >= threshold, value.to(tl.float32) * factor, 0.0)
        tl.store(dropped + row * columns + at, kept, mask=inside)


def gather(x: Tensor, index: Tensor, p: float = 0.0, seed: int | Tensor = 0, out: Tensor | None = None) -> Any:
    x, index = straight(x), index.contiguous()
    rows, columns = index.shape[0], x.shape[1]
    if out is None:
        out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if p == 0:
        height, width = tile(columns, 4096)
        grid = (triton.cdiv(rows, height), triton.cdiv(columns, width))
        _gather[grid](x, index, out, rows, x.stride(0), out.stride(0), columns, height, width)
        return out
    dropped = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    number, in_memory = seed_argument(seed, x.device)
    group, height, width = lane_tile(columns)
    grid = (triton.cdiv(rows, height), triton.cdiv(group, width))
    _gather_dropout[grid](
        x, index, out, dropped, number, dropout_threshold(p), 1.0 / (1 - p), rows, x.stride(0), out.stride(0),
        columns, group, in_memory, LANES, height, width,
    )  # fmt: skip
    return out, dropped


@triton.jit
def _combine(
    y, y2, inverse, weights, add, out, y_stride, y2_stride, add_stride, scale2, columns: tl.constexpr,
    K: tl.constexpr, WEIGHTS: tl.constexpr, SECOND: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(K):
        row = tl.load(inverse + token * K + choice)
        term = tl.load(y + row * y_stride + at, mask=inside, other=0.0).to(tl.float32)
        if SECOND:
            term += tl.load(y2 + row * y2_stride + at, mask=inside, other=0.0).to(tl.float32) * scale2
        if WEIGHTS:
            term *= tl.load(weights + token * K + choice)
        total += term
    result = total.to(out.dtype.element_ty)
    if ADD:
        result = result.to(tl.float32) + tl.load(add + token * add_stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * columns + at, result, mask=inside)


@triton.jit
def _lane_term(here, other, words, threshold, factor, inside, lane: tl.constexpr):
    """A lane's columns of a row, plus those of the second addend that dropout keeps."""
    value = tl.load(other, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(draw(words, lane) >= threshold, value * factor, 0.0)
    return tl.load(here, mask=inside, other=0.0).to(tl.float32) + value


@triton.jit(do_not_specialize=["seed", "threshold"])
def _combine_dropout(
    y, y2, inverse, out, seed, threshold, factor, y_stride, y2_stride, columns: tl.constexpr, group: tl.constexpr,
    K: tl.constexpr, SEED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    near = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # A sum for each of the eight lanes: a counter's draws are for all of them, and Triton has no lists.
    in0, in1 = (near < group) & (near < columns), (near < group) & (near + group < columns)
    in2, in3 = (near < group) & (near + 2 * group < columns), (near < group) & (near + 3 * group < columns)
    in4, in5 = (near < group) & (near + 4 * group < columns), (near < group) & (near + 5 * group < columns)
    in6, in7 = (near < group) & (near + 6 * group < columns), (near < group) & (near + 7 * group < columns)
    t0 = tl.zeros([BLOCK], tl.float32)
    t1, t2, t3, t4, t5, t6, t7 = t0, t0, t0, t0, t0, t0, t0
    for choice in tl.static_range(K):
        row = tl.load(inverse + token * K + choice)
        # The counter as everywhere: 32 bits of row * group + column.
        words = philox_words(seed, row.to(tl.int32) * group + near, SEED)
        a = y + row * y_stride + near
        b = y2 + row * y2_stride + near
        t0 += _lane_term(a, b, words, threshold, factor, in0, 0)
        t1 += _lane_term(a + group, b + group, words, threshold, factor, in1, 1)
        t2 += _lane_term(a + 2 * group, b + 2 * group, words, threshold, factor, in2, 2)
        t3 += _lane_term(a + 3 * group, b + 3 * group, words, threshold, factor, in3, 3)
        t4 += _lane_term(a + 4 * group, b + 4 * group, words, threshold, factor, in4, 4)
        t5 += _lane_term(a + 5 * group, b + 5 * group, words, threshold, factor, in5, 5)
        t6 += _lane_term(a + 6 * group, b + 6 * group, words, threshold, factor, in6, 6)
        t7 += _lane_term(a + 7 * group, b + 7 * group, words, threshold, factor, in7, 7)
    to = out + token * columns + near
    tl.store(to, t0, mask=in0)
    tl.store(to + group, t1, mask=in1)
    tl.store(to + 2 * group, t2, mask=in2)
    tl.store(to + 3 * group, t3, mask=in3)
    tl.store(to + 4 * group, t4, mask=in4)
    tl.store(to + 5 * group, t5, mask=in5)
    tl.store(to + 6 * group, t6, mask=in6)
    tl.store(to + 7 * group, t7, mask=in7)


def combine_dropout(y: Tensor, inverse: Tensor, y2: Tensor, p: float, seed: int | Tensor) -> Tensor:
    y, y2 = straight(y), straight(y2)
    rows, columns = inverse.shape[0], y.shape[1]
    out = torch.empty((rows, columns), dtype=y.dtype, device=y.device)
    number, in_memory = seed_argument(seed, y.device)
    group = triton.cdiv(columns, LANES)
    block = min(triton.next_power_of_2(group), 256)
    # Two warps: 4 columns of every lane for each thread.
    _combine_dropout[rows, triton.cdiv(group, block)](
        y, y2, inverse.contiguous(), out, number, dropout_threshold(p), 1.0 / (1 - p), y.stride(0), y2.stride(0),
        columns, group, inverse.shape[1], in_memory, block, num_warps=2 if block > 128 else 1,
    )  # fmt: skip
    return out


def combine(
    y: Tensor,
    inverse: Tensor,
    weights: Tensor | None,
    add: Tensor | None = None,
    y2: Tensor | None = None,
    scale2: float = 1.0,
) -> Tensor:
    y = straight(y)
    rows, columns = inverse.shape[0], y.shape[1]
    out = torch.empty((rows, columns), dtype=y.dtype, device=y.device)
    block = min(triton.next_power_of_2(columns), 2048)
    second, added = (y if y2 is None else straight(y2)), (y if add is None else straight(add))
    _combine[rows, triton.cdiv(columns, block)](
        y, second, inverse.contiguous(), out if weights is None else weights.contiguous(), added, out,
        y.stride(0), second.stride(0), added.stride(0), float(scale2), columns, inverse.shape[1],
        weights is not None, y2 is not None, add is not None, block, num_warps=max(min(block // 256, 8), 1),
    )  # fmt: skip
    return out


# -- the adapters' second factors: expert first for products, expert last in PEFT's file ---------------------------


@triton.jit
def _fill_b(
    b, out, expert_stride, row_stride, rank_stride, out_expert_stride, out_row_stride, rows, E: tl.constexpr,
    R: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, LINES: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # Read along the experts, written along the ranks: the tile changes hands in between.
    line = tl.program_id(0) * (LINES * BLOCK_R) + tl.arange(0, LINES * BLOCK_R)
    row, rank = (line // BLOCK_R).to(tl.int64), line % BLOCK_R
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = ((row < rows) & (rank < R))[:, None] & (expert < E)[None, :]
    source = b + row[:, None] * row_stride + rank[:, None] * rank_stride + expert[None, :] * expert_stride
    tile = tl.trans(tl.load(source, mask=inside, other=0.0))
    to = out + expert.to(tl.int64)[:, None] * out_expert_stride + row[None, :] * out_row_stride + rank[None, :]
    tl.store(to, tile, mask=(expert < E)[:, None] & ((row < rows) & (rank < WIDTH))[None, :])


def fill_b(b: Tensor, out: Tensor) -> None:
    experts, rows, rank = b.shape
    block_r = triton.next_power_of_2(out.shape[2])
    # 32 numbers are 64 bytes of a line of PEFT's factor.
    block_e = min(triton.next_power_of_2(experts), max(2048 // block_r, 32))
    lines = max(2048 // (block_r * block_e), 1)
    _fill_b[triton.cdiv(rows, lines), triton.cdiv(experts, block_e)](
        b, out, b.stride(0), b.stride(1), b.stride(2), out.stride(0), out.stride(1), rows, experts,
        rank, out.shape[2], block_r, lines, block_e,
    )  # fmt: skip


@triton.jit
def _join_b(
    b, out, expert_stride, row_stride, lines, E: tl.constexpr, R: tl.constexpr, DENSE: tl.constexpr,
    LINES: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # A line is a row and a rank. Read along the lines, written along the experts.
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    source = b + expert.to(tl.int64)[:, None] * expert_stride
    source += (line if DENSE else (line // R).to(tl.int64) * row_stride + line % R)[None, :]
    tile = tl.trans(tl.load(source, mask=(expert < E)[:, None] & (line < lines)[None, :]))
    to = out + line.to(tl.int64)[:, None] * E + expert[None, :]
    tl.store(to, tile, mask=(line < lines)[:, None] & (expert < E)[None, :])


def join_b(b: Tensor) -> Tensor:
    b = straight(b)
    experts, rows, rank = b.shape
    out = torch.empty((rows, rank * experts), dtype=b.dtype, device=b.device)
    block = min(triton.next_power_of_2(experts), 64)
    _join_b[triton.cdiv(rows * rank, 64), triton.cdiv(experts, block)](
        b, out, b.stride(0), b.stride(1), rows * rank, experts, rank, b.stride(1) == rank, 64, block
    )
    return out


# -- router --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _router(
    logits, bias, weights, index, rows, stride, route_scale, E: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK_E)[None, :]
    choice = tl.arange(0, BLOCK_K)[None, :]
    inside = (line[:, None] < rows) & (expert < E)
    here = logits + line[:, None].to(tl.int64) * stride
    left = tl.sigmoid(tl.load(here + expert, mask=inside).to(tl.float32))
    left += tl.load(bias + expert, mask=expert < E, other=0.0).to(tl.float32)
    # One integer whose order is that of the scores, and of equal scores that of falling expert numbers.
    bits = left.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    lowest = -0x8000000000000000
    key = tl.where(expert < E, (bits.to(tl.int64) << 32) | (BLOCK_E - 1 - expert).to(tl.int64), lowest)
    chosen = tl.zeros([ROWS, BLOCK_K], tl.int64)
    for j in tl.static_range(K):
        best = tl.max(key, 1)[:, None]
        key = tl.where(key == best, lowest, key)
        chosen = tl.where(choice == j, best, chosen)
    chosen = tl.minimum(BLOCK_E - 1 - (chosen & 0xFFFFFFFF), E - 1)
    kept = (line[:, None] < rows) & (choice < K)
    top = tl.sigmoid(tl.load(here + chosen, mask=kept, other=0.0).to(tl.float32))
    top = tl.where(choice < K, top, 0.0)
    share = top / (tl.sum(top, 1)[:, None] + 1e-20) * route_scale
    at = line[:, None].to(tl.int64) * K + choice
    tl.store(weights + at, share, mask=kept)
    tl.store(index + at, chosen, mask=kept)


def router(logits: Tensor, bias: Tensor, k: int, route_scale: float) -> tuple[Tensor, Tensor]:
    rows, experts = logits.shape
    weights = torch.empty((rows, k), dtype=torch.float32, device=logits.device)
    index = torch.empty((rows, k), dtype=torch.int64, device=logits.device)
    block = triton.next_power_of_2(experts)
    height = max(512 // block, 1)
    _router[(triton.cdiv(rows, height),)](
        logits, bias, weights, index, rows, logits.stride(0), float(route_scale), experts, k,
        height, block, triton.next_power_of_2(k), num_warps=1,
    )  # fmt: skip
    return weights, index


@triton.jit(do_not_specialize=["rows"])
def _router_backward(
    dweights, logits, index, dlogits, rows, stride, route_scale, E: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = line < rows
    row = line.to(tl.int64)
    expert = tl.arange(0, BLOCK_E)[None, :]
    total = tl.zeros([ROWS], tl.float32) + 1e-20
    share = tl.zeros([ROWS], tl.float32)
    for j in tl.static_range(K):
        chosen = tl.load(index + row * K + j, mask=there, other=0)
        score = tl.sigmoid(tl.load(logits + row * stride + chosen, mask=there, other=0.0).to(tl.float32))
        total += score
        share += score * tl.load(dweights + row * K + j, mask=there, other=0.0)
    share = share / total
    result = tl.zeros([ROWS, BLOCK_E], tl.float32)
    for j in tl.static_range(K):
        chosen = tl.load(index + row * K + j, mask=there, other=0)
        score = tl.sigmoid(tl.load(logits + row * stride + chosen, mask=there, other=0.0).to(tl.float32))
        grad = tl.load(dweights + row * K + j, mask=there, other=0.0) - share
        grad = route_scale * grad / total * score * (1 - score)
        result = tl.where(expert == chosen[:, None], grad[:, None], result)
    tl.store(dlogits + row[:, None] * E + expert, result, mask=there[:, None] & (expert < E))


def router_backward(dweights: Tensor, logits: Tensor, index: Tensor, route_scale: float) -> Tensor:
    rows, experts = logits.shape
    dlogits = torch.empty((rows, experts), dtype=logits.dtype, device=logits.device)
    block = triton.next_power_of_2(experts)
    height = max(1024 // block, 1)
    _router_backward[(triton.cdiv(rows, height),)](
        dweights.contiguous(), logits, index.contiguous(), dlogits, rows, logits.stride(0), float(route_scale),
        experts, index.shape[1], height, block,
    )  # fmt: skip
    return dlogits


# -- counting sort, stable: chunks of routes are counted, then each program places its own chunk -------------------


@triton.jit(do_not_specialize=["rows"])
def _count_routes(index, counts, rows, E: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr):
    chunk = tl.program_id(0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    mine = tl.load(index + at, mask=at < rows, other=-1).to(tl.int32)
    expert = tl.arange(0, BLOCK_E)
    count = tl.sum((mine[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts + chunk * E + expert, count, mask=expert < E)


@triton.jit(do_not_specialize=["rows", "chunks"])
def _place_routes(
    index, counts, order, inverse, tokens, offsets, rows, chunks, E: tl.constexpr, K: tl.constexpr,
    BLOCK_E: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    # Summed over the chunks at the end: a sum across threads takes longer than all the loads.
    totals = tl.zeros([STEP, BLOCK_E], tl.int32)
    befores = tl.zeros([STEP, BLOCK_E], tl.int32)
    first = 0
    while first < chunks:
        other = first + tl.arange(0, STEP)[:, None]
        inside = (other < chunks) & (expert[None, :] < E)
        count = tl.load(counts + other * E + expert[None, :], mask=inside, other=0)
        totals += count
        befores += tl.where(other < chunk, count, 0)
        first += STEP
    total, before = tl.sum(totals, 0), tl.sum(befores, 0)
    ends = tl.cumsum(total, 0)
    if chunk == 0:
        tl.store(offsets + expert, ends, mask=expert < E)
    start = ends - total + before
    here = tl.arange(0, CHUNK)
    at = chunk * CHUNK + here
    mine = tl.load(index + at, mask=at < rows, other=-1).to(tl.int32)
    # The same values once more along the other axis: cheaper to load than to transpose.
    theirs = tl.load(index + chunk * CHUNK + here, mask=at < rows, other=-1).to(tl.int32)
    earlier = (mine[:, None] == theirs[None, :]) & (here[None, :] < here[:, None])
    place = tl.sum(earlier.to(tl.int32), 1)
    place += tl.sum(tl.where(mine[:, None] == expert[None, :], start[None, :], 0), 1)
    kept = (at < rows) & (mine >= 0) & (mine < E)
    tl.store(order + place, at.to(tl.int64), mask=kept)
    tl.store(tokens + place, (at // K).to(tl.int64), mask=kept)
    tl.store(inverse + at, place.to(tl.int64), mask=kept)


def sort_routes(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = index.numel()
    block = triton.next_power_of_2(num_experts)
    if block > 512 or rows == 0:
        return twins.sort_routes(index, num_experts)
    index = index.contiguous()
    order, tokens, inverse = torch.empty((3, rows), dtype=torch.int64, device=index.device).unbind()
    chunk = 128 if rows <= 65536 else 256
    chunks = triton.cdiv(rows, chunk)
    counts = torch.empty((chunks, num_experts), dtype=torch.int32, device=index.device)
    offsets = torch.empty(num_experts, dtype=torch.int32, device=index.device)
    _count_routes[(chunks,)](index, counts, rows, num_experts, block, chunk, num_warps=8)
    _place_routes[(chunks,)](
        index, counts, order, inverse, tokens, offsets, rows, chunks, num_experts, index.shape[1],
        block, chunk, max(4096 // block, 1), num_warps=8,
    )  # fmt: skip
    return order, inverse.view(index.shape), tokens, offsets
