"""One small training that tests vary: what it is made of, what it leaves behind, and how to break into it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_sft_pipeline.training.config import create_training_config
from triton_sft_pipeline.training.lora import create_lora_config
from triton_sft_pipeline.training.model import load_model_and_tokenizer
from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings, TrainingSettings
from triton_sft_pipeline.training.trainer import TrainingRun, train

Rows = list[dict[str, Any]]

WORDS = ["relu", "softmax of rows", "sum over columns", "matmul with bias", "gelu", "layer norm", "max pooling", "tanh"]


def chat_row(word: str) -> dict[str, Any]:
    """One row of the chat dataset's format."""
    answer = f"<think>\nOne pass for {word}.\n</think>\n\n<triton>\ndef kernel(): {word}\n</triton>"
    return {
        "sample_key": word.replace(" ", "_"),
        "prompt": [{"role": "user", "content": f"Convert {word} to Triton."}],
        "completion": [{"role": "assistant", "content": answer}],
    }


LORA = LoraSettings(r=4, alpha=8, dropout=0.1, expert_r=2)
"""With dropout and a rank of their own for the experts, so that whatever is compared is compared with both."""

TRAINING = TrainingSettings(
    learning_rate=1e-2,
    warmup_ratio=0.2,
    per_device_batch_size=2,
    gradient_accumulation_steps=1,
    max_steps=6,
    max_length=256,
    gradient_checkpointing=False,
    eval_steps=2,
    save_steps=2,
    logging_steps=1,
    save_total_limit=3,
)
"""Six steps of two rows, with a checkpoint and an evaluation every two."""


@dataclass(frozen=True)
class Setup:
    """Everything a training needs."""

    model: ModelSettings
    dataset: dict[str, Rows]
    lora: LoraSettings = LORA
    training: TrainingSettings = TRAINING

    def but(self, **sections: dict[str, Any]) -> Setup:
        """The same with other values: `setup.but(training={"seed": 1}, dataset={"test": []})`."""
        values: dict[str, Any] = {}
        for name, changes in sections.items():
            old = getattr(self, name)
            values[name] = {**old, **changes} if isinstance(old, dict) else old.model_copy(update=changes)
        return dataclasses.replace(self, **values)

    def train(self, output: Path, **options: Any) -> TrainingRun:
        """Load the base and train an adapter into `output`; `options` are those of `train`."""
        model, tokenizer = load_model_and_tokenizer(self.model)
        config = create_training_config(self.training, output)
        return train(model, tokenizer, self.dataset, config, create_lora_config(self.lora), **options)


def losses(run: TrainingRun) -> list[tuple[float, float]]:
    """(step, loss) of every log line about training."""
    return [(entry["step"], entry["loss"]) for entry in run.log_history if "loss" in entry]


def adapter_weights(directory: Path) -> dict[str, Any]:
    """Name -> tensor of a saved adapter."""
    from safetensors.torch import load_file

    return load_file(str(directory / "adapter_model.safetensors"))


def different_tensors(one: Path, other: Path) -> list[str]:
    """Names of the tensors in which two saved adapters differ by as much as a bit."""
    import torch

    first, second = adapter_weights(one), adapter_weights(other)
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def at_step(step: int, action: Callable[[], None]) -> Callable[[int, dict[str, float]], None]:
    """An on_log that does `action` when the loss of `step` is logged."""

    def on_log(now: int, metrics: dict[str, float]) -> None:
        if now == step and "loss" in metrics:
            action()

    return on_log


class Died(Exception):
    """Stands for whatever ends a process."""


def die() -> None:
    raise Died
