"""TRL's training arguments from ours. Knows nothing of models or data; one function, because the names of these
arguments change between releases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.training.ranks import world_size
from triton_sft_pipeline.training.settings import TrainingSettings

if TYPE_CHECKING:
    from trl import SFTConfig


def create_training_config(settings: TrainingSettings | None = None, output_dir: Path | str = "outputs") -> SFTConfig:
    """TRL's SFTConfig with exactly `settings`, for the device at hand; without any: the original's hyper-parameters.

    The loss is that of the completion alone (TRL sees to it when rows have `prompt` and `completion`). `packing` tells
    `train` to pack, which keeps documents apart as TRL does not. TensorBoard events go to `output_dir/runs`,
    checkpoints to `output_dir/checkpoint-<step>`. In one of several processes, `gradient_accumulation_steps` is this
    process's share.

    Raises:
        PipelineError: an 8-bit optimiser without a CUDA device, wandb asked for and not installed, or more than one GPU
            asked for outside the processes that train on them.
    """
    import torch
    from trl import SFTConfig

    settings = settings or TrainingSettings()
    _check_processes(settings)
    on_gpu = torch.cuda.is_available()
    if "8bit" in settings.optim and not on_gpu:
        raise PipelineError(
            f"training.optim {settings.optim} needs a CUDA device, and there is none here: set it to adamw_torch, or "
            "take the preset tiny, which is made for a CPU."
        )
    config = SFTConfig(
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
        gradient_accumulation_steps=accumulation_steps_each(settings),
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
        packing=settings.packing,
        completion_only_loss=True,
        report_to=["tensorboard", *_wandb(settings)],
        run_name=settings.run_name,
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
        # Batches go to the device behind what it still has to do, instead of waiting for it.
        accelerator_config={"non_blocking": on_gpu},
        ddp_backend=None if on_gpu or world_size() == 1 else "gloo",
        # Frozen weights and their quantisation constants are the same everywhere and stay so.
        ddp_broadcast_buffers=False,
        # Every tensor of the adapter takes part in every step: an expert without tokens has a gradient of zeros.
        ddp_find_unused_parameters=False,
    )
    if config.n_gpu > 1:
        # One process that sees several GPUs would spread a larger batch over all of them (nn.DataParallel).
        config._n_gpu = 1
    return config


def accumulation_steps_each(settings: TrainingSettings) -> int:
    """Forward passes an optimiser step in each of `settings.gpus` processes, so that together they take as many samples
    as one process does.

    Raises:
        PipelineError: they cannot be shared out evenly.
    """
    steps, gpus = settings.gradient_accumulation_steps, settings.gpus
    if steps % gpus:
        raise PipelineError(
            f"training.gradient_accumulation_steps {steps} cannot be shared by {gpus} GPUs, and an optimiser step has "
            f"to take the same samples on any number of them: set it to a multiple of {gpus}, or training.gpus to a "
            f"divisor of {steps}."
        )
    return steps // gpus


def _check_processes(settings: TrainingSettings) -> None:
    if 1 < settings.gpus != world_size():
        raise PipelineError(
            f"training.gpus is {settings.gpus}, but this process trains with {world_size()} in all: use `triton-sft "
            f"train --gpus {settings.gpus}` or `main()`, which start a process a GPU, or set it to 1."
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
