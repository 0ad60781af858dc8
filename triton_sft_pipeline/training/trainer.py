"""Training the adapter: TRL's SFTTrainer, with the guarantees around it.

What is guaranteed: no sample is cut; only completions are trained on; a killed training goes on from its last whole
checkpoint and ends where an uninterrupted one ends; an interrupt saves a checkpoint first; a full disk or too little
memory is said in one sentence. As one of several processes it takes its share of every step, and only the first one
writes. Knows the columns of the chat dataset, and nothing of traces, kernels or orchestration.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.files import hash_json, write_json
from triton_sft_pipeline.training import checkpoints, packing, ranks
from triton_sft_pipeline.training.failures import failures_explained
from triton_sft_pipeline.training.interrupts import DeferredInterrupts
from triton_sft_pipeline.training.lora import attach_lora, count_adapters, load_adapter_weights
from triton_sft_pipeline.training.progress import library_bars
from triton_sft_pipeline.training.reload import LOG_FILE, PROBE_TOKENS, probe_loss
from triton_sft_pipeline.training.samples import Sample, tokenize_rows
from triton_sft_pipeline.training.sft import OnLog, OnStep, log_into, stopping, trainer_class, watching
from triton_sft_pipeline.training.threads import suitable_threads

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer

# What decides what is learned. A checkpoint made with other values of these is of another training.
_DECISIVE = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "seed",
)


@dataclass(frozen=True)
class TrainingRun:
    """What a finished training left behind.

    Attributes:
        adapter_dir: adapter weights and config, tokenizer, training_log.json, TensorBoard events under runs/.
        log_history: one dict a log line: step, epoch, and loss, learning_rate, grad_norm or eval_loss.
        train_loss: first and last logged loss, nats a token of the completions.
        eval_loss: loss on the test split before the first step and after the last; None without a test split.
        steps: optimiser steps in all.
        seconds: wall time of this call, without what an earlier, interrupted one took.
        resumed_from: the step that this call went on from; None when it began at the beginning.
        adapters: layers and fused expert tensors that carry an adapter.
        trainable_parameters: numbers in the adapter.
        model: the trained model in memory, in evaluation mode; None when other processes trained it (`training.gpus`
            above 1): load it with `load_model_and_tokenizer(settings, run.adapter_dir)`.
    """

    adapter_dir: Path
    log_history: list[dict[str, float]]
    train_loss: tuple[float, float]
    eval_loss: tuple[float, float] | None
    steps: int
    seconds: float
    resumed_from: int | None
    adapters: int
    trainable_parameters: int
    model: Any = field(repr=False, compare=False)


def train(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Mapping[str, Any],
    training_config: SFTConfig,
    lora_config: LoraConfig,
    *,
    on_log: OnLog | None = None,
    on_step: OnStep | None = None,
    resume: bool = True,
    keep_checkpoints: bool = True,
    progress: bool = False,
) -> TrainingRun:
    """Train an adapter on `dataset["train"]`, evaluating on `dataset["test"]`, and save it to
    `training_config.output_dir`.

    Args:
        model: a base model without an adapter; it is changed in place and comes back, trained, in the result.
        dataset: `train` and optionally `test`, each rows with `prompt` and `completion` (lists of {role, content}).
        on_log: called with the step and its metrics at every log line.
        on_step: called before the first step and after every one, with the steps done and all there are. When it says
            True, training stops there as after an interrupt.
        resume: go on from the last whole checkpoint in the output directory when it is of this very training.
        keep_checkpoints: False deletes them once the adapter is saved.
        progress: show a progress bar.

    Raises:
        PipelineError: a sample is too long or malformed, or a LoRA target names nothing.
        StepError: out of memory, disk full, or interrupted (when the handler that the signal is handed to does not
            raise).
    """
    started = time.monotonic()
    if hasattr(model, "peft_config"):
        raise PipelineError("The model already carries an adapter: load the base model again to train a new one.")
    splits = _tokenized_splits(dataset, tokenizer, training_config.max_length)
    if training_config.packing:
        splits["train"] = packing.prepare(model, splits["train"], training_config.max_length)
    output_dir = Path(training_config.output_dir)
    with failures_explained(training_config, model.config), library_bars(progress), suitable_threads(model):
        fingerprint = _fingerprint(model, splits, training_config, lora_config)
        checkpoint = ranks.decided_by_first(lambda: checkpoints.begin_run(output_dir, fingerprint, resume))
        trainer = _build_trainer(
            model, tokenizer, splits, training_config, lora_config, on_log, first=checkpoint is None, progress=progress
        )
        interrupts = _run(trainer, checkpoint, on_step)
        run = _save(trainer, tokenizer, splits["train"][0], output_dir, started, checkpoint)
        if not keep_checkpoints and ranks.rank() == 0:
            checkpoints.remove_checkpoints(output_dir)
    # An interrupt in the very last step came too late to stop anything, but its sender still has to hear of it.
    interrupts.raise_again()
    return run


def losses_finite(log_history: Iterable[Mapping[str, float]]) -> bool:
    """Whether every logged train and eval loss is a number. An empty log is not finite: nothing was learned."""
    losses = [entry[key] for entry in log_history for key in ("loss", "eval_loss") if key in entry]
    return bool(losses) and all(math.isfinite(loss) for loss in losses)


def _tokenized_splits(dataset: Mapping[str, Any], tokenizer: Any, max_length: int | None) -> dict[str, list[Sample]]:
    splits = {
        name: tokenize_rows(dataset[name], tokenizer, max_length, name)
        for name in ("train", "test")
        if name in dataset and dataset[name] is not None and len(dataset[name])
    }
    if "train" not in splits:
        raise PipelineError("The dataset has no train rows: nothing to train on.")
    return splits


def _fingerprint(model: Any, splits: Mapping[str, list[Sample]], config: SFTConfig, lora_config: LoraConfig) -> str:
    arguments = config.to_dict()
    lora = {key: sorted(value) if isinstance(value, set) else value for key, value in lora_config.to_dict().items()}
    # The same samples a step are the same training, on however many GPUs.
    arguments["gradient_accumulation_steps"] *= config.world_size
    quantisation = getattr(model.config, "quantization_config", None)
    return hash_json(
        {
            "base_model": model.config.name_or_path,
            # A directory can get other weights under the same name: a few rows of the embedding tell.
            "base_weights": model.get_input_embeddings().weight[:64].float().flatten().tolist(),
            "dtype": str(model.dtype),
            "quantisation": str(quantisation.to_dict()) if quantisation else None,
            "lora": {key: str(value) for key, value in lora.items()},
            "arguments": {key: str(arguments[key]) for key in _DECISIVE},
            # The test split teaches nothing, but the loss before and after has to be that of the same samples.
            **{name: [[sample.input_ids, sample.labels] for sample in samples] for name, samples in splits.items()},
        }
    )


def _build_trainer(
    model: Any,
    tokenizer: Any,
    splits: Mapping[str, list[Sample]],
    training_config: SFTConfig,
    lora_config: LoraConfig,
    on_log: OnLog | None,
    *,
    first: bool,
    progress: bool,
) -> SFTTrainer:
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback

    arguments = copy.copy(training_config)
    # Lengths were checked; TRL would cut in silence. Packing, too, is done already.
    arguments.max_length, arguments.packing = None, False
    arguments.disable_tqdm = not progress
    arguments.eval_strategy = training_config.eval_strategy if "test" in splits else "no"
    # The loss before the first step is what tells a reader whether anything was learned.
    arguments.eval_on_start = first and "test" in splits
    # The adapter's first weights are drawn now, before the trainer sets the seed itself.
    set_seed(arguments.seed)
    dtype, peft_model = model.dtype, attach_lora(model, lora_config)
    rows = len(splits["train"])
    trainer: SFTTrainer = trainer_class(rows)(
        model=peft_model,
        args=arguments,
        train_dataset=_as_dataset(_shared_out(splits["train"], arguments)),
        eval_dataset=_as_dataset(splits["test"]) if "test" in splits else None,
        processing_class=tokenizer,
        callbacks=[watching(on_log)],
        data_collator=packing.collator(tokenizer.pad_token_id) if training_config.packing else None,
    )
    _cast_adapter(peft_model, dtype)
    trainer.flat = _made_flat(trainer)
    trainer.fast_layers = _made_fast(peft_model, max(len(sample.input_ids) for sample in splits["train"]))
    trainer.one_pass_head = bool(trainer.fast_layers) and _made_one_pass(peft_model)
    trainer.remove_callback(PrinterCallback)
    log_into(trainer, Path(arguments.output_dir) / "runs")
    return trainer


def _cast_adapter(model: Any, dtype: Any) -> None:
    """Train the adapter in the type that the base model computes in.

    TRL makes every adapter on a quantised model bfloat16, which is what a bfloat16 model needs; beside a float32 model
    it costs precision, and on CPUs without bfloat16 units more than half of the speed.
    """
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)


def _made_flat(trainer: Any) -> Any:
    """Join the adapter's weights for an 8-bit optimiser of bitsandbytes, where each step would take one at a time."""
    import torch

    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    if not torch.cuda.is_available() or "8bit" not in str(trainer.args.optim).lower():
        return None
    from triton_sft_pipeline.training.fast.flat import FlatWeights, can_be_flat

    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    all_decayed = all(name in decayed for name, p in trainer.model.named_parameters() if p.requires_grad)
    return FlatWeights(weights) if all_decayed and can_be_flat(weights) else None


