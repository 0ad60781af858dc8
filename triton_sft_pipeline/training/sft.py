"""TRL's SFTTrainer with what this project's guarantees need of it, and the callbacks that watch it and stop it.

Knows nothing of files, models or data: trainer.py puts them together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.training import ranks
from triton_sft_pipeline.training.batch_facts import FACTS, BatchFacts, with_facts
from triton_sft_pipeline.training.lora import load_adapter_weights

if TYPE_CHECKING:
    from trl import SFTTrainer

    from triton_sft_pipeline.training.fast.flat import FlatWeights

OnLog = Callable[[int, dict[str, float]], None]
OnStep = Callable[[int, int], bool]


def trainer_class(rows: int) -> type[SFTTrainer]:
    """The trainer of a dataset whose first `rows` rows are to be learned; what is behind them fills the last batch."""
    import torch
    from trl import SFTTrainer

    class AdapterTrainer(SFTTrainer):
        """SFTTrainer that resumes an adapter in the types it was saved in, whose evaluations leave no trace in the
        training, whose steps take the same rows however many processes share them, and which asks the device
        for metrics only where a log line is due."""

        fast_layers = 0
        one_pass_head = False
        flat: FlatWeights | None = None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.data_collator: Any = with_facts(self.data_collator)
            self._pending: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]] = []
            self._flos_a_token: int | None = None

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            facts = inputs.pop(FACTS, None)
            if facts is None or return_outputs or not self.model.training or not self._plain_loss():
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return self._training_loss(model, inputs, facts, num_items_in_batch)

        def _plain_loss(self) -> bool:
            """Whether the loss is the completions' negative log-likelihood and nothing else."""
            if self.compute_loss_func is not None or self.label_smoother is not None or self.aux_loss_enabled:
                return False
            return self.args.loss_type == "nll" and self.accelerator.parallelism_config is None

        def _training_loss(self, model: Any, inputs: dict[str, Any], facts: BatchFacts, items: Any) -> torch.Tensor:
            """The inherited loss, to the bit but for a head in one pass; metrics stay on the device until they are
            logged."""
            trained = {}
            if self.one_pass_head and facts.labels is not None:
                from triton_sft_pipeline.training.fast.head import trained_tokens

                trained["trained"] = trained_tokens(facts.labels).to(self.args.device)
            with _padding_known(self.model, facts.padded_behind) if self.fast_layers else contextlib.nullcontext():
                outputs = model(**{**inputs, "use_cache": False}, fused_lm_head=True, **trained)
            valid = outputs.label_mask.sum()
            losses = -outputs.log_probs
            loss: torch.Tensor = losses.sum() / torch.as_tensor(valid if items is None else items).clamp(min=1)
            if self.args.average_tokens_across_devices and items is not None:
                # The gradients' mean over processes follows, and `items` are those of all of them.
                loss = loss * self.accelerator.num_processes
            # Detached: what waits for a log line must not hold a pass's activations.
            self._pending.append((valid, outputs.is_top1.detach().sum(), outputs.entropy.detach().sum(), facts.tokens))
            return loss

        def _settle_metrics(self) -> None:
            """Turn what was measured since the last log line into TRL's metrics: means over the tokens of all
            processes, one a forward pass. Every process has to come here."""
            if not self._pending:
                return
            valid, correct, entropy, tokens = zip(*self._pending, strict=True)
            self._pending.clear()
            valid, correct = self._summed(valid), self._summed(correct)
            entropy = self._summed(entropy)
            metrics = self._metrics["train"]
            for name, sums in (("entropy", entropy), ("mean_token_accuracy", correct)):
                means = torch.where(valid > 0, sums / valid, 0.0).tolist()
                metrics[name].extend(means)
            self._total_train_tokens += int(self._summed([torch.tensor(sum(tokens), device=self.args.device)]))
            metrics["num_tokens"] = [self._total_train_tokens]

        def _summed(self, numbers: Sequence[torch.Tensor]) -> torch.Tensor:
            """[numbers], each summed over all processes."""
            return self.accelerator.gather(torch.stack(list(numbers))[None]).sum(0).cpu()

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            self._settle_metrics()
            super().log(logs, start_time)

        def floating_point_ops(self, inputs: dict[str, Any]) -> int:
            # The inherited one counts the parameters of thousands of modules, in every forward pass.
            if self._flos_a_token is None:
                self._flos_a_token = super().floating_point_ops({"input_ids": inputs["input_ids"][:1, :1]})
            return self._flos_a_token * int(inputs["input_ids"].numel())

        def create_optimizer(self, model: Any = None) -> Any:
            if getattr(self, "optimizer", None) is None and self.flat is not None:
                make, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                groups = [{"params": self.flat.parameters, "weight_decay": self.args.weight_decay}]
                self.optimizer = make(groups, **options)
                self.flat.before_each_step(self.optimizer)
            return super().create_optimizer(model)

        @staticmethod
        def get_optimizer_cls_and_kwargs(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
            optimiser, options = SFTTrainer.get_optimizer_cls_and_kwargs(*args, **kwargs)
            return without_waiting(optimiser), options

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
            self._settle_metrics()
            with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
                return super().evaluate(*args, **kwargs)

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """Nothing: PEFT writes a card beside the weights, and that one suffices."""

    return AdapterTrainer


def without_waiting(optimiser: Any) -> Any:
    """`optimiser` (a class) itself, or, where it is one of bitsandbytes', one that computes the same without waiting
    for the device after every tensor. The device does things in order anyway; only who reads paged states on the host,
    as saving does, has to wait, so `state_dict` does."""
    if optimiser.__module__.partition(".")[0] != "bitsandbytes":
        return optimiser
    from bitsandbytes.optim import optimizer as library

    if not hasattr(library, "sync_gpu"):
        return optimiser

    class Unwaiting(optimiser):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            wait, library.sync_gpu = library.sync_gpu, _nothing
            try:
                return super().step(closure)
            finally:
                library.sync_gpu = wait

        def state_dict(self) -> Any:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return super().state_dict()

    # Trainer looks where an optimiser comes from.
    Unwaiting.__module__, Unwaiting.__name__ = optimiser.__module__, optimiser.__name__
    Unwaiting.__qualname__ = optimiser.__qualname__
    return Unwaiting


def _nothing(_: Any) -> None:
    pass


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


@contextlib.contextmanager
def _padding_known(model: Any, behind: bool) -> Iterator[None]:
    from triton_sft_pipeline.training.fast.install import padding_known

    with padding_known(model, behind):
        yield


def _each_epoch(order: Any) -> Any:
    """A callback that tells a sampler which epoch begins."""
    from transformers import TrainerCallback

    class Epoch(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            order.epoch = int(state.epoch or 0)

    return Epoch()
