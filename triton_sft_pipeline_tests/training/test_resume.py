"""A training that was killed or interrupted goes on, and ends where one ends that nothing happened to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.errors import StepError
from triton_sft_pipeline.training.trainer import TrainingRun
from triton_sft_pipeline_tests.training.setups import Died, Setup, at_step, die, different_tensors


@pytest.fixture(scope="module")
def died_at_5(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves that died in its fifth step: checkpoints of the second and the fourth."""
    directory = tmp_path_factory.mktemp("died")
    with pytest.raises(Died):
        setup.train(directory, on_log=at_step(5, die))
    return directory


@pytest.fixture
def died(died_at_5: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(died_at_5, tmp_path / "died"))


def assert_equal(run: TrainingRun, whole: TrainingRun) -> None:
    for key in ("loss", "eval_loss"):
        curves = [[(entry["step"], entry[key]) for entry in r.log_history if key in entry] for r in (run, whole)]
        assert curves[0] == curves[1]
    assert different_tensors(run.adapter_dir, whole.adapter_dir) == []


def test_a_training_that_died_goes_on_and_ends_where_an_uninterrupted_one_ends(
    setup: Setup, trained: TrainingRun, died: Path
) -> None:
    assert not (died / "adapter_model.safetensors").exists()
    resumed = setup.train(died)
    assert (resumed.resumed_from, resumed.steps) == (4, 6)
    assert_equal(resumed, trained)


def test_a_half_written_checkpoint_is_skipped(setup: Setup, trained: TrainingRun, died: Path) -> None:
    (died / "checkpoint-4" / "trainer_state.json").unlink()
    resumed = setup.train(died)
    assert resumed.resumed_from == 2
    assert_equal(resumed, trained)


def test_a_training_that_died_after_its_last_step_adds_none(setup: Setup, tmp_path: Path) -> None:
    # In the middle of an epoch, where Trainer would go on with the next batch.
    setup = setup.but(training={"max_steps": 4})

    def die_after_the_end(step: int, metrics: dict[str, float]) -> None:
        if "train_loss" in metrics:
            die()

    with pytest.raises(Died):
        setup.train(tmp_path / "died", on_log=die_after_the_end)
    assert not (tmp_path / "died" / "adapter_model.safetensors").exists()
    resumed = setup.train(tmp_path / "died")
    assert (resumed.resumed_from, resumed.steps) == (4, 4)
    assert_equal(resumed, setup.train(tmp_path / "whole"))


