"""Triton kernels that treat every row for itself: gates, SwiGLU and dropout. Same signatures as twins.py."""

# The arguments of a kernel are written in Triton, where only constants are annotated.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sft_pipeline.training.fast.twins import LANES, check_seed, dropout_threshold, straight

TILE = 2048
"""Elements of a program: 16 for each of 128 threads, two accesses of 16 bytes in bfloat16."""


def tile(columns: int, elements: int = TILE) -> tuple[int, int]:
    """(rows, columns) of a program's tile, powers of two."""
    block = min(triton.next_power_of_2(columns), elements)
    return max(elements // block, 1), block


# -- gates ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _gate_mul(o, gate, y, rows, o_stride, gate_stride, columns: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (at < columns)
    share = tl.sigmoid(tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32))
    value = tl.load(o + row * o_stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + at, value * share, mask=inside)


def gate_mul(o: Tensor, gate: Tensor) -> Tensor:
    rows, columns = o.shape
    y = torch.empty((rows, columns), dtype=o.dtype, device=o.device)
    height, width = tile(columns)
    grid = (triton.cdiv(rows, height), triton.cdiv(columns, width))
    _gate_mul[grid](o, gate, y, rows, o.stride(0), gate.stride(0), columns, height, width)
    return y


@triton.jit(do_not_specialize=["rows"])
def _gate_mul_backward(
    dy, o, gate, dgate, do, rows, dy_stride, o_stride, gate_stride, dgate_stride,
    columns: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (at < columns)
    share = tl.sigmoid(tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32))
    value = tl.load(o + row * o_stride + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * dy_stride + at, mask=inside, other=0.0).to(tl.float32) * share
    tl.store(do + row * columns + at, grad, mask=inside)
    tl.store(dgate + row * dgate_stride + at, grad * value * (1 - share), mask=inside)


def gate_mul_backward(dy: Tensor, o: Tensor, gate: Tensor, dgate_out: Tensor) -> Tensor:
    dy, o = straight(dy), straight(o)
    rows, columns = o.shape
    do = torch.empty((rows, columns), dtype=o.dtype, device=o.device)
    height, width = tile(columns)
    grid = (triton.cdiv(rows, height), triton.cdiv(columns, width))
    _gate_mul_backward[grid](
        dy, o, gate, dgate_out, do, rows, dy.stride(0), o.stride(0), gate.stride(0), dgate_out.stride(0),
        columns, height, width,
    )  # fmt: skip
    return do


