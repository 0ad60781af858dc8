"""Runs yardstick_worker.py, one fresh process a kernel, some at a time. Knows nothing of the project's judge."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

WORKER = Path(__file__).with_name("yardstick_worker.py")
MARK = "yardstick "
TIMEOUT_S = 180.0
# The process came to call the kernel, and what is wrong is not that it could not be run.
RAN = frozenset({"correct", "incorrect", "runtime_error", "timeout", "crash"})


@dataclass(frozen=True)
class Task:
    """A kernel for the yardstick. `key` comes back in the outcome."""

    key: str
    pytorch_code: str
    triton_code: str


@dataclass(frozen=True)
class Outcome:
    """What one process came to.

    Attributes:
        outcome: "correct", "incorrect", "runtime_error", "compile_error", "unsupported", "contract_error", "timeout",
            "crash", or "broken_" and the stage ("start", "reference", "load", "bind") that it did not get over.
        executed: the kernel was called.
        wall_s: seconds from the start of the process to its end.
        times_ms: mean times of reference and kernel, where they were measured.
        complaint: the last line of its error output.
    """

    key: str
    outcome: str
    executed: bool
    wall_s: float
    times_ms: tuple[float, float] | None = None
    complaint: str = ""


def run_all(
    tasks: Sequence[Task],
    device: str,
    workers: int,
    trials: int,
    timing: bool,
    progress: Callable[[Outcome], None],
    timeout_s: float = TIMEOUT_S,
) -> list[Outcome]:
    """Run every task in a process of its own, `workers` at a time; outcomes in the order in which they came."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="yardstick-") as folder, ThreadPoolExecutor(workers) as pool:
        options = {"device": device, "trials": trials, "timing": timing}
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        running = [
            pool.submit(run_one, task, options, Path(folder) / str(number), timeout_s, threads)
            for number, task in enumerate(tasks)
        ]
        for future in as_completed(running):
            outcomes.append(future.result())
            progress(outcomes[-1])
    return outcomes


def run_one(task: Task, options: dict[str, object], folder: Path, timeout_s: float, threads: int = 1) -> Outcome:
    folder.mkdir()
    content = {"pytorch_code": task.pytorch_code, "triton_code": task.triton_code, **options}
    (folder / "task.json").write_text(json.dumps(content), encoding="utf-8")
    began = time.monotonic()
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), str(folder / "task.json")],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=folder,
            env=environment(str(options["device"]), folder, threads),
            start_new_session=True,
        )
        try:
            exit_code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            exit_code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    wall_s = time.monotonic() - began
    output, errors = ((folder / name).read_text("utf-8", "replace") for name in ("out", "err"))
    outcome, executed, times = read_output(output, exit_code)
    complaint = (errors.strip().splitlines() or [""])[-1][:300]
    return Outcome(task.key, outcome, executed, wall_s, times, complaint)


def environment(device: str, folder: Path, threads: int) -> dict[str, str]:
    # A cache of its own: what an earlier run has compiled must not make this one look faster.
    given = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    # Its share of the processors: more threads would only get into each other's way.
    given.setdefault("OMP_NUM_THREADS", str(threads))
    given["PYTHONPATH"] = os.pathsep.join(filter(None, (str(WORKER.parent.parent), given.get("PYTHONPATH"))))
    return {**given, "TRITON_INTERPRET": "1"} if device == "cpu" else given


def read_output(output: str, exit_code: int | None) -> tuple[str, bool, tuple[float, float] | None]:
    """What a worker came to, whether it called the kernel, and its times; exit_code None means that it was killed."""
    stage, end = "start", None
    for line in output.splitlines():
        if line.startswith(MARK):
            report = json.loads(line.removeprefix(MARK))
            end = report if report["stage"] == "end" else end
            stage = stage if end else report["stage"]
    if end:
        times = (end["reference_ms"], end["kernel_ms"]) if "kernel_ms" in end else None
        return end["outcome"], end["outcome"] in RAN, times
    if stage != "run":
        return ("timeout" if exit_code is None else f"broken_{stage}"), False, None
    return ("timeout" if exit_code is None else "crash"), True, None
