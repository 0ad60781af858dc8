"""TRL's SFTTrainer with what this project's guarantees need of it, and the callbacks that watch it and stop it.

Knows nothing of files, models or data: trainer.py puts them together.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.training import ranks
from triton_sft_pipeline.training.lora import load_adapter_weights

if TYPE_CHECKING:
    from trl import SFTTrainer

OnLog = Callable[[int, dict[str, float]], None]
OnStep = Callable[[int, int], bool]


def trainer_class(rows: int) -> type[SFTTrainer]:
    """The trainer of a dataset whose first `rows` rows are to be learned; what is behind them fills the last batch."""
    import torch
    from trl import SFTTrainer

    class AdapterTrainer(SFTTrainer):
        """SFTTrainer that resumes an adapter in the types it was saved in, whose evaluations leave no trace in the
        training, and whose steps take the same rows however many processes share them."""

        fast_layers = 0

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            if self.args.world_size == 1:
                return super()._get_train_sampler(*args, **kwargs)
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            order = ranks.shuffled(rows, len(self.train_dataset), seed)
            self.add_callback(_each_epoch(order))
            return order

        def _save_rng_state(self, output_dir: str) -> None:
            super()._save_rng_state(output_dir)
            # The first process writes trainer_state.json next, which says that the checkpoint is whole.
            ranks.wait_for_all()

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            # The inherited one turns bfloat16 adapters into float32, so that a resumed run would end elsewhere.
            load_adapter_weights(model or self.model, Path(resume_from_checkpoint))

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            # Every pass over a data loader draws a random number. Without this, how often one evaluates would change
            # the dropout that follows.
            with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
                return super().evaluate(*args, **kwargs)

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """Nothing: PEFT writes a card beside the weights, and that one suffices."""

    return AdapterTrainer


def watching(on_log: OnLog | None) -> Any:
    """A callback that hands every log line on, and has the very last step evaluated."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step >= state.max_steps and args.eval_strategy != "no":
                control.should_evaluate = True
            return control

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
        ) -> None:
            metrics = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
            if on_log is not None and metrics:
                on_log(state.global_step, metrics)

    return Progress()


def stopping(interrupted: Callable[[], bool], on_step: OnStep | None) -> Any:
    """A callback that saves and ends the training after the step in which any of its processes was interrupted, or in
    which any one's `on_step` says so."""
    from transformers import TrainerCallback

    class StopWhenAsked(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_step is not None:
                on_step(state.global_step, state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            wanted = on_step is not None and on_step(state.global_step, state.max_steps)
            if ranks.any_wants(wanted or interrupted(), args.device):
                control.should_save = control.should_training_stop = True
            return control

    return StopWhenAsked()


def log_into(trainer: SFTTrainer, directory: Path) -> None:
    """Write TensorBoard events to one known place; the default names a directory after the machine and the minute."""
    from transformers.integrations import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(directory)


def _each_epoch(order: Any) -> Any:
    """A callback that tells a sampler which epoch begins."""
    from transformers import TrainerCallback

    class Epoch(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            order.epoch = int(state.epoch or 0)

    return Epoch()
