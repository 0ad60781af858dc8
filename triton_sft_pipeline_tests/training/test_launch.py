"""Several processes train one adapter: the same one, with one of them writing, and none of them left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.training import launch
from triton_sft_pipeline.training.checkpoints import is_whole
from triton_sft_pipeline.training.interrupts import DeferredInterrupts
from triton_sft_pipeline.training.job import MODULE
from triton_sft_pipeline.training.launch import check_gpus
from triton_sft_pipeline.training.ranks import fill_up
from triton_sft_pipeline.training.reload import probe_loss, reload_adapter
from triton_sft_pipeline.training.run import train_on_dataset
from triton_sft_pipeline.training.samples import Sample
from triton_sft_pipeline.training.settings import ModelSettings, TrainingSettings
from triton_sft_pipeline.training.trainer import TrainingRun
from triton_sft_pipeline.training.worker import tell
from triton_sft_pipeline_tests.training import idle_workers
from triton_sft_pipeline_tests.training.setups import Setup, adapter_weights, at_step, different_tensors, losses

slow = pytest.mark.slow

MODULES = (MODULE, idle_workers.MODULE)


@pytest.fixture(scope="session")
def halves(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> tuple[Setup, Path]:
    """A training whose steps two processes can share, without dropout, and its dataset on disk. Five rows: the third
    step of an epoch has one row only, for one of the processes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shared = setup.but(
        lora={"dropout": 0.0},
        training={"per_device_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-3},
        dataset={"train": setup.dataset["train"][:5]},
    )
    directory = tmp_path_factory.mktemp("dataset")
    for split, rows in shared.dataset.items():
        pq.write_table(pa.Table.from_pylist(rows), directory / f"{split}.parquet")
    return shared, directory


def train_with(gpus: int, halves: tuple[Setup, Path], output: Path, **options: Any) -> TrainingRun:
    setup, dataset = halves
    training = setup.training.model_copy(update={"gpus": gpus})
    return train_on_dataset(setup.model, setup.lora, training, dataset, output, **options)


@pytest.fixture(scope="session")
def one(halves: tuple[Setup, Path], tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    """What one process makes of it."""
    return train_with(1, halves, tmp_path_factory.mktemp("one"))


def workers() -> dict[int, dict[str, str]]:
    """Pid -> environment of every worker and agent on this machine that this process started, directly or not."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes()
            if entry.name.isdigit() and any(module.encode() in command for module in MODULES):
                pairs = (entry / "environ").read_bytes().decode().split("\0")
                found[int(entry.name)] = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        except OSError:
            continue
    mine = os.environ["TRITON_SFT_HOME"]
    return {pid: environment for pid, environment in found.items() if environment.get("TRITON_SFT_HOME") == mine}


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    yield
    assert workers() == {}


def largest_difference(first: Path, second: Path) -> float:
    weights, others = adapter_weights(first), adapter_weights(second)
    assert weights.keys() == others.keys()
    return max(float((weights[name] - others[name]).abs().max()) for name in weights)


@slow
def test_two_processes_end_with_the_adapter_of_one(
    halves: tuple[Setup, Path], one: TrainingRun, tmp_path: Path
) -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    two = train_with(2, halves, tmp_path, on_log=lambda step, metrics: seen.append((step, metrics)))
    assert largest_difference(tmp_path, one.adapter_dir) < 1e-5
    assert (two.steps, two.adapters, two.trainable_parameters) == (6, one.adapters, one.trainable_parameters)
    for key in ("loss", "eval_loss", "grad_norm"):
        curves = [[entry[key] for entry in run.log_history if key in entry] for run in (two, one)]
        assert curves[0] == pytest.approx(curves[1], abs=1e-4), key
    assert two.eval_loss == pytest.approx(one.eval_loss, abs=1e-4)
    assert two.model is None
    # What was told on the way is what stands in the log.
    assert [(step, metrics["loss"]) for step, metrics in seen if "loss" in metrics] == losses(two)
    # Only the first process writes; each keeps its own random numbers.
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in one.adapter_dir.iterdir()}
    assert len(list((tmp_path / "runs").iterdir())) == 1
    states = {path.name for path in (tmp_path / "checkpoint-6").glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}
    assert json.loads((tmp_path / "training_log.json").read_text())["processes"] == 2


@slow
@pytest.mark.gpu
@pytest.mark.skipif(not os.environ.get("TRITON_SFT_TEST_GPU"), reason="TRITON_SFT_TEST_GPU is not set")
def test_two_gpus_end_close_to_one(halves: tuple[Setup, Path], tmp_path: Path) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    setup, dataset = halves
    on_gpu = setup.but(model={"compute_dtype": "bfloat16"}), dataset
    runs = [train_with(gpus, on_gpu, tmp_path / str(gpus)) for gpus in (1, 2)]
    curves = [[loss for _, loss in losses(run)] for run in runs]
    assert curves[1] == pytest.approx(curves[0], rel=0.01)
    assert reload_adapter(tmp_path / "2", on_gpu[0].model).agrees


@slow
def test_two_processes_go_on_from_the_checkpoint_of_one(
    halves: tuple[Setup, Path], one: TrainingRun, tmp_path: Path
) -> None:
    """In the middle of the second epoch, whose order is another than that of the first."""
    begun = Path(shutil.copytree(one.adapter_dir, tmp_path / "begun"))
    shutil.rmtree(begun / "checkpoint-6")
    (begun / "adapter_model.safetensors").unlink()
    resumed = train_with(2, halves, begun)
    assert (resumed.resumed_from, resumed.steps) == (4, 6)
    assert largest_difference(begun, one.adapter_dir) < 1e-5
    assert dict(losses(resumed)) == pytest.approx(dict(losses(one)), abs=1e-4)


def kill_rank_1() -> None:
    """What the kernel does to a process when memory runs out."""
    found = [pid for pid, environment in workers().items() if environment.get("RANK") == "1"]
    assert len(found) == 1
    os.kill(found[0], signal.SIGKILL)


class Cancelled(Exception):
    """What an orchestrator's handler raises."""


def endless(halves: tuple[Setup, Path], **training: Any) -> tuple[Setup, Path]:
    """A training that only an interrupt or a death ends."""
    setup, dataset = halves
    never = {"max_steps": 10_000, "save_steps": 10_000, "eval_steps": 10_000}
    return setup.but(training={**never, **training}), dataset


@slow
def test_a_killed_process_ends_the_others_and_the_training_goes_on_to_the_bit_until_an_interrupt_has_it_saved(
    halves: tuple[Setup, Path], tmp_path: Path
) -> None:
    """One story, because two processes take a quarter of a minute to start. With dropout: every process has its own
    random numbers, and gets them back."""
    setup, dataset = endless(halves, save_steps=2, save_total_limit=1000, warmup_ratio=0.0)
    dropping = setup.but(lora={"dropout": 0.1}), dataset
    out = tmp_path / "out"
    with pytest.raises(StepError, match=r"process of rank 1 of 2 was killed by SIGKILL.*runs out of memory.*Run it ag"):
        train_with(2, dropping, out, on_log=at_step(7, kill_rank_1))
    assert workers() == {}
    assert not (out / "adapter_model.safetensors").exists()

    # It goes on from the second step. What it saves after the sixth is held against what was saved before the death.
    known = out.joinpath("checkpoint-6").rename(tmp_path / "known")
    for checkpoint in out.glob("checkpoint-*"):
        # One that the death left half written stays: that it is passed over is part of going on.
        if is_whole(checkpoint) and checkpoint.name != "checkpoint-2":
            shutil.rmtree(checkpoint)
    rarely = dropping[0].but(training={"save_steps": 6}), dataset
    seen: list[int] = []
    interrupt = at_step(7, lambda: signal.raise_signal(signal.SIGTERM))

    def on_log(step: int, metrics: dict[str, float]) -> None:
        seen.append(step)
        interrupt(step, metrics)

    def cancel(*_: Any) -> None:
        raise Cancelled

    before = signal.signal(signal.SIGTERM, cancel)
    try:
        with pytest.raises(Cancelled):
            train_with(2, rarely, out, on_log=on_log)
        assert signal.getsignal(signal.SIGTERM) is cancel
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen[0] == 3
    assert different_tensors(out / "checkpoint-6", known) == []
    saved = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    assert is_whole(saved) and saved.name == f"checkpoint-{seen[-1]}" != "checkpoint-6"
    assert not (out / "adapter_model.safetensors").exists()


def fail() -> None:
    raise Cancelled


def interrupt_twice() -> None:
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def assert_ended_at_once(training: tuple[Setup, Path], out: Path, action: Callable[[], None], raised: Any) -> None:
    with pytest.raises(raised):
        train_with(2, training, out, on_log=at_step(1, action))
    assert workers() == {}
    assert not list(out.glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@slow
def test_a_callback_that_fails_ends_the_processes_at_once(halves: tuple[Setup, Path], tmp_path: Path) -> None:
    assert_ended_at_once(endless(halves), tmp_path, fail, Cancelled)


@pytest.mark.parametrize(("action", "raised"), [(fail, Cancelled), (interrupt_twice, KeyboardInterrupt)])
def test_a_failing_callback_or_a_second_interrupt_ends_even_processes_that_no_signal_but_one_ends(
    halves: tuple[Setup, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: Callable[[], None],
    raised: type[BaseException],
) -> None:
    monkeypatch.setattr(launch, "MODULE", idle_workers.MODULE)
    assert_ended_at_once(endless(halves), tmp_path, action, raised)


def test_an_interrupt_before_the_first_step_ends_the_processes_at_once(
    halves: tuple[Setup, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = launch._environment

    def interrupted() -> dict[str, str]:
        signal.raise_signal(signal.SIGTERM)
        return environment()

    monkeypatch.setattr(launch, "_environment", interrupted)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(StepError, match="interrupted before its first step was done"):
            train_with(2, halves, tmp_path / "none")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "none").exists()


@slow
def test_what_a_process_finds_wrong_is_said_as_one_process_says_it(halves: tuple[Setup, Path], tmp_path: Path) -> None:
    setup, dataset = halves
    short = setup.but(training={"max_length": 32}), dataset
    with pytest.raises(PipelineError, match=r"^train sample relu has \d+ tokens, more than training.max_length \(32\)"):
        train_with(2, short, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_accumulation_steps_that_cannot_be_shared_are_refused_before_anything_starts(
    halves: tuple[Setup, Path], tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match=r"accumulation_steps 2 cannot be shared by 3 GPUs.*a multiple of 3, or"):
        train_with(3, halves, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_more_gpus_than_there_are_is_refused_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_gpus(TrainingSettings(gpus=2))
    with pytest.raises(PipelineError, match=r"training.gpus is 4, but this machine has 2 GPUs.*set it to 2 or less"):
        check_gpus(TrainingSettings(gpus=4))


def test_the_command_line_takes_a_number_of_gpus() -> None:
    from click.testing import CliRunner

    from triton_sft_pipeline.cli import cli

    shown = CliRunner().invoke(cli, ["train", "--dry-run", "--gpus", "2", "--set", "training.epochs=1"])
    assert yaml.safe_load(shown.output)["training"]["gpus"] == 2
    assert CliRunner().invoke(cli, ["train", "--dry-run", "--gpus", "0"]).exit_code == 2


def test_the_program_has_the_model_that_other_processes_trained(
    monkeypatch: pytest.MonkeyPatch, trained: TrainingRun, afmoe: ModelSettings
) -> None:
    from triton_sft_pipeline import api, config

    settings = config.load_config().model_copy(update={"model": afmoe})
    monkeypatch.setattr(api, "load_config", lambda preset: settings)
    monkeypatch.setattr(api, "train_from_traces", lambda *_: dataclasses.replace(trained, model=None))
    model = api.main().model
    assert probe_loss(model, [0, 20, 21]) == probe_loss(trained.model, [0, 20, 21])


FAILED = [
    (
        [
            {"event": "crash", "rank": 0, "message": "RuntimeError: Connection closed by peer"},
            {"event": "dead", "rank": 1, "exit_code": -9},
        ],
        r"rank 1 of 2 was killed by SIGKILL, which is what happens when the machine runs out of memory; the others",
    ),
    ([{"event": "dead", "rank": 0, "exit_code": -11}], r"rank 0 of 2 was killed by SIGSEGV; the others were ended"),
    (
        [
            {"event": "crash", "rank": 1, "message": "KeyError: 'x'"},
            {"event": "crash", "rank": 0, "message": "RuntimeError: Connection closed by peer"},
            {"event": "dead", "rank": 1, "exit_code": 1},
        ],
        r"rank 1 of 2 failed with KeyError: 'x'; the others were ended. What they printed is in .*workers.log",
    ),
    (
        [
            {"event": "crash", "rank": 0, "message": "RuntimeError: Connection closed by peer"},
            {"event": "error", "rank": 1, "kind": "StepError", "message": "The disk is full."},
        ],
        r"^The disk is full\.$",
    ),
    ([{"event": "dead", "rank": 1, "exit_code": 3}], r"2 training processes ended without a result \(rank 1\)"),
    ([], r"2 training processes ended without a result \(rank unknown\)"),
]


@pytest.mark.parametrize(("events", "said"), FAILED)
def test_what_ended_a_training_is_one_sentence(tmp_path: Path, events: list[dict[str, Any]], said: str) -> None:
    story = launch._Story(None, lambda done, total: None)
    for event in events:
        story.take(event)
    (tmp_path / "workers.log").write_text("what they printed")
    error = launch._explained(story, 2, tmp_path / "out", tmp_path, DeferredInterrupts())
    assert isinstance(error, StepError)
    with pytest.raises(StepError, match=said):
        raise error
    if "workers.log" in str(error):
        assert (tmp_path / "out" / "workers.log").read_text() == "what they printed"


def test_events_are_read_once_each_and_never_by_half(tmp_path: Path) -> None:
    events = launch._events(tmp_path / "events.jsonl")
    assert next(events) == []
    tell(tmp_path, "log", step=1)
    with open(tmp_path / "events.jsonl", "a") as stream:
        stream.write('{"event": "lo')
    assert next(events) == [{"event": "log", "step": 1}]
    with open(tmp_path / "events.jsonl", "a") as stream:
        stream.write('g"}\n')
    assert [next(events), next(events)] == [[{"event": "log"}], []]


def test_rows_are_filled_up_with_some_that_teach_nothing() -> None:
    samples = [Sample(str(i), [i, i + 1, i + 2], [-100, i + 1, i + 2]) for i in range(5)]
    filled = fill_up(samples, 4)
    assert len(filled) == 8 and filled[:5] == samples
    assert all(label == -100 for sample in filled[5:] for label in sample.labels)
    assert fill_up(samples, 5) == samples
    packed = [dataclasses.replace(sample, documents=(1, 2)) for sample in samples]
    assert fill_up(packed, 6)[5].documents == (2,)


KILLED = """
import os, signal, sys
from pathlib import Path
from triton_sft_pipeline.training.run import train_on_dataset
from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings, TrainingSettings

def die(step, metrics):
    os.kill(os.getpid(), signal.SIGKILL)

model, lora, training = sys.argv[1:4]
train_on_dataset(
    ModelSettings.model_validate_json(model), LoraSettings.model_validate_json(lora),
    TrainingSettings.model_validate_json(training), Path(sys.argv[4]), Path(sys.argv[5]), on_log=die,
)
"""


@slow
def test_processes_whose_parent_is_killed_end_too(halves: tuple[Setup, Path], tmp_path: Path) -> None:
    setup, dataset = halves
    training = setup.training.model_copy(update={"gpus": 2, "max_steps": 10_000, "save_steps": 10_000})
    sections = [section.model_dump_json() for section in (setup.model, setup.lora, training)]
    done = subprocess.run([sys.executable, "-c", KILLED, *sections, str(dataset), str(tmp_path)], timeout=300)
    assert done.returncode == -signal.SIGKILL
    for pid in workers():
        with contextlib.suppress(ProcessLookupError):
            ended = select.poll()
            ended.register(os.pidfd_open(pid), select.POLLIN)
            assert ended.poll(30_000), f"process {pid} is still there"
