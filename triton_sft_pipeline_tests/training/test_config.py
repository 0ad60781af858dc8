"""Every training setting arrives in TRL's arguments, on a device without CUDA too."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.training.config import accumulation_steps_each, create_training_config
from triton_sft_pipeline.training.settings import TrainingSettings


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def checkpointing(config: Any) -> Any:
    """The value of the argument that transformers 5.2x renamed."""
    new, old = "activation_checkpointing", "gradient_checkpointing"
    return getattr(config, new if hasattr(config, new) else old)


def test_without_settings_the_arguments_are_the_originals(tmp_path: Path) -> None:
    config = create_training_config(output_dir=tmp_path)
    assert config.output_dir == str(tmp_path)
    assert config.learning_rate == 2e-4
    assert config.lr_scheduler_type == "cosine"
    assert config.warmup_steps == 0.1
    assert config.weight_decay == 0.01
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (1, 8)
    assert (config.num_train_epochs, config.max_steps) == (3, -1)
    assert config.max_length == 4096
    assert checkpointing(config) is True


def test_every_setting_arrives(tmp_path: Path) -> None:
    settings = TrainingSettings(
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_ratio=0.25,
        weight_decay=0.5,
        max_grad_norm=0.3,
        optim="adamw_torch_fused",
        per_device_batch_size=3,
        gradient_accumulation_steps=5,
        epochs=1.5,
        max_steps=77,
        max_length=99,
        gradient_checkpointing=False,
        eval_steps=11,
        save_steps=12,
        logging_steps=13,
        save_total_limit=4,
        seed=7,
        run_name="mine",
    )
    config = create_training_config(settings, tmp_path)
    assert (config.learning_rate, config.lr_scheduler_type, config.warmup_steps) == (1e-3, "linear", 0.25)
    assert (config.weight_decay, config.max_grad_norm, config.optim) == (0.5, 0.3, "adamw_torch_fused")
    assert (config.per_device_train_batch_size, config.per_device_eval_batch_size) == (3, 3)
    assert (config.gradient_accumulation_steps, config.num_train_epochs, config.max_steps) == (5, 1.5, 77)
    assert (config.max_length, config.seed, config.run_name) == (99, 7, "mine")
    assert (config.eval_steps, config.save_steps, config.logging_steps, config.save_total_limit) == (11, 12, 13, 4)
    assert checkpointing(config) is False


def test_the_warm_up_is_a_share_of_the_steps(tmp_path: Path) -> None:
    config = create_training_config(TrainingSettings(warmup_ratio=0.1), tmp_path)
    assert config.get_warmup_steps(240) == 24


def test_evaluations_and_checkpoints_come_while_training_and_tensorboard_sees_them(tmp_path: Path) -> None:
    config = create_training_config(output_dir=tmp_path)
    assert (config.eval_strategy, config.save_strategy, config.logging_strategy) == ("steps", "steps", "steps")
    assert config.report_to == ["tensorboard"]
    assert config.logging_nan_inf_filter is False


def test_the_loss_is_of_completions_and_nothing_is_packed(tmp_path: Path) -> None:
    config = create_training_config(output_dir=tmp_path)
    assert config.completion_only_loss is True
    assert (config.packing, config.padding_free) == (False, False)


def test_on_a_cpu_the_arguments_ask_for_no_gpu(tmp_path: Path) -> None:
    config = create_training_config(output_dir=tmp_path)
    assert config.device.type == "cpu"
    assert (config.use_cpu, config.bf16, config.fp16, config.dataloader_pin_memory) == (True, False, False, False)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_8_bit_optimiser_on_a_cpu_is_refused_with_the_fix(tmp_path: Path, optim: str) -> None:
    with pytest.raises(PipelineError, match=rf"training.optim {optim} needs a CUDA device.*set it to adamw_torch"):
        create_training_config(TrainingSettings(optim=optim), tmp_path)


def test_wandb_that_is_not_installed_is_refused_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    with pytest.raises(PipelineError, match=r"wandb is not installed: pip install 'triton-sft-pipeline\[wandb\]'"):
        create_training_config(TrainingSettings(report_to_wandb=True), tmp_path)


def test_processes_share_the_accumulation_steps_of_one() -> None:
    settings = TrainingSettings(gradient_accumulation_steps=8)
    shares = [accumulation_steps_each(settings.model_copy(update={"gpus": gpus})) for gpus in (1, 2, 4, 8)]
    assert shares == [8, 4, 2, 1]
    with pytest.raises(
        PipelineError, match=r"accumulation_steps 8 cannot be shared by 3 GPUs.*set it to a multiple of 3"
    ):
        accumulation_steps_each(settings.model_copy(update={"gpus": 3}))


def test_several_gpus_for_a_model_that_is_already_loaded_are_refused_with_what_to_use(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"training.gpus is 2, but.*1 in all: use `triton-sft train --gpus 2`"):
        create_training_config(TrainingSettings(gpus=2), tmp_path)


def test_processes_send_each_other_neither_buffers_nor_a_list_of_unused_parameters(tmp_path: Path) -> None:
    config = create_training_config(output_dir=tmp_path)
    assert (config.ddp_broadcast_buffers, config.ddp_find_unused_parameters) == (False, False)
    assert config.average_tokens_across_devices is True


def test_one_process_trains_on_one_gpu_however_many_it_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    config = create_training_config(output_dir=tmp_path)
    assert config._n_gpu == 1
