"""What the training benchmark measures in one process: steps of the project's own trainer, their time and memory.

Nothing of the training is rebuilt here: the trainer, its optimiser, its loss and its fused layers are those that
`triton-sft train` uses. Only checkpoints on disk are left out, because the clock would count them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import judge_machine
import train_step_models as models

if TYPE_CHECKING:
    from triton_sft_pipeline.config import Config

GIB = 2**30
CEILING_SIZE = 8192


@dataclass(frozen=True)
class Job:
    """What is to be measured. The names are those of the options of train_step.py."""

    preset: str
    shape: str = models.TRINITY_MINI
    layers: int | None = None
    seq: int = 4096
    batch: int = 1
    accumulation: int = 2
    steps: int = 20
    warmup: int = 5
    cap_gib: float | None = None
    prompt_share: float = 0.0
    curve_steps: int = 50

    def config(self) -> Config:
        """The preset, with this job's sizes in the place of its own."""
        from triton_sft_pipeline.config import load_config

        sizes = {
            "training.per_device_batch_size": self.batch,
            # The setting is what all GPUs do together; here every one does `accumulation` micro-batches.
            "training.gradient_accumulation_steps": self.accumulation * processes(),
            "training.gpus": processes(),
            "training.max_length": max(self.seq, 16),
        }
        # A user's own configuration file must not change what a preset's name stands for in a report.
        return load_config(self.preset, overrides=sizes, environ={})


def start(job: Job) -> str:
    """Choose this process's device and put the cap on its memory. Returns the device's name."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    if job.cap_gib is not None:
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.cap_gib * GIB / total), index)
    return f"cuda:{index}"


def measure(job: Job) -> dict[str, Any]:
    """Train `warmup + steps` optimiser steps and say how long the last `steps` of them took, how near that is to what
    the GPU can do, and what memory it took."""
    device = start(job)
    ceiling = matmul_ceiling(device)
    reset_peak(device)
    began = time.monotonic()
    count = job.warmup + job.steps
    trainer = project_trainer(job, device, count)
    built = {"seconds": time.monotonic() - began, **memory(device)}
    result = trained(trainer, job.warmup, job.seq * job.batch * job.accumulation, device)
    config = job.config()
    work = models.work_a_token(
        trainer.model.config, config.lora, job.seq, 1.0 - job.prompt_share, config.training.gradient_checkpointing
    )
    result |= {"built": built, "fused": fused(trainer.model), "cap_gib": job.cap_gib}
    result |= {"ceiling_tflops": ceiling, "flops_a_token": {"model": work.model, "executed": work.executed}}
    if result["tokens_per_s"] is not None:
        rate = result["tokens_per_s"] / result["gpus"]
        result["share"] = {
            "model": rate * work.model / (ceiling * 1e12),
            "executed": rate * work.executed / (ceiling * 1e12),
        }
    return result


def loss_curve(job: Job, dropout_seed: int) -> dict[str, Any]:
    """The loss of every optimiser step on data that can be learned.

    Data, adapter and order are the same in every call; `dropout_seed` decides about dropout alone.
    """
    import torch
    from transformers import TrainerCallback

    class Reseed(TrainerCallback):
        """Seeds dropout after everything else that is random has been drawn."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            torch.manual_seed(dropout_seed)

    device = start(job)
    trainer = project_trainer(job, device, job.curve_steps, learnable=True)
    trainer.add_callback(Reseed())
    result = trained(trainer, 1, job.seq * job.batch * job.accumulation, device)
    return result | {"fused": fused(trainer.model), "dropout_seed": dropout_seed}


def project_trainer(job: Job, device: str, steps: int, learnable: bool = False) -> Any:
    """The project's trainer around a random model, with data for `steps` optimiser steps."""
    from triton_sft_pipeline.training.lora import create_lora_config
    from triton_sft_pipeline.training.samples import IGNORED, Sample
    from triton_sft_pipeline.training.trainer import _build_trainer

    config = job.config()
    model = models.packed_model(job.shape, job.layers, config.model, device)
    arguments = training_arguments(job, config, steps, every_loss=learnable)
    prompt = int(job.seq * job.prompt_share)
    samples = [
        Sample(str(number), row, [IGNORED] * prompt + row[prompt:])
        for number, row in enumerate(data(job, steps, model.config.vocab_size, learnable))
    ]
    trainer = _build_trainer(
        model,
        models.tokenizer(),
        {"train": samples},
        arguments,
        create_lora_config(config.lora),
        None,
        first=True,
        progress=False,
    )
    return trainer


def training_arguments(job: Job, config: Config, steps: int, every_loss: bool = False) -> Any:
    """The preset's training arguments for so many steps, without checkpoints, in a folder of their own."""
    from triton_sft_pipeline.training.config import create_training_config

    changed: dict[str, Any] = {"max_steps": steps} | ({"logging_steps": 1} if every_loss else {})
    folder = tempfile.mkdtemp(prefix="train-step-")
    arguments = create_training_config(config.training.model_copy(update=changed), folder)
    arguments.save_strategy = arguments.eval_strategy = "no"
    # Fixed, so that the order of the data does not depend on what else drew random numbers.
    arguments.data_seed = config.training.seed
    return arguments