def _made_one_pass(model: Any) -> bool:
    """Have the loss computed in one pass where the head allows it. Returns whether it does."""
    from triton_sft_pipeline.training.fast.head import add_one_pass_head

    return add_one_pass_head(model)


def _made_fast(model: Any, longest: int) -> int:
    """Have fused kernels take the place of slow layers, where there is a GPU to run them. Returns how many layers."""
    import torch

    if not torch.cuda.is_available():
        return 0
    from triton_sft_pipeline.training.fast.install import make_fast

    return sum(".layers." in name for name in make_fast(model, longest=longest))


def _make_plain(model: Any) -> None:
    """Undo `_made_fast`: what fused layers work in is memory that nobody needs after training."""
    import torch

    if torch.cuda.is_available():
        from triton_sft_pipeline.training.fast.install import make_plain

        make_plain(model)


def _shared_out(samples: list[Sample], arguments: SFTConfig) -> list[Sample]:
    """Rows that fill whole batches in every process."""
    if arguments.world_size == 1:
        return samples
    return ranks.fill_up(samples, arguments.world_size * arguments.per_device_train_batch_size)


def _as_dataset(samples: list[Sample]) -> Any:
    """A tokenised dataset: TRL takes `input_ids` and `labels` as they are. `seq_lengths` is its name, too, for the
    lengths of what is packed into a row."""
    from datasets import Dataset

    columns = {"input_ids": [s.input_ids for s in samples], "labels": [s.labels for s in samples]}
    if samples[0].documents:
        columns["seq_lengths"] = [list(s.documents) for s in samples]
    return Dataset.from_dict(columns)


