"""What went wrong with the machine during training, said in one sentence with what to change. Knows nothing of how
training works."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.errors import StepError
from triton_sft_pipeline.training.memory import GIB, advice, device_name

if TYPE_CHECKING:
    from trl import SFTConfig

_TOO_LITTLE = 1 << 20
"""Bytes: below this a file system counts as full when a library only says that a write failed."""


@contextmanager
def failures_explained(config: SFTConfig, base: Any = None) -> Iterator[None]:
    """Turn running out of GPU memory or disk into a StepError; everything else passes as it is.

    Args:
        base: the base model's transformers configuration; with it, a shipped preset that needs less is named.
    """
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise StepError(
            f"Out of memory on {device_name()} with training.per_device_batch_size "
            f"{config.per_device_train_batch_size} and training.max_length {config.max_length}: lower one of them, set "
            f"training.gradient_checkpointing to true, or choose a smaller preset.{_smaller_preset(base)}"
        ) from error
    except Exception as error:
        if not _disk_is_full(error, Path(config.output_dir)):
            raise
        raise StepError(
            f"The disk is full while writing to {config.output_dir}: free some space, or lower "
            "training.save_total_limit, and run again; training goes on from the last whole checkpoint."
        ) from error


def _smaller_preset(base: Any) -> str:
    """Which preset needs less than what was in use when no more could be had."""
    import torch

    if base is None or not (used := torch.cuda.max_memory_allocated()):
        return ""
    return f" {used / GIB:.1f} GiB were in use. {advice(base.name_or_path, base, used)}"


def _disk_is_full(error: Exception, directory: Path) -> bool:
    """safetensors and torch.save wrap the operating system's error in their own types, so its number is not always
    there."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    if "No space left on device" in text or "os error 28" in text:
        return True
    # What torch.save says of a file system that is full, and of other things: it only counts when no space is left.
    failed_write = "PytorchStreamWriter" in text or "inline_container" in text
    return failed_write and directory.exists() and shutil.disk_usage(directory).free < _TOO_LITTLE
