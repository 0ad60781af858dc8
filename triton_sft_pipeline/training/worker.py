"""The processes of a training on several GPUs: the one that keeps them together, and the workers themselves.

    python -m triton_sft_pipeline.training.worker agent JOB     starts the workers with torchrun and says how they ended
    python -m triton_sft_pipeline.training.worker work JOB      one of them, with torchrun's environment variables

JOB is a directory that `launch` makes; what lies in it says `job`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import read_json, write_json
from triton_sft_pipeline.training.job import EVENTS, JOB, MODULE, RESULT, STOP

LOOK_S = 0.5
"""Seconds between two looks at whether the parent is still there."""


def tell(job: Path, event: str, **facts: Any) -> None:
    """Append an event to the job's events. One write of a short line: lines of several processes never mix."""
    line = json.dumps({"event": event, **facts}) + "\n"
    descriptor = os.open(job / EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def die_with_parent() -> None:
    """Kill this process as soon as its parent is gone: nobody would wait for it, and it would hold a GPU."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def agent(job: Path) -> int:
    """Start the workers, wait for them, and end the others when one fails."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    gpus = str(read_json(job / JOB)["training"]["gpus"])
    options = ["--standalone", "--nproc-per-node", gpus, "--module", MODULE, "work", str(job)]
    try:
        run.run(run.parse_args(options))
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            tell(job, "dead", rank=rank, exit_code=failure.exitcode)
        return 1
    return 0


def work(job: Path) -> int:
    """Train as one of several processes; the first one tells what happens and writes the result."""
    from triton_sft_pipeline.training.ranks import rank

    tell(job, "started", rank=rank(), pid=os.getpid())
    try:
        _train(job, first=rank() == 0)
    except PipelineError as error:
        tell(job, "error", rank=rank(), kind=type(error).__name__, message=str(error))
        return 1
    except Exception as error:
        traceback.print_exc()
        tell(job, "crash", rank=rank(), message=f"{type(error).__name__}: {_first_line(error)}")
        return 1
    tell(job, "done", rank=rank())
    return 0


def _train(job: Path, first: bool) -> None:
    import torch

    from triton_sft_pipeline.training.ranks import wait_for_all
    from triton_sft_pipeline.training.run import train_in_this_process
    from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings, TrainingSettings

    if torch.cuda.is_available():
        # Quantisation kernels run on the current device, whatever device their tensors are on.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    told = read_json(job / JOB)

    def on_log(step: int, metrics: dict[str, float]) -> None:
        tell(job, "log", step=step, metrics=metrics)

    def on_step(step: int, steps: int) -> bool:
        if first:
            tell(job, "step", step=step, steps=steps)
        return (job / STOP).exists()

    run = train_in_this_process(
        ModelSettings(**told["model"]),
        LoraSettings(**told["lora"]),
        TrainingSettings(**told["training"]),
        Path(told["dataset"]),
        Path(told["output"]),
        on_log=on_log if first else None,
        on_step=on_step,
    )
    if first:
        names = ("log_history", "train_loss", "eval_loss", "steps", "resumed_from", "adapters", "trainable_parameters")
        write_json(job / RESULT, {name: getattr(run, name) for name in names})
    # The first process saves while the others are through: they leave together, and no one finds another one gone.
    wait_for_all()
    torch.distributed.destroy_process_group()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:500]


def main(arguments: list[str]) -> int:
    """The command line: `agent` or `work`, and the job's directory."""
    role, job = arguments
    die_with_parent()
    return {"agent": agent, "work": work}[role](Path(job))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the usual clean-up: a process group whose other members are gone can hang in it.
    os._exit(code)
