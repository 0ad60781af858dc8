"""Matrices in 4 bits, expert by expert: what bitsandbytes would store for each one alone, and the way back.

A matrix is cut into blocks of 64 numbers. A block keeps one scale (its largest magnitude) and a 4-bit code for each
number; two codes share a byte, the first in its high half. With double quantisation the scales are themselves kept in 8
bits: their mean over the matrix is the offset, and what remains is stored in blocks of 256 with a float scale each.
Layout and numbers are those of `bitsandbytes.functional.quantize_4bit`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.training.fast import ops

BLOCK = 64
"""Numbers that share one scale."""
NESTED_BLOCK = 256
"""Scales that share one scale of their own, with double quantisation."""


@dataclass(frozen=True)
class Packed:
    """One matrix [out, in] in 4 bits, `nb = out * in / 64` blocks.

    Args:
        codes: uint8 [out, in // 2], two codes a byte.
        absmax: the scale of each block: uint8 [nb] with double quantisation, else float32 [nb].
        nested: float32 [ceil(nb / 256)], the scales of the scales; None without double quantisation.
        offset: float32 scalar, the mean scale; None without double quantisation.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    nested: torch.Tensor | None
    offset: torch.Tensor | None


def pack(weight: torch.Tensor, quant_type: str = "nf4", double: bool = True) -> Packed:
    """Pack one matrix, bit for bit as bitsandbytes does with that matrix alone.

    Args:
        weight: [out, in], float32, bfloat16 or float16, on the device that is to do the work.
        quant_type: "nf4" or "fp4".
        double: quantise the scales too.

    Raises:
        PipelineError: `in` is not a multiple of 64, so that a block would span two rows.
    """
    from bitsandbytes.functional import quantize_4bit

    out_features, in_features = weight.shape
    if in_features % BLOCK:
        raise PipelineError(
            f"an expert matrix of shape {out_features} x {in_features} cannot be packed in 4 bits: its rows are not a "
            f"multiple of {BLOCK} long. Set model.load_in_4bit to false."
        )
    codes, state = quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=double, quant_type=quant_type
    )
    codes = codes.view(out_features, in_features // 2)
    if not double:
        return Packed(codes, state.absmax, None, None)
    return Packed(codes, state.absmax, state.state2.absmax, state.offset)


def unpack(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested: torch.Tensor | None,
    offset: torch.Tensor | None,
    quant_type: str,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """All experts' matrices again, bit for bit what bitsandbytes gives for each one alone.

    Args:
        codes: uint8 [E, out, in // 2].
        absmax: uint8 [E, nb] with double quantisation, else float32 [E, nb].
        nested: float32 [E, ceil(nb / 256)]; None without double quantisation.
        offset: float32 [E]; None without double quantisation.
        quant_type: "nf4" or "fp4".
        dtype: type of the result.
        out: where to write it, [E, out, in] of that type; None: a new tensor.

    Returns:
        [E, out, in], `out` when it was given.
    """
    experts, rows, half = codes.shape
    if out is None:
        out = torch.empty((experts, rows, half * 2), dtype=dtype, device=codes.device)
    return ops.dequantize(codes, absmax, nested, offset, quant_type, out)
