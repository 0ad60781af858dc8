"""One training on several GPUs of this machine: starts the processes, follows them, and leaves none behind.

The model is replicated and every step's forward passes are shared (DDP), so the adapter is that of one process up to
rounding. Without CUDA the processes share the CPU. Knows what the workers tell, and nothing of how they train.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.files import read_json, write_json
from triton_sft_pipeline.processes import process_is_alive, process_stamp
from triton_sft_pipeline.progress import progress_bar
from triton_sft_pipeline.training.config import accumulation_steps_each
from triton_sft_pipeline.training.interrupts import DeferredInterrupts
from triton_sft_pipeline.training.job import EVENTS, JOB, MODULE, RESULT, STOP
from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings, TrainingSettings
from triton_sft_pipeline.training.trainer import OnLog, TrainingRun

LOG = "workers.log"
"""What the processes printed, kept in the output directory when they failed without a reason of their own."""

LOOK_S = 0.05
GRACE_S = 5.0
"""Seconds that the other processes get to end by themselves once one is gone: they may wait for it for ever."""

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def train_in_processes(
    model: ModelSettings,
    lora: LoraSettings,
    training: TrainingSettings,
    dataset: Path,
    output: Path,
    *,
    on_log: OnLog | None = None,
    progress: bool = False,
) -> TrainingRun:
    """Like `train_on_dataset`, with `training.gpus` processes, one a GPU. The result holds no model.

    The first interrupt lets the processes finish their step and save it, the second one ends them at once.

    Raises:
        PipelineError: there are fewer GPUs, the accumulation steps cannot be shared evenly, or what one process raises.
        StepError: a process died, out of memory, a full disk, or interrupted (when the handler that the signal is
            handed to does not raise).
    """
    check_gpus(training)
    started = time.monotonic()
    job = {
        "model": model.model_dump(mode="json"),
        "lora": lora.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        "dataset": str(Path(dataset).absolute()),
        "output": str(Path(output).absolute()),
    }
    with tempfile.TemporaryDirectory(prefix="triton-sft-train-") as name:
        directory = Path(name)
        write_json(directory / JOB, job)
        with DeferredInterrupts() as interrupts, progress_bar("training", show=progress) as bar:
            story = _follow(directory, _Story(on_log, bar), interrupts)
        result = read_json(directory / RESULT) if (directory / RESULT).is_file() else None
        failure = None if result else _explained(story, training.gpus, Path(output), directory, interrupts)
    interrupts.raise_again()
    if failure is not None:
        raise failure
    assert result is not None
    losses = {key: tuple(result[key]) if result[key] else None for key in ("train_loss", "eval_loss")}
    return TrainingRun(**result | losses, adapter_dir=Path(output), seconds=time.monotonic() - started, model=None)


def check_gpus(training: TrainingSettings) -> None:
    """Fail before anything is started when `training.gpus` processes cannot train here."""
    import torch

    accumulation_steps_each(training)
    if not torch.cuda.is_available():
        return
    there = torch.cuda.device_count()
    if training.gpus > there:
        raise PipelineError(
            f"training.gpus is {training.gpus}, but this machine has {there} GPU{'s' if there > 1 else ''} "
            f"(CUDA_VISIBLE_DEVICES counts): set it to {there} or less."
        )


@dataclass
class _Story:
    """What the processes have told so far."""

    on_log: OnLog | None
    bar: Callable[[int, int], None]
    stamps: dict[int, str] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    steps: tuple[int, int] | None = None
    failures: list[dict[str, Any]] = field(default_factory=list)

    def take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "started":
            self.stamps[event["rank"]] = process_stamp(event["pid"])
        elif kind == "step":
            self.steps = (event["step"], event["steps"])
            self.bar(*self.steps)
        elif kind == "log" and self.on_log is not None:
            self.on_log(event["step"], event["metrics"])
        elif kind == "done":
            self.done.add(event["rank"])
        elif kind in ("error", "crash", "dead"):
            self.failures.append(event)

    def alive(self) -> list[int]:
        return [rank for rank, stamp in self.stamps.items() if process_is_alive(stamp)]

    def one_is_lost(self) -> bool:
        """Whether a process is gone that did not come to its end."""
        return bool(self.stamps.keys() - self.done - set(self.alive()))

    def kill(self) -> None:
        for rank in self.alive():
            os.kill(int(self.stamps[rank].split(":")[0]), signal.SIGKILL)


def _follow(directory: Path, story: _Story, interrupts: DeferredInterrupts) -> _Story:
    """Start the processes and hand on what they tell until all have ended, one way or another."""
    lost_at = None
    with open(directory / LOG, "wb") as log:
        # In a session of its own, so that Ctrl-C reaches this process alone, which passes it on in its own way.
        agent = subprocess.Popen(
            [sys.executable, "-m", MODULE, "agent", str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=_environment(),
        )
    events = _events(directory / EVENTS)
    try:
        while True:
            # Before the events are read: what was told before the end is read after it is seen.
            ended = agent.poll() is not None
            for event in next(events):
                story.take(event)
            if ended:
                return story
            if interrupts.received is not None:
                if story.steps is None:
                    # Nothing is learned yet that could be saved.
                    return story
                (directory / STOP).touch()
            if lost_at is None and story.one_is_lost():
                lost_at = time.monotonic()
            if lost_at is not None and time.monotonic() - lost_at > GRACE_S:
                story.kill()
            time.sleep(LOOK_S)
    finally:
        _end(agent, story)


def _environment() -> dict[str, str]:
    """This process's own without what torchrun sets; with it, a package that is not installed is found again."""
    environment = {name: value for name, value in os.environ.items() if name not in _TORCHRUN}
    parent = str(Path(__file__).resolve().parents[2])
    if parent in sysconfig.get_paths().values():
        return environment
    inherited = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return environment | {"PYTHONPATH": os.pathsep.join([*inherited, parent])}


