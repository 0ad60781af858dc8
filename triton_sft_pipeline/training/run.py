"""From a dataset directory to a trained adapter in one call: what the asset, the command line and `main()` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import read_json, sha256_file, write_json
from triton_sft_pipeline.training import ranks
from triton_sft_pipeline.training.config import create_training_config
from triton_sft_pipeline.training.lora import create_lora_config
from triton_sft_pipeline.training.memory import require_memory
from triton_sft_pipeline.training.model import load_model_and_tokenizer
from triton_sft_pipeline.training.reload import LOG_FILE
from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings, TrainingSettings
from triton_sft_pipeline.training.trainer import OnLog, OnStep, TrainingRun, train


def read_rows(dataset: Path, split: str) -> list[dict[str, Any]]:
    """Rows of one split of a dataset directory: prompt and completion, or messages, and the sample_key that errors name
    them by.

    Raises:
        PipelineError: the split's file is missing or is not such a file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(dataset) / f"{split}.parquet"
    try:
        spoken = ["messages"] if "messages" in pq.read_schema(path).names else ["prompt", "completion"]
        return pq.read_table(path, columns=[*spoken, "sample_key"]).to_pylist()
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

    Goes on from the last checkpoint in `output` when it is of this very training. With `training.gpus` above 1 that
    many processes do it together; their result holds no model.

    Raises:
        PipelineError: the dataset or the base model cannot be read, a sample is too long, or there are fewer GPUs.
        StepError: out of memory, a full disk, or a process that died.
    """
    if training.gpus == 1:
        return train_in_this_process(model, lora, training, dataset, output, on_log=on_log, progress=progress)
    from triton_sft_pipeline.training.launch import train_in_processes

    return train_in_processes(model, lora, training, dataset, output, on_log=on_log, progress=progress)


def train_in_this_process(
    model: ModelSettings,
    lora: LoraSettings,
    training: TrainingSettings,
    dataset: Path,
    output: Path,
    *,
    on_log: OnLog | None = None,
    on_step: OnStep | None = None,
    progress: bool = False,
) -> TrainingRun:
    """`train_on_dataset` without starting others: alone, or as one of the processes that were started for it."""
    rows = {split: read_rows(dataset, split) for split in ("train", "test")}
    require_memory(model, lora, training)
    loaded, tokenizer = load_model_and_tokenizer(model)
    run = train(
        loaded,
        tokenizer,
        rows,
        create_training_config(training, output),
        create_lora_config(lora),
        on_log=on_log,
        on_step=on_step,
        progress=progress,
    )
    if ranks.rank() == 0:
        _note_dataset(run.adapter_dir, dataset)
    return run


def _note_dataset(adapter: Path, dataset: Path) -> None:
    """Have the training log say what was trained on, so that an evaluation can keep it apart. A dataset inside the
    adapter's directory is named from there, so that both can be moved."""
    log, place = read_json(adapter / LOG_FILE), Path(dataset).absolute()
    inside = place.is_relative_to(adapter.absolute())
    log["dataset"] = {
        "path": str(place.relative_to(adapter.absolute()) if inside else place),
        "train_sha256": sha256_file(place / "train.parquet"),
    }
    write_json(adapter / LOG_FILE, log)