def data(job: Job, steps: int, vocabulary: int, learnable: bool = False) -> list[list[int]]:
    """A row a sample, for every sample of `steps` optimiser steps on all GPUs."""
    count = steps * job.accumulation * job.batch * processes()
    make = models.learnable_rows if learnable else models.random_rows
    return make(count, job.seq, vocabulary, seed=1)


def processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def fused(peft_model: Any) -> dict[str, int]:
    """Decoder layers that the trainer has made fused ones of, and forward passes of the model that went through them:
    none where a batch or a device does not allow it."""
    from triton_sft_pipeline.training.fast.install import fused_passes

    layers = peft_model.get_base_model().model.layers
    return {"layers": sum("forward" in vars(layer) for layer in layers), "passes": fused_passes(peft_model)}


def unrecorded(peft_model: Any) -> None:
    """Have fused layers run one by one from now on, where they were replayed as graphs."""
    from triton_sft_pipeline.training.fast.install import fused_passes, make_fast

    if fused_passes(peft_model):
        make_fast(peft_model, force=True)


def trained(trainer: Any, warmup: int, tokens: int, device: str) -> dict[str, Any]:
    """Run `trainer` to its last step and say what every step after the warm-up took.

    A step's time is that from the end of the step before: data, logging and optimiser are in it.

    Args:
        trainer: any trainer of transformers.
        warmup: steps that are not counted; at least one.
        tokens: tokens of a step on one GPU.
        device: where it trains.

    Returns:
        Times, rate, losses and memory; `failed`, with the error, when it did not reach the last step.
    """
    from triton_sft_pipeline.training.threads import suitable_threads

    clock = step_clock(device)
    trainer.add_callback(clock)
    reset_peak(device)
    result: dict[str, Any] = {}
    try:
        with suitable_threads(trainer.model):
            trainer.train()
    # Whatever stopped it, the steps before it were measured, and the report has to say what stopped it.
    except Exception as error:
        result["failed"] = described(error)
    result |= {"steps_done": len(clock.marks), "steps_asked": trainer.args.max_steps, "gpus": processes()}
    times = clock.seconds()[warmup - 1 :]
    result |= {"step_s": spread(times), "tokens_a_step": tokens * processes(), "tokens_per_s": None}
    if times:
        result["tokens_per_s"] = tokens * processes() / statistics.median(times)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    result |= {"losses": losses, "trainable_parameters": sum(parameter.numel() for parameter in parameters)}
    result |= {"optimizer": str(trainer.args.optim), "memory": memory(device)}
    return result


def step_clock(device: str) -> Any:
    """A callback that marks the end of every optimiser step, on the GPU's own clock where there is one."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[Any] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if device == "cpu":
                self.marks.append(time.perf_counter())
                return
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self.marks.append(mark)

        def seconds(self) -> list[float]:
            """From each mark to the next."""
            pairs = list(pairwise(self.marks))
            if device == "cpu":
                return [after - before for before, after in pairs]
            torch.cuda.synchronize()
            return [before.elapsed_time(after) / 1000 for before, after in pairs]

    return Clock()


def matmul_ceiling(device: str) -> float:
    """TFLOP/s of a large matrix product here and now: the best of five rounds of ten, 8192 cubed in bfloat16."""
    import torch

    on_gpu = device != "cpu"
    size, kind = (CEILING_SIZE, torch.bfloat16) if on_gpu else (256, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        began = _now(device)
        for _ in range(10):
            left @ right
        best = min(best, (_now(device) - began) / 10)
    del left, right
    if on_gpu:
        torch.cuda.empty_cache()
    return 2 * size**3 / best / 1e12


def _now(device: str) -> float:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak(device: str) -> None:
    """Count peaks of memory from here on."""
    import torch

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def memory(device: str) -> dict[str, float | None]:
    """GiB that tensors take now; since `reset_peak` the most that they took and the most that torch held; what the GPU
    says is in use now by everybody, the driver's part and paged optimiser states included; and how often torch had to
    give memory back and try again."""
    if device == "cpu":
        return dict.fromkeys(("now_gib", "allocated_gib", "reserved_gib", "gpu_used_gib", "retries"))
    import torch

    return {
        "now_gib": torch.cuda.memory_allocated() / GIB,
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "gpu_used_gib": _used_gib(),
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
    }


def _used_gib() -> float | None:
    answer = judge_machine._nvidia_smi("memory.used").splitlines()
    return float(answer[0]) / 1024 if answer and answer[0].strip().isdigit() else None


def about() -> dict[str, Any]:
    """Everything that a figure depends on and that is not in the command: machine, clocks, versions, commit."""
    from importlib import metadata

    found = judge_machine.about()
    for package in ("transformers", "trl", "peft", "bitsandbytes", "accelerate"):
        found["versions"][package] = metadata.version(package)
    found["clocks"] = judge_machine._nvidia_smi("clocks.sm,clocks.max.sm,clocks.mem,power.limit")
    folder = Path(__file__).resolve().parent
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    return found | {"commit": answer.stdout.strip() or None}


def spread(times: list[float]) -> dict[str, float] | None:
    """Median, and what a tenth is below and above; None of nothing."""
    if not times:
        return None
    ordered = sorted(times)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p10": ordered[round(0.1 * last)],
        "p90": ordered[round(0.9 * last)],
        "count": float(len(ordered)),
    }


def described(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
