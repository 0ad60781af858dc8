"""Stands in for the worker module: processes that tell a first step and then wait for ever, without importing torch.

    python -m triton_sft_pipeline_tests.training.idle_workers agent JOB
    python -m triton_sft_pipeline_tests.training.idle_workers work JOB RANK

For what the process that started them does, when what they would train is not the question: two real workers take a
quarter of a minute to come to their first step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from triton_sft_pipeline.training.worker import die_with_parent, tell

MODULE = "triton_sft_pipeline_tests.training.idle_workers"


def agent(job: Path) -> None:
    ranks = []
    # The first rank starts last: nobody trains a step before all the others are there.
    for rank in (1, 0):
        command = [sys.executable, "-m", MODULE, "work", str(job), str(rank)]
        ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert ranks[-1].stdout is not None and ranks[-1].stdout.readline() == "started\n"
    for process in ranks:
        process.wait()


def work(job: Path, rank: int) -> None:
    # No interrupt ends it: it has to be killed.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    tell(job, "started", rank=rank, pid=os.getpid())
    print("started", flush=True)
    if rank == 0:
        tell(job, "step", step=1, steps=10_000)
        tell(job, "log", step=1, metrics={"loss": 1.0})
    signal.pause()


if __name__ == "__main__":
    role, place, *number = sys.argv[1:]
    die_with_parent()
    if role == "agent":
        agent(Path(place))
    else:
        work(Path(place), int(number[0]))
