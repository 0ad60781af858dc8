"""What assets are handed by Dagster: the GPU with its model and trainer, the kernel judge, and the place of the
artifacts.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from triton_sft_pipeline.config import Config, load_config, storage_root
from triton_sft_pipeline.storage import ArtifactStore

if TYPE_CHECKING:
    from triton_sft_pipeline.training.trainer import TrainingRun
    from triton_sft_pipeline.verification import KernelJudge


class StoreResource(dg.ConfigurableResource):
    """Where artifacts are read from and promoted to."""

    root: str = Field(
        default="", description="Directory of the artifacts; empty: TRITON_SFT_HOME, else `storage` of the checkout."
    )

    def open(self) -> ArtifactStore:
        """The store under `root`."""
        return ArtifactStore(Path(self.root) if self.root else storage_root())


class GPUResource(dg.ConfigurableResource):
    """The device that trains and generates: it loads the 4-bit model and drives the SFTTrainer, in the step's own
    process, or, on several GPUs, in a process a GPU that the step starts and waits for.

    Without a CUDA device the same code runs on the CPU, which is what the `tiny` preset is for. No model is handed from
    one asset to the
    next: each
    loads what it needs and frees it.
    """

    preset: str = Field(
        default="",
        description="For a trial: another preset than the active one.",
    )
    overrides: dict[str, Any] = Field(
        default={},
        description='For a trial: settings by dotted name, such as {"training.learning_rate": 1e-4}. They are recorded '
        "with the adapter, and `triton-sft refresh` counts an adapter made with them as stale.",
    )
    gpus: int | None = Field(
        default=None,
        ge=1,
        description="GPUs of this machine that train together; null: training.gpus. The adapter is the same on any "
        "number, so it makes nothing stale.",
    )
    progress: bool = Field(
        default=False,
        description="Show progress bars on the terminal. Leave it off under the web server, which stores every line.",
    )

    def settings(self, active: Config) -> Config:
        """The configuration that this resource stands for: the active one, unless a trial says otherwise.

        Raises:
            PipelineError: an unknown preset or field.
        """
        if self.preset or self.overrides:
            active = load_config(preset=self.preset or active.preset, overrides=self.overrides)
        if self.gpus is None:
            return active
        return active.model_copy(update={"training": active.training.model_copy(update={"gpus": self.gpus})})

    @contextmanager
    def model(self, config: Config, adapter: Path | None = None) -> Iterator[tuple[Any, Any]]:
        """The model, with `adapter` on it when one is given, and its tokenizer. Its memory is given back afterwards."""
        from triton_sft_pipeline.training.model import load_model_and_tokenizer

        loaded = list(load_model_and_tokenizer(config.model, adapter))
        try:
            yield loaded[0], loaded[1]
        finally:
            loaded.clear()
            free_device_memory()

    def train(
        self, config: Config, dataset: Path, output: Path, on_log: Callable[[int, dict[str, float]], None]
    ) -> TrainingRun:
        """Fine-tune the base model on the dataset directory `dataset`; goes on from the last checkpoint in `output`."""
        from triton_sft_pipeline.training.run import train_on_dataset

        return train_on_dataset(
            config.model, config.lora, config.training, dataset, output, on_log=on_log, progress=self.progress
        )


class JudgeResource(dg.ConfigurableResource):
    """The kernel judge: runs a kernel beside its PyTorch reference and says what it is worth."""

    device: str = Field(
        default="", description="cuda or cpu (Triton's interpreter: no speed); empty: evaluation.judge_device."
    )
    workers: int | None = Field(
        default=None, description="Kernels judged beside each other; null: by the number of cores."
    )
    timeout_s: float | None = Field(
        default=None,
        description="Seconds one kernel may take, compilation included; null: evaluation.judge_timeout_s.",
    )
    trials: int | None = Field(
        default=None,
        description="Draws of inputs on which a kernel has to agree with its reference; null: evaluation.judge_trials.",
    )
    timing: bool | None = Field(
        default=None, description="Measure speedups where the device allows it; null: evaluation.timing."
    )
    compile_baseline: bool | None = Field(
        default=None, description="Measure against torch.compile too; null: evaluation.compile_baseline."
    )

    def settings(self, config: Config) -> dict[str, Any]:
        """What the judge is made with: `config.evaluation` where this resource has nothing of its own."""
        settings = config.evaluation
        configured: dict[str, Any] = {
            "device": settings.judge_device,
            "workers": None,
            "timeout_s": settings.judge_timeout_s,
            "trials": settings.judge_trials,
            "timing": settings.timing,
            "compile_baseline": settings.compile_baseline,
        }
        return configured | {name: value for name in configured if (value := getattr(self, name)) not in (None, "")}

    @contextmanager
    def open(self, config: Config, models: Sequence[str] = ()) -> Iterator[KernelJudge]:
        """A judge with these settings; none of its processes outlives the block.

        Args:
            models: repositories of the Hub that problems load; they are read from the local cache.

        Raises:
            PipelineError: a setting out of range, or no GPU where "cuda" was asked for.
        """
        from triton_sft_pipeline.verification import KernelJudge

        with KernelJudge(**self.settings(config), models=models) as judge:
            yield judge


def free_device_memory() -> None:
    """Give cached device memory back: the judge's workers, or the next step, need it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
