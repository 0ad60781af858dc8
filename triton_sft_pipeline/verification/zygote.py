"""The process that every task is forked from: torch and Triton are imported, CUDA is untouched.

It runs no code of a problem or a kernel itself. It reads requests as JSON lines from its standard input, forks a
confined child for each, kills the child's whole process group at its deadline, and writes one JSON line for each child
that has ended. When its input closes, because the judge is done or dead, it kills what is left, removes the judge's
folder and ends.

Request: {"id", "task", "folder", "timeout_s", "limits"}. Answer: {"id", "exit_code", "signal", "timed_out", "report",
"output"}, where `report` is the text that the child reported and `output` the end of what it printed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import platform
import selectors
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton_sft_pipeline.verification.confine import Limits, adopt_orphans, children, confine

_MAX_REPORT = 1 << 16
_MAX_OUTPUT = 2000
_READ = 1 << 16
_PROBE_TIMEOUT_S = 60.0


@dataclass
class _Child:
    id: int
    pid: int
    pid_fd: int
    report_fd: int
    output_fd: int
    deadline: float
    timed_out: bool = False
    report: bytes = b""
    output: bytes = b""
    open_fds: set[int] = field(default_factory=set)


class Zygote:
    """Forks children and watches over them. `answer` is called with each answer."""

    def __init__(self, answer: Callable[[dict[str, Any]], None]) -> None:
        self._answer = answer
        self._children: dict[int, _Child] = {}
        self._selector = selectors.DefaultSelector()

    def fork(self, request: dict[str, Any], tasks: dict[str, Callable[[Path], dict[str, Any]]]) -> None:
        """Start a child for a request."""
        report_read, report_write = os.pipe()
        output_read, output_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            _run_child(request, tasks, report_write, output_write)
        os.close(report_write)
        os.close(output_write)
        child = _Child(
            request["id"], pid, os.pidfd_open(pid), report_read, output_read, time.monotonic() + request["timeout_s"]
        )
        self._children[pid] = child
        for fd, kind in ((child.pid_fd, "exit"), (report_read, "report"), (output_read, "output")):
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ, (kind, child))
            child.open_fds.add(fd)

    def serve(self, requests: int, tasks: dict[str, Callable[[Path], dict[str, Any]]]) -> None:
        """Serve requests from a descriptor until it closes."""
        os.set_blocking(requests, False)
        self._selector.register(requests, selectors.EVENT_READ, ("request", None))
        pending = b""
        while True:
            for key, _ in self._selector.select(self._until_next_deadline()):
                kind, child = key.data
                if kind == "request":
                    chunk = os.read(requests, _READ)
                    if not chunk:
                        return
                    *lines, pending = (pending + chunk).split(b"\n")
                    for line in lines:
                        self.fork(json.loads(line), tasks)
                else:
                    self._handle(kind, child)
            self._kill_overdue()

    def run_until_idle(self) -> None:
        """Wait for every child that was started."""
        while self._children:
            for key, _ in self._selector.select(self._until_next_deadline()):
                self._handle(*key.data)
            self._kill_overdue()

    def kill_all(self) -> None:
        """Leave no descendant alive."""
        for child in self._children.values():
            _kill_group(child.pid)
        self._reap_strays(known=set())

    def _until_next_deadline(self) -> float | None:
        waiting = [child.deadline for child in self._children.values() if not child.timed_out]
        return max(0.0, min(waiting) - time.monotonic()) if waiting else None

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for child in self._children.values():
            if not child.timed_out and now >= child.deadline:
                child.timed_out = True
                _kill_group(child.pid)

    def _handle(self, kind: str, child: _Child) -> None:
        if child.pid not in self._children:
            return
        if kind == "report":
            self._read(child, child.report_fd)
        elif kind == "output":
            self._read(child, child.output_fd)
        else:
            self._finish(child)

    def _read(self, child: _Child, fd: int) -> bool:
        """Take what a child wrote; True while there may be more."""
        try:
            chunk = os.read(fd, _READ)
        except BlockingIOError:
            return False
        if not chunk:
            self._forget(child, fd)
            return False
        if fd == child.report_fd:
            # One byte more than allowed is kept, so that an overlong report is seen to be one.
            child.report = (child.report + chunk)[: _MAX_REPORT + 1]
        else:
            child.output = (child.output + chunk)[-_MAX_OUTPUT:]
        return True

    def _forget(self, child: _Child, fd: int) -> None:
        self._selector.unregister(fd)
        child.open_fds.discard(fd)
        os.close(fd)

    def _finish(self, child: _Child) -> None:
        # The leader has ended; what it started has not, unless it is killed while the group's id cannot have been given
        # to others.
        _kill_group(child.pid)
        _, status = os.waitpid(child.pid, 0)
        del self._children[child.pid]
        self._reap_strays(known=set(self._children))
        for fd in (child.report_fd, child.output_fd):
            reads = 0
            while fd in child.open_fds and reads < 64 and self._read(child, fd):
                reads += 1
        for fd in list(child.open_fds):
            self._forget(child, fd)
        code = os.waitstatus_to_exitcode(status)
        report = "" if len(child.report) > _MAX_REPORT else child.report.decode(errors="replace")
        self._answer(
            {
                "id": child.id,
                "exit_code": code if code >= 0 else None,
                "signal": _signal_name(-code) if code < 0 else None,
                "timed_out": child.timed_out,
                "report": report,
                "output": child.output.decode(errors="replace"),
            }
        )

    def _reap_strays(self, known: set[int]) -> None:
        """Kill adopted orphans, and the orphans that this makes, until there are none."""
        while strays := children() - known:
            for pid in strays:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _run_child(
    request: dict[str, Any], tasks: dict[str, Callable[[Path], dict[str, Any]]], report_fd: int, output_fd: int
) -> None:
    """The child's whole life. Never returns."""
    try:
        folder = Path(request["folder"])
        report_fd = confine(folder, report_fd, output_fd, Limits(**request["limits"]))
        task = tasks[request["task"]]
        request.clear()
        os.write(report_fd, json.dumps(task(folder)).encode()[: _MAX_REPORT + 1])
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 70
    # Neither exit handlers nor threads of the kernel get to run.
    os._exit(status)


