"""Fills memory that nobody has written to with NaN, or with the greatest value of its type, so that reading it shows.

Knows nothing of operators.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any


def poison(tensor: Any) -> None:
    """Fill all of a tensor."""
    import torch

    if tensor.numel() == 0 or tensor.layout is not torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
        return
    # Types of several numbers to a byte cannot be filled.
    with contextlib.suppress(NotImplementedError):
        tensor.fill_(_value(tensor.dtype))


def _value(dtype: Any) -> Any:
    import torch

    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    return True if dtype is torch.bool else torch.iinfo(dtype).max


def poison_growth(tensor: Any, bytes_before: int) -> None:
    """Poison what a resized storage has beyond its former end, which is what nobody has written to."""
    start = bytes_before // tensor.element_size()
    grown = tensor.untyped_storage().nbytes() // tensor.element_size() - start
    if grown > 0:
        poison(tensor.as_strided((grown,), (1,), start))