def _run(trainer: SFTTrainer, checkpoint: Path | None, on_step: OnStep | None) -> DeferredInterrupts:
    """Train to the end, or to the step after an interrupt, which is then handed on."""
    if checkpoint and _was_last(trainer, checkpoint):
        return DeferredInterrupts()
    with DeferredInterrupts() as interrupts:
        trainer.add_callback(stopping(lambda: interrupts.received is not None, on_step))
        ranks.draw_differently(trainer.args.seed)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < trainer.state.max_steps:
        # A process that ends with an error has the others ended: the first one has to be through with saving.
        ranks.wait_for_all()
        interrupts.raise_again()
        raise StepError(
            f"Training was interrupted at step {trainer.state.global_step} of {trainer.state.max_steps}; a checkpoint "
            f"was saved to {trainer.args.output_dir}. Run it again to go on from there."
        )
    return interrupts


def _was_last(trainer: SFTTrainer, checkpoint: Path) -> bool:
    """Take over `checkpoint` when it is that of the last step: Trainer would add a step to a finished training."""
    from transformers.trainer_callback import TrainerState

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    load_adapter_weights(trainer.model, checkpoint)
    trainer.state = state
    return True


def _save(
    trainer: SFTTrainer, tokenizer: Any, sample: Sample, output_dir: Path, started: float, checkpoint: Path | None
) -> TrainingRun:
    model: PeftModel = trainer.model
    _ready_for_inference(model)
    if ranks.rank() == 0:
        model.save_pretrained(str(output_dir), save_embedding_layers=False)
        tokenizer.save_pretrained(str(output_dir))
    history = [dict(entry) for entry in trainer.state.log_history]
    train_losses = [entry["loss"] for entry in history if "loss" in entry]
    eval_losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    run = TrainingRun(
        adapter_dir=output_dir,
        log_history=history,
        train_loss=(train_losses[0], train_losses[-1]),
        eval_loss=(eval_losses[0], eval_losses[-1]) if eval_losses else None,
        steps=trainer.state.global_step,
        seconds=time.monotonic() - started,
        resumed_from=int(checkpoint.name.rsplit("-", 1)[-1]) if checkpoint else None,
        adapters=count_adapters(model),
        trainable_parameters=sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name),
        model=model,
    )
    if ranks.rank() == 0:
        _write_log(run, trainer, sample)
    return run


def _write_log(run: TrainingRun, trainer: SFTTrainer, sample: Sample) -> None:
    from peft.tuners.lora import LoraLayer

    dropout = {
        getattr(layer, "p", 0.0)
        for module in run.model.modules()
        if isinstance(module, LoraLayer)
        for layer in module.lora_dropout.values()
    }
    write_json(
        run.adapter_dir / LOG_FILE,
        {
            "steps": run.steps,
            "seconds": round(run.seconds, 1),
            "resumed_from": run.resumed_from,
            "train_loss": list(run.train_loss),
            "eval_loss": list(run.eval_loss) if run.eval_loss else None,
            "adapters": run.adapters,
            "trainable_parameters": run.trainable_parameters,
            "dropout": max(dropout, default=0.0),
            "fast_layers": trainer.fast_layers,
            "processes": trainer.args.world_size,
            "arguments": {key: str(getattr(trainer.args, key)) for key in _DECISIVE},
            "probe": {"input_ids": sample.input_ids[:PROBE_TOKENS], "loss": probe_loss(run.model, sample.input_ids)},
            "log_history": run.log_history,
        },
    )


def _ready_for_inference(model: Any) -> None:
    """Undo what training switched on: recomputation forbids the cache that generation needs."""
    _make_plain(model)
    # transformers 5.2x renamed this; asking for the old name there warns.
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    model.disable_input_require_grads()
    model.config.use_cache = True
    model.eval()