def _probe(folder: Path) -> dict[str, Any]:
    """Look for a GPU. In a child, because a process that has touched CUDA cannot fork children that use it."""
    import torch

    if not torch.cuda.is_available():
        return {"cuda": False}
    return {
        "cuda": True,
        "gpu": torch.cuda.get_device_name(0),
        "cuda_version": str(torch.version.cuda or torch.version.hip),
    }


def _import_everything(backend: str) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Import what children need, once, and give the tasks by name."""
    if backend == "interpreter":
        # Triton decides by this when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    # torch and Triton import some of these on first use: half a second in every child if it is not done here.
    names = ["triton.language"]
    if backend == "interpreter":
        torch.set_num_threads(1)
        names += [
            "triton.runtime.interpreter",
            "triton.experimental.gluon",
            "torch.fx.experimental.symbolic_shapes",
            "numpy.random",
        ]
    for name in names:
        importlib.import_module(name)

    from triton_sft_pipeline.verification.compare import run_compare
    from triton_sft_pipeline.verification.kernel_task import run_kernel
    from triton_sft_pipeline.verification.reference_task import run_reference

    return {"reference": run_reference, "kernel": run_kernel, "compare": run_compare}


def _versions() -> dict[str, str]:
    import torch
    import triton

    return {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}


def _choose_backend(device: str, folder: Path) -> tuple[str | None, dict[str, str]]:
    """The backend for the device that was asked for, None when it is not there, and what the probe found out."""
    if device == "cpu":
        return "interpreter", {}
    # Before the fork, which then need not import it again.
    importlib.import_module("torch")
    answers: list[dict[str, Any]] = []
    zygote = Zygote(answers.append)
    request = {"id": 0, "folder": str(folder), "task": "probe", "timeout_s": _PROBE_TIMEOUT_S}
    zygote.fork(request | {"limits": Limits(cpu_s=600, file_bytes=1 << 30).to_dict()}, {"probe": _probe})
    zygote.run_until_idle()
    found = json.loads(answers[0]["report"] or '{"cuda": false}')
    if found["cuda"]:
        return "cuda", {"gpu": found["gpu"], "cuda": found["cuda_version"]}
    return (None if device == "cuda" else "interpreter"), {}


def main() -> None:
    """Serve the judge on the other end of standard input and output."""
    parser = argparse.ArgumentParser(description="Internal: the process that the kernel judge forks its workers from.")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    adopt_orphans()
    # Answers keep the real standard output to themselves; a library that prints goes to the log.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")

    zygote = Zygote(answer)
    try:
        backend, found = _choose_backend(options.device, options.folder)
        if backend is None:
            answer({"ready": False})
            return
        tasks = _import_everything(backend)
        # Keeps the children's garbage collectors off the pages they share with this process.
        gc.collect()
        gc.freeze()
        # A broken pipe, like the end of the input, means that the judge is gone.
        with contextlib.suppress(BrokenPipeError):
            answer({"ready": True, "backend": backend, "versions": _versions() | found})
            zygote.serve(0, tasks)
        zygote.kill_all()
        shutil.rmtree(options.folder, ignore_errors=True)
    finally:
        zygote.kill_all()


if __name__ == "__main__":
    main()
