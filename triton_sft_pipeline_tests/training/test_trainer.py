"""Training end to end on a micro model: what is learned, what it leaves behind, and what has no influence on it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.evaluation.contamination import training_problems
from triton_sft_pipeline.files import read_json, sha256_file
from triton_sft_pipeline.training.config import create_training_config
from triton_sft_pipeline.training.lora import create_lora_config
from triton_sft_pipeline.training.model import load_model_and_tokenizer
from triton_sft_pipeline.training.run import read_rows, train_on_dataset
from triton_sft_pipeline.training.samples import IGNORED, tokenize_rows
from triton_sft_pipeline.training.settings import ModelSettings
from triton_sft_pipeline.training.trainer import TrainingRun, losses_finite, train
from triton_sft_pipeline_tests.training.setups import Setup, adapter_weights, different_tensors, losses


def test_the_original_calls_train_an_afmoe_as_they_stand(setup: Setup, tmp_path: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(setup.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = train(model, tokenizer, setup.dataset, create_training_config(output_dir=tmp_path), create_lora_config())
    # 3 epochs of 6 rows in batches of 1 x 8.
    assert run.steps == 3
    assert run.adapters == 18
    assert losses_finite(run.log_history)
    weights = adapter_weights(tmp_path)
    assert len(weights) == 2 * 18
    assert [name for name, value in weights.items() if "lora_B" in name and not value.any()] == []
    after = {name.replace(".base_layer", ""): value for name, value in run.model.get_base_model().state_dict().items()}
    assert [name for name, value in before.items() if not value.equal(after[name])] == []


def test_the_loss_falls(trained: TrainingRun) -> None:
    assert trained.train_loss[1] < trained.train_loss[0] - 0.1
    assert trained.eval_loss is not None
    assert trained.eval_loss[1] < trained.eval_loss[0]
    assert trained.train_loss == (losses(trained)[0][1], losses(trained)[-1][1])


def test_every_tensor_of_the_adapter_moves(setup: Setup, trained: TrainingRun, tmp_path: Path) -> None:
    setup.but(training={"max_steps": 1, "warmup_ratio": 0.0, "learning_rate": 1e-12}).train(tmp_path)
    # At that learning rate the adapter is still what it was at the start, from the same seed.
    start, end = adapter_weights(tmp_path), adapter_weights(trained.adapter_dir)
    assert start.keys() == end.keys()
    assert [name for name in start if (start[name] - end[name]).abs().max() < 1e-4] == []


def test_the_loss_is_that_of_the_completions_alone(setup: Setup, trained: TrainingRun) -> None:
    """Computed here from the base model's logits, token by token."""
    import torch

    model, tokenizer = load_model_and_tokenizer(setup.model)
    of_completions, of_everything = [], []
    for sample in tokenize_rows(setup.dataset["test"], tokenizer, None, "test"):
        tokens = torch.tensor(sample.input_ids)
        with torch.no_grad():
            logits = model(tokens[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        of_everything.append(loss)
        of_completions.append(loss[torch.tensor(sample.labels[1:]) != IGNORED])
    assert trained.eval_loss is not None
    assert trained.eval_loss[0] == pytest.approx(float(torch.cat(of_completions).mean()), abs=1e-5)
    assert trained.eval_loss[0] != pytest.approx(float(torch.cat(of_everything).mean()), abs=1e-3)


def test_the_output_directory_holds_what_a_user_and_tensorboard_need(setup: Setup, trained: TrainingRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = trained.adapter_dir
    for name in ("adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (directory / name).is_file(), name
    saved = json.loads((directory / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == setup.model.base_model
    log = json.loads((directory / "training_log.json").read_text())
    assert log["steps"] == trained.steps == 6
    assert log["log_history"] == trained.log_history
    assert log["dropout"] == 0.1
    events = EventAccumulator(str(directory / "runs")).Reload()
    curve = {event.step: event.value for event in events.Scalars("train/loss")}
    assert curve == pytest.approx(dict(losses(trained)))
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 2, 4, 6]


def test_every_log_line_is_handed_on_and_checkpoints_go_when_asked(
    setup: Setup, trained: TrainingRun, tmp_path: Path
) -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    run = setup.train(tmp_path, on_log=lambda step, metrics: seen.append((step, metrics)), keep_checkpoints=False)
    assert [(step, metrics["loss"]) for step, metrics in seen if "loss" in metrics] == losses(run) == losses(trained)
    assert [step for step, metrics in seen if "eval_loss" in metrics] == [0, 2, 4, 6]
    kept, names = ({path.name for path in d.iterdir()} for d in (trained.adapter_dir, tmp_path))
    assert kept - names == {"checkpoint-2", "checkpoint-4", "checkpoint-6", "run.json"}
    assert not any(name.startswith(".tmp-") for name in names)


def test_the_model_that_comes_back_is_ready_to_generate(trained: TrainingRun) -> None:
    import torch

    assert not trained.model.training
    written = trained.model.generate(torch.tensor([[0, 20, 21]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert written.shape == (1, 7)


def test_the_log_says_which_layers_ran(trained: TrainingRun) -> None:
    log = json.loads((trained.adapter_dir / "training_log.json").read_text())
    assert (log["fast_layers"], log["processes"]) == (0, 1)


def test_every_tensor_of_the_adapter_has_a_gradient_though_experts_get_no_token(setup: Setup, tmp_path: Path) -> None:
    """What training in several processes rests on: they wait for the gradient of every tensor."""
    import torch

    from triton_sft_pipeline.training.lora import attach_lora

    model, _ = load_model_and_tokenizer(setup.model)
    model = attach_lora(model, create_lora_config(setup.lora)).train()
    # One token reaches two of eight experts.
    tokens = torch.tensor([[20, 21]])
    model(tokens, labels=tokens).loss.backward()
    adapter = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert adapter and all(".lora_" in name for name in adapter)
    assert [name for name, parameter in adapter.items() if parameter.grad is None] == []


def test_packed_samples_are_trained_on_without_seeing_each_other(
    setup: Setup, trained: TrainingRun, tmp_path: Path
) -> None:
    run = setup.but(training={"packing": True, "max_steps": 2, "per_device_batch_size": 1}).train(tmp_path)
    assert losses_finite(run.log_history)
    assert run.train_loss[1] < run.train_loss[0]


def test_training_without_a_test_split_has_no_eval_loss(setup: Setup, tmp_path: Path) -> None:
    run = setup.but(dataset={"test": []}, training={"max_steps": 1}).train(tmp_path)
    assert run.eval_loss is None
    assert not run.model.training
    assert json.loads((tmp_path / "training_log.json").read_text())["eval_loss"] is None


def test_a_datasets_table_trains_like_plain_rows(setup: Setup, trained: TrainingRun, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    tables = DatasetDict({split: Dataset.from_list(rows) for split, rows in setup.dataset.items()})
    model, tokenizer = load_model_and_tokenizer(setup.model)
    config = create_training_config(setup.training, tmp_path)
    assert losses(train(model, tokenizer, tables, config, create_lora_config(setup.lora))) == losses(trained)


def test_a_dataset_directory_trains_like_plain_rows(setup: Setup, trained: TrainingRun, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split, rows in setup.dataset.items():
        pq.write_table(pa.Table.from_pylist([{**row, "tokens": 1} for row in rows]), tmp_path / f"{split}.parquet")
    assert read_rows(tmp_path, "test") == setup.dataset["test"]
    run = train_on_dataset(setup.model, setup.lora, setup.training, tmp_path, tmp_path / "out")
    assert losses(run) == losses(trained)
    assert read_json(run.adapter_dir / "training_log.json")["dataset"] == {
        "path": str(tmp_path),
        "train_sha256": sha256_file(tmp_path / "train.parquet"),
    }


def test_a_dataset_inside_of_the_output_can_be_moved_with_it(setup: Setup, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    dataset = tmp_path / "out" / "dataset"
    dataset.mkdir(parents=True)
    for split, rows in setup.dataset.items():
        pq.write_table(pa.Table.from_pylist(rows), dataset / f"{split}.parquet")
    run = train_on_dataset(
        setup.model, setup.lora, setup.but(training={"max_steps": 1}).training, dataset, tmp_path / "out"
    )
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert run.adapter_dir == tmp_path / "out"
    found = training_problems(moved, None, None)
    assert found is not None and found.dataset == moved / "dataset"


def test_a_directory_that_is_no_dataset_is_named_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    for split in ("train", "test"):
        with pytest.raises(PipelineError, match=rf"{split}.parquet: not readable.*triton-sft dataset build"):
            read_rows(tmp_path, split)


def test_another_seed_gives_another_adapter(setup: Setup, trained: TrainingRun, tmp_path: Path) -> None:
    setup.but(training={"seed": 1}).train(tmp_path)
    assert different_tensors(tmp_path, trained.adapter_dir) == list(adapter_weights(tmp_path))


@pytest.mark.parametrize("every", [1, None])
def test_evaluating_does_not_change_what_is_learned(
    setup: Setup, trained: TrainingRun, tmp_path: Path, every: int | None
) -> None:
    """Neither the weights (the silent trap of CPUs with AVX512-BF16) nor the random numbers of dropout may notice."""
    other = setup.but(training={"eval_steps": every}) if every else setup.but(dataset={"test": []})
    run = other.train(tmp_path)
    assert len([entry for entry in run.log_history if "eval_loss" in entry]) == (7 if every else 0)
    assert losses(run) == losses(trained)
    assert different_tensors(tmp_path, trained.adapter_dir) == []


def test_the_last_step_is_evaluated_whatever_the_interval(setup: Setup, tmp_path: Path) -> None:
    run = setup.but(training={"max_steps": 3}).train(tmp_path)
    assert [entry["step"] for entry in run.log_history if "eval_loss" in entry] == [0, 2, 3]


def test_gradient_checkpointing_gives_the_same_losses_and_is_off_afterwards(
    setup: Setup, trained: TrainingRun, tmp_path: Path
) -> None:
    run = setup.but(training={"gradient_checkpointing": True}).train(tmp_path)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in run.model.modules())
    assert run.model.config.use_cache
    assert [loss for _, loss in losses(run)] == pytest.approx([loss for _, loss in losses(trained)], abs=1e-5)


def test_a_dense_model_trains_too(setup: Setup, llama: ModelSettings, tmp_path: Path) -> None:
    run = setup.but(model=llama.model_dump()).train(tmp_path)
    assert run.adapters == 2 * 7
    assert run.train_loss[1] < run.train_loss[0]


def test_a_sample_that_is_too_long_stops_the_training_before_it_begins(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"train sample relu has \d+ tokens, more than training.max_length \(32\)"):
        setup.but(training={"max_length": 32}).train(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_model_that_already_carries_an_adapter_is_refused(setup: Setup, trained: TrainingRun, tmp_path: Path) -> None:
    _, tokenizer = load_model_and_tokenizer(setup.model)
    config = create_training_config(setup.training, tmp_path / "none")
    with pytest.raises(PipelineError, match="already carries an adapter"):
        train(trained.model, tokenizer, setup.dataset, config, create_lora_config(setup.lora))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("empty", [[], None])
def test_an_empty_train_split_is_refused(setup: Setup, tmp_path: Path, empty: Any) -> None:
    with pytest.raises(PipelineError, match="no train rows"):
        setup.but(dataset={"train": empty}).train(tmp_path)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_seen(loss: float) -> None:
    assert losses_finite([{"loss": 1.0}, {"eval_loss": 2.0}])
    assert not losses_finite([{"loss": 1.0}, {"loss": loss}])
    assert not losses_finite([{"loss": 1.0}, {"eval_loss": loss}])
    assert not losses_finite([{"learning_rate": 1.0}])


def test_a_loss_that_is_no_number_is_logged_as_it_is(setup: Setup, tmp_path: Path) -> None:
    import torch

    model, tokenizer = load_model_and_tokenizer(setup.model)
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = math.nan
    config = create_training_config(setup.training, tmp_path)
    run = train(model, tokenizer, setup.dataset, config, create_lora_config(setup.lora))
    assert [math.isnan(loss) for _, loss in losses(run)] == [True] * 6
    assert not losses_finite(run.log_history)
    assert not losses_finite(json.loads((tmp_path / "training_log.json").read_text())["log_history"])