def test_a_bfloat16_training_with_checkpointing_and_accumulation_resumes_to_the_bit(
    setup: Setup, tmp_path: Path
) -> None:
    setup = setup.but(
        model={"compute_dtype": "bfloat16"},
        training={"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "per_device_batch_size": 1},
    )
    whole = setup.train(tmp_path / "whole")
    with pytest.raises(Died):
        setup.train(tmp_path / "died", on_log=at_step(3, die))
    resumed = setup.train(tmp_path / "died")
    assert resumed.resumed_from == 2
    assert_equal(resumed, whole)


@pytest.fixture(scope="module")
def one_step(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> tuple[Setup, Path]:
    """A training of one step, and the directory with its checkpoint."""
    short = setup.but(training={"save_steps": 1, "max_steps": 1})
    directory = tmp_path_factory.mktemp("one_step")
    short.train(directory)
    return short, directory


@pytest.mark.parametrize(
    "change",
    [
        lambda setup: setup.but(training={"learning_rate": 5e-3}),
        lambda setup: setup.but(lora={"r": 8}),
        lambda setup: setup.but(lora={"dropout": 0.2}),
        lambda setup: setup.but(model={"compute_dtype": "bfloat16"}),
        lambda setup: setup.but(model={"quant_type": "fp4"}),
        lambda setup: setup.but(dataset={"train": setup.dataset["train"][:5]}),
        lambda setup: setup.but(dataset={"test": setup.dataset["test"][:1]}),
    ],
    ids=["learning rate", "rank", "dropout", "type", "quantisation", "train rows", "test rows"],
)
def test_a_checkpoint_of_another_training_is_not_gone_on_from(
    one_step: tuple[Setup, Path], tmp_path: Path, change: Callable[[Setup], Setup]
) -> None:
    short, directory = one_step
    out = Path(shutil.copytree(directory, tmp_path / "out"))
    assert change(short).train(out).resumed_from is None


def test_a_checkpoint_on_a_base_whose_weights_were_replaced_is_not_gone_on_from(
    one_step: tuple[Setup, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(one_step[0].model.base_model, tmp_path / "base"))
    short = one_step[0].but(model={"base_model": str(base)})
    assert short.train(tmp_path / "out").resumed_from is None
    assert short.train(tmp_path / "out").resumed_from == 1
    weights = {name: value * 1.01 for name, value in load_file(str(base / "model.safetensors")).items()}
    save_file(weights, str(base / "model.safetensors"))
    assert short.train(tmp_path / "out").resumed_from is None


def test_where_and_how_often_it_is_logged_and_saved_makes_no_other_training(
    setup: Setup, trained: TrainingRun, died: Path
) -> None:
    moved = died.rename(died.parent / "moved")
    resumed = setup.but(training={"save_steps": 5, "save_total_limit": 1, "run_name": "again"}).train(moved)
    assert resumed.resumed_from == 4
    assert different_tensors(moved, trained.adapter_dir) == []


def test_resume_can_be_switched_off(setup: Setup, trained: TrainingRun, died: Path) -> None:
    run = setup.train(died, resume=False)
    assert run.resumed_from is None
    assert_equal(run, trained)


KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings, TrainingSettings
from triton_sft_pipeline_tests.training.setups import Setup
torch.set_num_threads(1)
values = json.loads(sys.argv[1])
save, saved = torch.save, []

def save_and_die(*args, **kwargs):
    # Trainer writes optimizer.pt with it, in the middle of a checkpoint: the second checkpoint gets no further.
    saved.append(str(args[1]))
    if sum("optimizer" in path for path in saved) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*args, **kwargs)

torch.save = save_and_die
Setup(
    ModelSettings(**values["model"]), values["dataset"], LoraSettings(**values["lora"]),
    TrainingSettings(**values["training"]),
).train(Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_checkpoint_loses_only_that_checkpoint(
    setup: Setup, trained: TrainingRun, tmp_path: Path
) -> None:
    values = {
        field.name: value if isinstance(value := getattr(setup, field.name), dict) else value.model_dump()
        for field in dataclasses.fields(setup)
    }
    command = [sys.executable, "-c", KILLED, json.dumps(values), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL, done.stderr
    half = tmp_path / "checkpoint-4"
    assert (half / "adapter_model.safetensors").is_file()
    assert not (half / "trainer_state.json").exists()
    resumed = setup.train(tmp_path)
    assert resumed.resumed_from == 2
    assert_equal(resumed, trained)


class Cancelled(Exception):
    """What an orchestrator's handler raises."""


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal whose handler raises `Cancelled`."""

    def cancel(*_: Any) -> None:
        raise Cancelled

    before = signal.signal(request.param, cancel)
    yield request.param
    assert signal.getsignal(request.param) is cancel, "the handler that was there is not there any more"
    signal.signal(request.param, before)


def test_an_interrupt_saves_a_checkpoint_and_reaches_the_handler_that_was_there(
    setup: Setup, trained: TrainingRun, tmp_path: Path, number: signal.Signals
) -> None:
    with pytest.raises(Cancelled):
        setup.train(tmp_path, on_log=at_step(2, lambda: signal.raise_signal(number)))
    # The step that was under way when it came is the last one.
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").is_file()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    resumed = setup.train(tmp_path)
    assert resumed.resumed_from == 3
    assert_equal(resumed, trained)


@pytest.mark.parametrize("number", [signal.SIGTERM], indirect=True)
def test_an_interrupt_in_the_last_step_lets_the_adapter_be_saved_and_is_still_heard(
    setup: Setup, trained: TrainingRun, tmp_path: Path, number: signal.Signals
) -> None:
    with pytest.raises(Cancelled):
        setup.train(tmp_path, on_log=at_step(6, lambda: signal.raise_signal(number)))
    assert different_tensors(tmp_path, trained.adapter_dir) == []
    assert (tmp_path / "training_log.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM], indirect=True)
def test_a_training_that_fails_puts_the_handlers_back(setup: Setup, tmp_path: Path, number: signal.Signals) -> None:
    with pytest.raises(Died):
        setup.train(tmp_path, on_log=at_step(1, die))


def test_an_interrupt_that_nobody_else_handles_is_still_an_error(setup: Setup, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(StepError, match=r"interrupted at step 2 of 6; a checkpoint was saved.*go on from there"):
            setup.train(tmp_path, on_log=at_step(1, lambda: signal.raise_signal(signal.SIGTERM)))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_interrupt_stops_at_once(setup: Setup, tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        setup.train(tmp_path, on_log=at_step(1, twice))
    assert not list(tmp_path.glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_outside_the_main_thread_a_training_runs_without_handlers(
    setup: Setup, trained: TrainingRun, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert_equal(pool.submit(setup.train, tmp_path).result(), trained)


def test_a_training_with_joined_weights_is_the_same_and_resumes_to_the_bit(
    setup: Setup, trained: TrainingRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton_sft_pipeline.training import trainer as module
    from triton_sft_pipeline.training.fast.flat import FlatWeights

    def made_flat(trainer: Any) -> Any:
        return FlatWeights([p for p in trainer.model.parameters() if p.requires_grad])

    monkeypatch.setattr(module, "_made_flat", made_flat)
    with pytest.raises(Died):
        setup.train(tmp_path, on_log=at_step(5, die))
    resumed = setup.train(tmp_path)
    assert (resumed.resumed_from, resumed.steps) == (4, 6)
    assert_equal(resumed, trained)


def test_a_head_in_one_pass_learns_the_same(
    setup: Setup, trained: TrainingRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton_sft_pipeline.training import trainer as module

    taught: list[bool] = []

    def made_fast(model: Any, longest: int) -> int:
        return 1

    def made_one_pass(model: Any) -> bool:
        from triton_sft_pipeline.training.fast.head import add_one_pass_head

        taught.append(add_one_pass_head(model))
        return taught[0]

    monkeypatch.setattr(module, "_made_fast", made_fast)
    monkeypatch.setattr(module, "_made_one_pass", made_one_pass)
    monkeypatch.setattr("triton_sft_pipeline.training.sft._padding_known", lambda *_: contextlib.nullcontext())
    run = setup.train(tmp_path)
    assert taught == [True]
    for key in ("loss", "eval_loss", "entropy", "mean_token_accuracy"):
        found, expected = ([entry[key] for entry in r.log_history if key in entry] for r in (run, trained))
        assert found == pytest.approx(expected, rel=1e-3, abs=2e-3), key
