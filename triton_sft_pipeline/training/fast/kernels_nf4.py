"""The Triton kernel that turns 4-bit codes into weights: one pass, 0.516 bytes read and 2 written for each weight."""

# The arguments of a kernel are written in Triton, where only constants are annotated.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sft_pipeline.training.fast import twins

BLOCKS = 64
"""Blocks of 64 weights for each program: with WARPS warps, 4 words of 8 weights for each thread."""
WARPS = 4
SHUFFLE = os.environ.get("TRITON_INTERPRET") != "1"
"""Look a code up in the neighbouring lane that holds its value, not in memory: half the instructions. Triton's
interpreter knows no lanes."""


@triton.jit
def _value_of_lane(code4):
    """Each thread's own entry of the 16 values: lanes l and l + 16 of a warp hold value l."""
    lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    return tl.load(code4 + (lane & 15))


@triton.jit
def _look_up(value, lane):
    """`value` of the lane that the low 4 bits of `lane` name; bit 4 may be anything and higher ones do not count."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
        "=r,r,r",
        [value, lane],
        dtype=tl.float32,
        is_pure=True,  # nothing here branches, so all lanes of a warp are there
        pack=1,
    )


@triton.jit(do_not_specialize=["blocks"])
def _dequantize(
    words, absmax, nested, offset, code4, code8, out, blocks, coarse_blocks, row_blocks: tl.constexpr, stride,
    NESTED: tl.constexpr, GAPS: tl.constexpr, SHUFFLE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    # A program keeps to one expert, and as BLOCKS divides 256, to one nested scale.
    expert = tl.program_id(1)
    local = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    there = local < blocks
    first = expert.to(tl.int64) * blocks
    if NESTED:
        fine = tl.load(code8 + tl.load(absmax + first + local, mask=there, other=0).to(tl.int32))
        coarse = tl.load(nested + expert * coarse_blocks + tl.program_id(0) * BLOCKS // 256)
        scale = fine * coarse + tl.load(offset + expert)
    else:
        scale = tl.load(absmax + first + local, mask=there, other=0.0)
    # [block, word, nibble]: a thread reads a word of 4 bytes and writes the 16 bytes of its 8 weights.
    word_at = tl.arange(0, 8)
    nibble = tl.arange(0, 8)
    word = tl.load(words + first * 8 + (local[:, None] * 8 + word_at[None, :]), mask=there[:, None], other=0)
    # Bytes are in order, and the high nibble of a byte comes first.
    shift = (nibble * 4) ^ 4
    code = word[:, :, None] >> shift[None, None, :]
    value = _look_up(_value_of_lane(code4), code) if SHUFFLE else tl.load(code4 + (code & 15))
    weight = value * scale[:, None, None]
    inner = word_at[None, :, None] * 8 + nibble[None, None, :]
    if GAPS:
        block = first + local
        at = ((block // row_blocks) * stride + (block % row_blocks) * 64)[:, None, None] + inner
        tl.store(out + at, weight.to(out.dtype.element_ty), mask=there[:, None, None])
    else:
        at = local[:, None, None] * 64 + inner
        tl.store(out + first * 64 + at, weight.to(out.dtype.element_ty), mask=there[:, None, None])


def dequantize(
    codes: Tensor, absmax: Tensor, nested: Tensor | None, offset: Tensor | None, quant_type: str, out: Tensor
) -> Tensor:
    columns = out.shape[-1]
    stacked = out.dim() == 3
    even = out.stride(-1) == 1 and (not stacked or out.stride(0) == out.shape[1] * out.stride(1))
    if columns % 64 or not even or not codes.is_contiguous() or codes.storage_offset() % 4:
        return twins.dequantize(codes, absmax, nested, offset, quant_type, out)
    code4, code8 = twins.code_tables(quant_type, codes.device)
    double = nested is not None and offset is not None
    experts = out.shape[0] if stacked else 1
    blocks = out.numel() // (64 * experts)
    _dequantize[triton.cdiv(blocks, BLOCKS), experts](
        codes.view(-1).view(torch.int32), absmax, nested if double else absmax, offset if double else absmax,
        code4, code8, out, blocks, triton.cdiv(blocks, 256), columns // 64, out.stride(-2),
        double, out.stride(-2) != columns, SHUFFLE, BLOCKS,
        num_warps=WARPS,
        enable_fp_fusion=False,  # bitsandbytes rounds the product before it adds the offset
    )  # fmt: skip
    return out
