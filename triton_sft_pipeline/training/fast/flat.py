"""An adapter's weights side by side in a few long tensors, so that an optimiser has a few tensors to update and not
hundreds.

An 8-bit optimiser of bitsandbytes updates a tensor at a time and, with paged states, waits for the device after each:
632 times a step for Trinity-Mini. Its states are quantised in blocks of 256 numbers, so tensors whose sizes are
multiples of that get the very same update either way.

Knows nothing of models or trainers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 256
"""Numbers whose optimiser states share a scale."""

SMALLEST = 4096
"""bitsandbytes keeps 32-bit states for smaller tensors."""

LONGEST = 2**30
"""Numbers in one long tensor at most: kernels count them in 32 bits."""


@dataclass(frozen=True)
class _Member:
    """A weight, and its places in the long tensors."""

    parameter: nn.Parameter
    weight: Tensor
    gradient: Tensor


class FlatWeights:
    """Long tensors in place of weights.

    The weights stay what they are for everybody else: each becomes a view of its piece. `place_of` says where a
    weight's gradient is wanted; a gradient that is elsewhere is copied there by `gather`.

    Attributes:
        parameters: the long tensors, for an optimiser; `gather` fills in their `.grad`.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.parameters: list[nn.Parameter] = []
        self._members: list[_Member] = []
        for run in _runs(weights):
            self._join(run)

    def _join(self, weights: Sequence[nn.Parameter]) -> None:
        sizes = [p.numel() for p in weights]
        flat = torch.cat([p.data.reshape(-1) for p in weights])
        long = nn.Parameter(flat, requires_grad=True)
        long.grad = torch.zeros_like(flat)
        self.parameters.append(long)
        for p, weight, gradient in zip(weights, flat.split(sizes), long.grad.split(sizes), strict=True):
            member = _Member(p, weight.view(p.shape), gradient.view(p.shape))
            p.data = member.weight
            p.gradient_place = member.gradient  # type: ignore[attr-defined]
            self._members.append(member)

    def gather(self) -> None:
        """Bring weights and gradients to their places, those that are not there: a weight that was loaded since, a
        gradient that autograd made. A weight without a gradient gets zeros."""
        copied: tuple[list[Tensor], list[Tensor]] = ([], [])
        cleared = []
        for member in self._members:
            p = member.parameter
            if p.data_ptr() != member.weight.data_ptr():
                member.weight.copy_(p.data)
                p.data = member.weight
            if p.grad is None:
                cleared.append(member.gradient)
            elif p.grad.data_ptr() != member.gradient.data_ptr():
                copied[0].append(member.gradient)
                copied[1].append(p.grad)
        if cleared:
            torch._foreach_zero_(cleared)
        if copied[0]:
            torch._foreach_copy_(*copied)

    def before_each_step(self, optimiser: Any) -> None:
        """Have `optimiser`, which was made of `parameters`, gather first whenever it steps."""
        optimiser.register_step_pre_hook(lambda *_: self.gather())


def place_of(weight: Tensor) -> Tensor:
    """Where the gradient of `weight` is wanted: its piece of a long tensor, or a tensor of its own, of zeros."""
    place: Tensor | None = getattr(weight, "gradient_place", None)
    return torch.zeros_like(weight) if place is None else place


def can_be_flat(weights: Iterable[Tensor]) -> bool:
    """Whether a block-wise optimiser computes the same for these weights joined as for each alone."""
    weights = list(weights)
    alike = len({(p.dtype, p.device) for p in weights}) == 1
    return alike and all(p.numel() % BLOCK == 0 and p.numel() >= SMALLEST for p in weights)


def _runs(weights: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """The weights in order, cut so that no part is longer than `LONGEST`."""
    part: list[nn.Parameter] = []
    length = 0
    for p in weights:
        if part and length + p.numel() > LONGEST:
            yield part
            part, length = [], 0
        part.append(p)
        length += p.numel()
    if part:
        yield part
