"""From verified reasoning traces to a model that writes Triton kernels.

The names below are the steps of a training, each usable alone; they are imported when first used, so that importing the
package costs nothing. The pipeline itself is `triton_sft_pipeline.definitions`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton_sft_pipeline.api import (
        answer,
        create_lora_config,
        create_training_config,
        inference,
        load_and_filter_traces,
        load_model_and_tokenizer,
        main,
        prepare_dataset,
        train,
    )

__all__ = [
    "answer",
    "create_lora_config",
    "create_training_config",
    "inference",
    "load_and_filter_traces",
    "load_model_and_tokenizer",
    "main",
    "prepare_dataset",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("triton_sft_pipeline.api"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
