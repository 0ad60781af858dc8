"""Decides whether Triton kernels did the work, or PyTorch's own operators did. Runs in the judge; imports no torch.

Writing a Triton kernel and then folding its few partial sums with `torch.sum` is fair, and is said: verified_hybrid.
Letting PyTorch do the heavy part is not: torch_fallback. The measure is the reference's own work, as `operators` counts
it on both sides, so that a matrix product weighs more than the activation behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from triton_sft_pipeline.verification.verdict import Finding

FALLBACK_SHARE = 0.5
"""From this share of the reference's work on, PyTorch did it and not the kernel."""

_NAMED = 3


@dataclass(frozen=True)
class Work:
    """What PyTorch's operators did in one call.

    Attributes:
        compute: arithmetic, in operations.
        copy: data moved or filled, in elements.
        operators: names of those that did most, the greatest first.
    """

    compute: float = 0.0
    copy: float = 0.0
    operators: Sequence[str] = ()


class Ruling(NamedTuple):
    """What the operators say about a kernel whose outputs are right.

    Attributes:
        finding: torch_fallback, verified_hybrid or no_kernel_launch; None when Triton did all the work.
        torch_share: share of the reference's work that PyTorch did in the kernel. Over 1.0 when it did more than the
            reference; None when the reference does no work to have a share of.
    """

    finding: Finding | None
    torch_share: float | None


def judge_operators(kernel: Work, reference: Work, launches: int, output_elements: int = 0) -> Ruling:
    """Rule on one call of a kernel.

    Args:
        kernel: what PyTorch did in the kernel's call.
        reference: what it did in the reference's.
        launches: Triton kernels that the call launched.
        output_elements: of the reference's output; what is moved when the reference only returns a view.
    """
    share = _share(kernel, reference, output_elements)
    names = _names(kernel.operators)
    if launches < 1:
        did = f"; PyTorch did the work: {names}" if names and kernel.compute + kernel.copy > 0 else ""
        return Ruling(Finding("no_kernel_launch", f"The code launches no Triton kernel{did}."), share)
    if share is not None and share >= FALLBACK_SHARE:
        detail = f"PyTorch itself did {_percent(share)} of the reference's work{_colon(names)}."
        return Ruling(Finding("torch_fallback", detail), share)
    if kernel.compute > 0:
        part = "part of the arithmetic" if share is None else f"{_percent(share)} of the reference's work"
        return Ruling(Finding("verified_hybrid", f"PyTorch did {part}{_colon(names)}."), share)
    return Ruling(None, share)


def _share(kernel: Work, reference: Work, output_elements: int) -> float | None:
    if reference.compute > 0:
        return kernel.compute / reference.compute
    # Nothing to compute: the work is to move the data.
    moved = max(reference.copy, float(output_elements))
    return (kernel.compute + kernel.copy) / moved if moved > 0 else None


def _percent(share: float) -> str:
    return "less than 1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def _names(operators: Sequence[str]) -> str:
    return ", ".join(operators[:_NAMED])


def _colon(names: str) -> str:
    return f": {names}" if names else ""