@triton.jit(do_not_specialize=["rows"])
def _swiglu(
    u, add, h, rows, u_stride, add_stride, h_stride, inner: tl.constexpr,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (at < inner)
    here = u + row * u_stride + at
    gate = tl.load(here, mask=inside, other=0.0)
    up = tl.load(here + inner, mask=inside, other=0.0)
    kind = u.dtype.element_ty
    if ADD:
        other = add + row * add_stride + at
        gate = (gate.to(tl.float32) + tl.load(other, mask=inside, other=0.0).to(tl.float32)).to(kind)
        up = (up.to(tl.float32) + tl.load(other + inner, mask=inside, other=0.0).to(tl.float32)).to(kind)
        tl.store(here, gate, mask=inside)
        tl.store(here + inner, up, mask=inside)
    wide = gate.to(tl.float32)
    # Rounded as torch rounds silu's own result before the product.
    acted = (wide * tl.sigmoid(wide)).to(kind).to(tl.float32)
    tl.store(h + row * h_stride + at, acted * up.to(tl.float32), mask=inside)


def swiglu(u: Tensor, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    rows, inner = u.shape[0], u.shape[1] // 2
    h = torch.empty((rows, inner), dtype=u.dtype, device=u.device) if out is None else out
    height, width = tile(inner)
    grid = (triton.cdiv(rows, height), triton.cdiv(inner, width))
    added = u if add is None else add
    _swiglu[grid](
        u, added, h, rows, u.stride(0), added.stride(0), h.stride(0), inner, add is not None, height, width
    )  # fmt: skip
    return h


@triton.jit(do_not_specialize=["rows"])
def _swiglu_backward(
    dh, u, weight, du, h, drow, rows, dh_stride, u_stride, inner: tl.constexpr,
    WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = line[:, None].to(tl.int64)
    at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (at < inner)
    here = u + row * u_stride + at
    gate = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(here + inner, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dh + row * dh_stride + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    kind = u.dtype.element_ty
    value = ((gate * share).to(kind).to(tl.float32) * up).to(kind)
    tl.store(h + row * inner + at, value, mask=inside)
    if WEIGHT:
        tl.store(drow + line, tl.sum(grad * value.to(tl.float32), 1), mask=line < rows)
        grad *= tl.load(weight + line, mask=line < rows, other=0.0)[:, None]
    to = du + row * (2 * inner) + at
    tl.store(to, grad * up * share * (1 + gate * (1 - share)), mask=inside)
    tl.store(to + inner, grad * gate * share, mask=inside)


def swiglu_backward(dh: Tensor, u: Tensor, row_weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    dh = straight(dh)
    rows, inner = dh.shape
    du = torch.empty((rows, 2 * inner), dtype=u.dtype, device=u.device)
    h = torch.empty((rows, inner), dtype=u.dtype, device=u.device)
    if row_weight is None:
        drow = None
        height, width = tile(inner, TILE // 2)
    else:
        drow = torch.empty(rows, dtype=torch.float32, device=u.device)
        width = triton.next_power_of_2(inner)  # a whole row, for its sum
        height = max(TILE // 2 // width, 1)
    grid = (triton.cdiv(rows, height), triton.cdiv(inner, width))
    unused = du
    _swiglu_backward[grid](
        dh, u, unused if row_weight is None else row_weight.contiguous(), du, h, unused if drow is None else drow,
        rows, dh.stride(0), u.stride(0), inner, row_weight is not None, height, width,
        num_warps=4 if height * width <= 2048 else 8,
    )  # fmt: skip
    return du, h, drow


# -- dropout: see twins.dropout_mask for which draw decides which column -------------------------------------------


@triton.jit
def philox_words(seed, counter, SEED: tl.constexpr):
    """`seed` is the number itself, or with SEED where it lies in memory."""
    number = tl.load(seed) if SEED else seed
    return tl.randint4x(number, counter, n_rounds=7)


@triton.jit
def draw(words, lane: tl.constexpr):
    """The 16-bit draw of a lane from the four words of a counter, int32."""
    if lane % 4 == 0:
        word = words[0]
    elif lane % 4 == 1:
        word = words[1]
    elif lane % 4 == 2:
        word = words[2]
    else:
        word = words[3]
    return (word.to(tl.uint32, bitcast=True) >> (16 * (lane // 4))).to(tl.int32, bitcast=True) & 0xFFFF


@triton.jit(do_not_specialize=["seed", "rows", "threshold"])
def _dropout(
    x, add, out, seed, threshold, factor, rows, x_stride, add_stride, columns: tl.constexpr, group: tl.constexpr,
    SEED: tl.constexpr, ADD: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    row = line.to(tl.int64)
    near = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    words = philox_words(seed, line * group + near, SEED)
    for lane in tl.static_range(LANES):
        at = near + lane * group
        inside = (row < rows) & (near < group) & (at < columns)
        value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(draw(words, lane) >= threshold, value * factor, 0.0)
        if ADD:
            value += tl.load(add + row * add_stride + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * columns + at, value, mask=inside)


def lane_tile(columns: int) -> tuple[int, int, int]:
    """(columns of a lane, rows of a tile, columns of a tile): 8 elements a thread and lane."""
    group = triton.cdiv(columns, LANES)
    height, width = tile(group, 1024)
    return (group, height, width) if width <= 256 else (group, height * width // 256, 256)


def seed_argument(seed: int | Tensor, device: torch.device) -> tuple[int | Tensor, bool]:
    """The seed as a kernel takes it, and whether that is a place in memory. A seed on the CPU is a number already."""
    if isinstance(seed, int):
        return seed, False
    checked = check_seed(seed)
    return (checked, True) if checked.device == device else (int(checked), False)


def dropout(x: Tensor, p: float, seed: int | Tensor, add: Tensor | None = None, scale: float = 1.0) -> Tensor:
    x = straight(x)
    number, in_memory = seed_argument(seed, x.device)
    rows, columns = x.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    group, height, width = lane_tile(columns)
    grid = (triton.cdiv(rows, height), triton.cdiv(group, width))
    added = x if add is None else straight(add)
    _dropout[grid](
        x, added, out, number, dropout_threshold(p), scale / (1 - p), rows, x.stride(0), added.stride(0),
        columns, group, in_memory, add is not None, LANES, height, width,
    )  # fmt: skip
    return out


# -- gates with dropout behind them --------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "rows", "threshold"])
def _gate_mul_dropout(
    o, gate, y, dropped, seed, threshold, factor, rows, o_stride, gate_stride, columns: tl.constexpr,
    group: tl.constexpr, BOTH: tl.constexpr, SEED: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    line = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    row = line.to(tl.int64)
    near = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    words = philox_words(seed, line * group + near, SEED)
    kind = o.dtype.element_ty
    for lane in tl.static_range(LANES):
        at = near + lane * group
        inside = (row < rows) & (near < group) & (at < columns)
        share = tl.sigmoid(tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32))
        value = (tl.load(o + row * o_stride + at, mask=inside, other=0.0).to(tl.float32) * share).to(kind)
        if BOTH:
            tl.store(y + row * columns + at, value, mask=inside)
        kept = tl.where(draw(words, lane) >= threshold, value.to(tl.float32) * factor, 0.0)
        tl.store(dropped + row * columns + at, kept, mask=inside)


def gate_mul_dropout(
    o: Tensor, gate: Tensor, p: float, seed: int | Tensor, both: bool = True
) -> tuple[Tensor | None, Tensor]:
    o = straight(o)
    rows, columns = o.shape
    dropped = torch.empty((rows, columns), dtype=o.dtype, device=o.device)
    y = torch.empty_like(dropped) if both else None
    number, in_memory = seed_argument(seed, o.device)
    group, height, width = lane_tile(columns)
    grid = (triton.cdiv(rows, height), triton.cdiv(group, width))
    _gate_mul_dropout[grid](
        o, gate, dropped if y is None else y, dropped, number, dropout_threshold(p), 1.0 / (1 - p), rows,
        o.stride(0), gate.stride(0), columns, group, both, in_memory, LANES, height, width,
    )  # fmt: skip
    return y, dropped


@triton.jit(do_not_specialize=["seed", "rows", "threshold"])
def _gate_mul_dropout_backward(
    dy, extra, o, gate, dgate, do, seed, threshold, factor, rows,
    dy_stride, extra_stride, o_stride, gate_stride, dgate_stride, columns: tl.constexpr, group: tl.constexpr,
    SEED: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    row = line.to(tl.int64)
    near = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    words = philox_words(seed, line * group + near, SEED)
    for lane in tl.static_range(LANES):
        at = near + lane * group
        inside = (row < rows) & (near < group) & (at < columns)
        more = tl.load(extra + row * extra_stride + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * dy_stride + at, mask=inside, other=0.0).to(tl.float32)
        grad += tl.where(draw(words, lane) >= threshold, more * factor, 0.0)
        share = tl.sigmoid(tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32))
        value = tl.load(o + row * o_stride + at, mask=inside, other=0.0).to(tl.float32)
        grad *= share
        tl.store(do + row * columns + at, grad, mask=inside)
        tl.store(dgate + row * dgate_stride + at, grad * value * (1 - share), mask=inside)


def gate_mul_dropout_backward(
    dy: Tensor, extra: Tensor, o: Tensor, gate: Tensor, dgate_out: Tensor, p: float, seed: int | Tensor
) -> Tensor:
    dy, extra, o = straight(dy), straight(extra), straight(o)
    rows, columns = o.shape
    do = torch.empty((rows, columns), dtype=o.dtype, device=o.device)
    number, in_memory = seed_argument(seed, o.device)
    group, height, width = lane_tile(columns)
    grid = (triton.cdiv(rows, height), triton.cdiv(group, width))
    _gate_mul_dropout_backward[grid](
        dy, extra, o, gate, dgate_out, do, number, dropout_threshold(p), 1.0 / (1 - p), rows,
        dy.stride(0), extra.stride(0), o.stride(0), gate.stride(0), dgate_out.stride(0),
        columns, group, in_memory, LANES, height, width,
    )  # fmt: skip
    return do


# -- SwiGLU with dropout behind it ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "rows", "threshold"])
def _swiglu_dropout(
    u, h, dropped, seed, threshold, factor, rows, u_stride, h_stride, inner: tl.constexpr, group: tl.constexpr,
    SEED: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    row = line.to(tl.int64)
    near = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    words = philox_words(seed, line * group + near, SEED)
    kind = u.dtype.element_ty
    for lane in tl.static_range(LANES):
        at = near + lane * group
        inside = (row < rows) & (near < group) & (at < inner)
        here = u + row * u_stride + at
        gate = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(here + inner, mask=inside, other=0.0).to(tl.float32)
        value = ((gate * tl.sigmoid(gate)).to(kind).to(tl.float32) * up).to(kind)
        tl.store(h + row * h_stride + at, value, mask=inside)
        kept = tl.where(draw(words, lane) >= threshold, value.to(tl.float32) * factor, 0.0)
        tl.store(dropped + row * inner + at, kept, mask=inside)


def swiglu_dropout(u: Tensor, p: float, seed: int | Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    rows, inner = u.shape[0], u.shape[1] // 2
    h = torch.empty((rows, inner), dtype=u.dtype, device=u.device) if out is None else out
    dropped = torch.empty((rows, inner), dtype=u.dtype, device=u.device)
    number, in_memory = seed_argument(seed, u.device)
    group, height, width = lane_tile(inner)
    grid = (triton.cdiv(rows, height), triton.cdiv(group, width))
    _swiglu_dropout[grid](
        u, h, dropped, number, dropout_threshold(p), 1.0 / (1 - p), rows, u.stride(0), h.stride(0),
        inner, group, in_memory, LANES, height, width,
    )  # fmt: skip
    return h, dropped


@triton.jit(do_not_specialize=["seed", "rows", "threshold"])
def _swiglu_dropout_backward(
    dh, extra, u, weight, du, dropped, drow, seed, threshold, factor, scale, rows, dh_stride, extra_stride, u_stride,
    inner: tl.constexpr, group: tl.constexpr,
    WEIGHT: tl.constexpr, SEED: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = line[:, None].to(tl.int64)
    near = tl.arange(0, BLOCK)[None, :]
    words = philox_words(seed, line[:, None] * group + near, SEED)
    if WEIGHT:
        row_weight = tl.load(weight + line, mask=line < rows, other=0.0)[:, None]
    kind = u.dtype.element_ty
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    for lane in tl.static_range(LANES):
        at = near + lane * group
        inside = (row < rows) & (near < group) & (at < inner)
        keep = draw(words, lane) >= threshold
        more = tl.load(extra + row * extra_stride + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dh + row * dh_stride + at, mask=inside, other=0.0).to(tl.float32)
        grad += tl.where(keep, more * scale, 0.0)
        here = u + row * u_stride + at
        gate = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(here + inner, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        value = ((gate * share).to(kind).to(tl.float32) * up).to(kind).to(tl.float32)
        tl.store(dropped + row * inner + at, tl.where(keep, value * factor, 0.0), mask=inside)
        if WEIGHT:
            products += grad * value
            grad *= row_weight
        to = du + row * (2 * inner) + at
        tl.store(to, grad * up * share * (1 + gate * (1 - share)), mask=inside)
        tl.store(to + inner, grad * gate * share, mask=inside)
    if WEIGHT:
        tl.store(drow + line, tl.sum(products, 1), mask=line < rows)


def swiglu_dropout_backward(
    dh: Tensor, extra: Tensor, u: Tensor, row_weight: Tensor | None, p: float, seed: int | Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    dh, extra = straight(dh), straight(extra)
    rows, inner = dh.shape
    du = torch.empty((rows, 2 * inner), dtype=u.dtype, device=u.device)
    dropped = torch.empty((rows, inner), dtype=u.dtype, device=u.device)
    drow = None if row_weight is None else torch.empty(rows, dtype=torch.float32, device=u.device)
    number, in_memory = seed_argument(seed, u.device)
    group = triton.cdiv(inner, LANES)
    width = triton.next_power_of_2(group)  # a whole row, for its sum
    height = max(1024 // width, 1)
    _swiglu_dropout_backward[triton.cdiv(rows, height),](
        dh, extra, u, du if row_weight is None else row_weight.contiguous(), du, dropped, du if drow is None else drow,
        number, dropout_threshold(p), 1.0 / (1 - p), scale / (1 - p), rows, dh.stride(0), extra.stride(0), u.stride(0),
        inner, group, row_weight is not None, in_memory, LANES, height, width, num_warps=4 if width <= 1024 else 8,
    )  # fmt: skip
    return du, dropped, drow
