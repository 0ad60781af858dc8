"""Memory that all layers use in turn: frozen weights are unpacked into it, multiplied with, and overwritten by the next
layer's."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Named buffers that grow to the largest request and are never given back while training runs, so that the
    allocator's blocks do not crumble.

    A tensor that `take` returned holds what was written until the same name is taken again.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor of `shape` with anything in it."""
        numbers = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numbers or buffer.dtype != dtype or buffer.device != device:
            # The old one goes first: both would be there for a moment otherwise.
            self._buffers.pop(name, None)
            buffer = torch.empty(numbers, dtype=dtype, device=device)
            self._buffers[name] = buffer
        return buffer[:numbers].view(shape)

    def release(self) -> None:
        """Give all buffers back to the allocator."""
        self._buffers.clear()
