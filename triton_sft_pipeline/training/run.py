"""From a dataset directory to a trained adapter in one call: what the asset, the command line and `main()` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.training.config import create_training_config
from triton_sft_pipeline.training.lora import create_lora_config
from triton_sft_pipeline.training.model import load_model_and_tokenizer
from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings, TrainingSettings
from triton_sft_pipeline.training.trainer import OnLog, TrainingRun, train


def read_rows(dataset: Path, split: str) -> list[dict[str, Any]]:
    """Rows of one split of a dataset directory: prompt, completion, and the sample_key that messages name them by.

    Raises:
        PipelineError: the split's file is missing or is not such a file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(dataset) / f"{split}.parquet"
    try:
        return pq.read_table(path, columns=["prompt", "completion", "sample_key"]).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise PipelineError(
            f"{path}: not readable as a chat dataset ({error}). Build it with `triton-sft dataset build`."
        ) from error


def train_on_dataset(
    model: ModelSettings,
    lora: LoraSettings,
    training: TrainingSettings,
    dataset: Path,
    output: Path,
    *,
    on_log: OnLog | None = None,
    progress: bool = False,
) -> TrainingRun:
    """Load the base model and train an adapter on the `train.parquet` and `test.parquet` of `dataset`, into `output`.

    Goes on from the last checkpoint in `output` when it is of this very training.

    Raises:
        PipelineError: the dataset or the base model cannot be read, or a sample is too long.
        StepError: out of memory, or a full disk.
    """
    rows = {split: read_rows(dataset, split) for split in ("train", "test")}
    loaded, tokenizer = load_model_and_tokenizer(model)
    return train(
        loaded,
        tokenizer,
        rows,
        create_training_config(training, output),
        create_lora_config(lora),
        on_log=on_log,
        progress=progress,
    )
