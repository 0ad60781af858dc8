"""How exact expected values are, and how far from them PyTorch itself may be. Used where torch is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton_sft_pipeline.verification.worker.tensors import in_slices

# Beyond the tolerance a kernel may be off by this many times PyTorch's own error, but never by more than this share of
# the largest value.
_ERRORS_ALLOWED = 2.0
_MAX_SLACK = 0.01


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in full float32: in TF32, PyTorch's default for convolutions, values are off by more than the tolerance.

    For expected values only, not where the reference is measured.
    """
    import torch

    backends = torch.backends
    before = backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32
    backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = before


def allowance(strict: Any, usual: Any, exact: Any) -> float:
    """How much further than the tolerance a kernel may be from the expected values of one tensor.

    Args:
        strict: the values in full float32, which kernels are compared with.
        usual: the values with PyTorch's own settings.
        exact: the values in float64.

    Returns:
        Twice the larger error of the first two, as an absolute number; 0.0 when that is over 1 % of the largest value,
        and for values that are not floating-point numbers.
    """
    import torch

    if not strict.is_floating_point() or strict.numel() == 0 or not strict.shape == usual.shape == exact.shape:
        return 0.0
    error = largest = 0.0
    for strictly, usually, exactly in in_slices(strict, usual, exact):
        true = exactly.double()
        difference = torch.maximum((usually.double() - true).abs(), (strictly.double() - true).abs())
        error = max(error, float(difference.nan_to_num(0.0, 0.0, 0.0).max()))
        largest = max(largest, float(true.abs().nan_to_num(0.0, 0.0, 0.0).max()))
    allowed = _ERRORS_ALLOWED * error
    return allowed if allowed <= _MAX_SLACK * largest else 0.0