def _end(agent: subprocess.Popen[bytes], story: _Story) -> None:
    """Kill what is left, and return when it is gone. Workers that have not told their number yet watch the agent."""
    story.kill()
    agent.kill()
    agent.wait()
    until = time.monotonic() + GRACE_S
    while story.alive() and time.monotonic() < until:
        time.sleep(LOOK_S)


def _events(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Every time it is asked: the events that were written since."""
    position, rest = 0, b""
    while True:
        new = b""
        if path.exists():
            with open(path, "rb") as stream:
                stream.seek(position)
                new = stream.read()
        position += len(new)
        *lines, rest = (rest + new).split(b"\n")
        yield [json.loads(line) for line in lines]


def _explained(
    story: _Story, gpus: int, output: Path, directory: Path, interrupts: DeferredInterrupts
) -> PipelineError:
    """Why there is no result, as one error. What a process said itself counts more than how others then ended."""
    told = {kind: [f for f in story.failures if f["event"] == kind] for kind in ("error", "dead", "crash")}
    if told["error"]:
        first = told["error"][0]
        kinds = {"PipelineError": PipelineError}
        return kinds.get(first["kind"], StepError)(first["message"])
    if interrupts.received is not None:
        return StepError("Training was interrupted before its first step was done; run it again to start it anew.")
    again = f"Run it again to go on from the last checkpoint in {output}."
    for dead in told["dead"]:
        if dead["exit_code"] < 0:
            name = _signal_name(-dead["exit_code"])
            memory = ", which is what happens when the machine runs out of memory" if name == "SIGKILL" else ""
            return StepError(
                f"The training process of rank {dead['rank']} of {gpus} was killed by {name}{memory}; the others were "
                f"ended. {again}"
            )
    log = _keep_log(directory, output)
    for crash in told["crash"]:
        return StepError(
            f"The training process of rank {crash['rank']} of {gpus} failed with {crash['message']}; the others were "
            f"ended. What they printed is in {log}."
        )
    ranks = ", ".join(str(dead["rank"]) for dead in told["dead"]) or "unknown"
    return StepError(f"The {gpus} training processes ended without a result (rank {ranks}): {log} says more.")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _keep_log(directory: Path, output: Path) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(directory / LOG, output / LOG))
