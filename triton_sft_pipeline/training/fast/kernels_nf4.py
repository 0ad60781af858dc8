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
    # A program keeps to one expert, and as BLOCKS divides 256, to one nested scale. Two dimensions, [word, nibble], are
    # what makes neighbouring threads write neighbouring addresses: Triton 3.6 orders three of them otherwise.
    expert = tl.program_id(1)
    word_at = tl.program_id(0) * (BLOCKS * 8) + tl.arange(0, BLOCKS * 8)
    block = word_at // 8
    there = block < blocks
    first = expert.to(tl.int64) * blocks
    word = tl.load(words + first * 8 + word_at, mask=there, other=0)
    if NESTED:
        fine = tl.load(code8 + tl.load(absmax + first + block, mask=there, other=0).to(tl.int32))
        coarse = tl.load(nested + expert * coarse_blocks + tl.program_id(0) * BLOCKS // 256)
        scale = fine * coarse + tl.load(offset + expert)
    else:
        scale = tl.load(absmax + first + block, mask=there, other=0.0)
    # A thread writes the 16 bytes of a word's 8 weights. Bytes are in order, the high nibble of a byte comes first.
    nibble = tl.arange(0, 8)[None, :]
    code = word[:, None] >> ((nibble * 4) ^ 4)
    value = _look_up(_value_of_lane(code4), code) if SHUFFLE else tl.load(code4 + (code & 15))
    weight = (value * scale[:, None]).to(out.dtype.element_ty)
    if GAPS:
        row = first // row_blocks + block // row_blocks
        at = row * stride + (word_at % (row_blocks * 8)) * 8
        tl.store(out + at[:, None] + nibble, weight, mask=there[:, None])
    else:
        tl.store(out + first * 64 + word_at[:, None] * 8 + nibble, weight, mask=there[:, None])


def dequantize(
    codes: Tensor, absmax: Tensor, nested: Tensor | None, offset: Tensor | None, quant_type: str, out: Tensor
) -> Tensor:
    columns = out.shape[-1]
    stacked = out.dim() == 3
    even = out.stride(-1) == 1 and (not stacked or out.stride(0) == out.shape[1] * out.stride(1))
    if columns % 64 or not even or not codes.is_contiguous() or codes.storage_offset() % 4:
        return twins.dequantize(codes, absmax, nested, offset, quant_type, out)
    double = nested is not None and offset is not None
    code4, code8 = twins.code_tables(quant_type, codes.device)
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
