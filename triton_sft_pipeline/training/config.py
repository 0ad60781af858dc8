"""TRL's training arguments from ours. Knows nothing of models or data; one function, because the names of these
arguments change between releases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.training.settings import TrainingSettings

if TYPE_CHECKING:
    from trl import SFTConfig


def create_training_config(settings: TrainingSettings | None = None, output_dir: Path | str = "outputs") -> SFTConfig:
    """TRL's SFTConfig with exactly `settings`, for the device at hand; without any: the original's hyper-parameters.

    The loss is that of the completion alone (TRL sees to it when rows have `prompt` and `completion`). Packing is off:
    AFMoE's attention would leak between documents. TensorBoard events go to `output_dir/runs`, checkpoints to
    `output_dir/checkpoint-<step>`.

    Raises:
        PipelineError: an 8-bit optimiser without a CUDA device, or wandb asked for and not installed.
    """
    import torch
    from trl import SFTConfig

    settings = settings or TrainingSettings()
    on_gpu = torch.cuda.is_available()
    if "8bit" in settings.optim and not on_gpu:
        raise PipelineError(f"training.optim {settings.optim} needs a CUDA device: set it to adamw_torch.")
    return SFTConfig(
        output_dir=str(output_dir),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        # transformers 5 dropped warmup_ratio: warmup_steps below one is the ratio.
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optim,
        per_device_train_batch_size=settings.per_device_batch_size,
        per_device_eval_batch_size=settings.per_device_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        max_length=settings.max_length,
        **_checkpointing(settings.gradient_checkpointing),
        eval_strategy="steps",
        eval_steps=settings.eval_steps,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=settings.save_total_limit,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        # The default replaces a loss that is not a number by the average of the last ones: a broken run would look like
        # a good one.
        logging_nan_inf_filter=False,
        seed=settings.seed,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        packing=False,
        completion_only_loss=True,
        report_to=["tensorboard", *_wandb(settings)],
        run_name=settings.run_name,
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )


def _checkpointing(on: bool) -> dict[str, object]:
    """transformers 5.2x renamed gradient_checkpointing to activation_checkpointing."""
    from trl import SFTConfig

    name = (
        "activation_checkpointing"
        if "activation_checkpointing" in SFTConfig.__dataclass_fields__
        else "gradient_checkpointing"
    )
    return {name: on, f"{name}_kwargs": {"use_reentrant": False} if on else None}


def _wandb(settings: TrainingSettings) -> list[str]:
    import importlib.util

    if not settings.report_to_wandb:
        return []
    if importlib.util.find_spec("wandb") is None:
        raise PipelineError(
            "training.report_to_wandb is true, but wandb is not installed: pip install 'triton-sft-pipeline[wandb]'."
        )
    return ["wandb"]
