"""What the settings accept, and that the defaults are the original script's."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings, TrainingSettings


def test_the_defaults_are_those_of_the_original_script() -> None:
    lora, training, model = LoraSettings(), TrainingSettings(), ModelSettings()
    assert (lora.r, lora.alpha, lora.dropout) == (64, 128, 0.05)
    assert lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert (training.learning_rate, training.lr_scheduler_type, training.warmup_ratio, training.weight_decay) == (
        2e-4,
        "cosine",
        0.1,
        0.01,
    )
    assert (
        training.per_device_batch_size,
        training.gradient_accumulation_steps,
        training.epochs,
        training.max_length,
    ) == (1, 8, 3, 4096)
    assert training.gradient_checkpointing
    assert (model.base_model, model.load_in_4bit, model.double_quant, model.quant_type) == (
        "arcee-ai/Trinity-Mini",
        True,
        True,
        "nf4",
    )


@pytest.mark.parametrize("settings", [ModelSettings, LoraSettings, TrainingSettings])
def test_every_setting_says_what_it_is(settings: type[BaseModel]) -> None:
    assert [name for name, field in settings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        (TrainingSettings, {"learning_rate": 0}),
        (TrainingSettings, {"max_length": 0}),
        (TrainingSettings, {"lr_sheduler": "cosine"}),
        (TrainingSettings, {"optim": "sgd"}),
        (LoraSettings, {"rank": 64}),
        (LoraSettings, {"r": 0}),
        (LoraSettings, {"dropout": 1.0}),
        (LoraSettings, {"target_modules": []}),
        (ModelSettings, {"base_model": ""}),
        (ModelSettings, {"load_in_8bit": True}),
        (ModelSettings, {"quant_type": "int3"}),
        (ModelSettings, {"compute_dtype": "float16"}),
    ],
)
def test_a_setting_out_of_bounds_or_unknown_is_refused(settings: type[BaseModel], values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        settings(**values)


def test_settings_cannot_be_changed_after_they_were_checked() -> None:
    with pytest.raises(ValidationError):
        LoraSettings().r = 8  # type: ignore[misc]


def test_importing_the_settings_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'trl'}"
    code = f"import sys, triton_sft_pipeline.training.settings; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
