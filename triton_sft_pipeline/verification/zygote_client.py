"""The judge's end of the zygote: starts it, sends it tasks, hands out the answers, replaces it when it has died.

Knows nothing of kernels. Safe to use from several threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.verification.confine import Limits, allowed_environment
from triton_sft_pipeline.verification.outcomes import Outcome

_START_TIMEOUT_S = 180.0
# How much longer than its deadline an answer may take before the zygote itself counts as hung.
_GRACE_S = 20.0
_LOG = "zygote.log"
_ZYGOTE = "triton_sft_pipeline.verification.zygote"


class ZygoteDiedError(Exception):
    """The zygote ended, or hung and was killed, before it answered."""


class ZygoteClient:
    """A zygote that is started at once and restarted when it is needed again.

    Args:
        device: "auto", "cuda" or "cpu".
        folder: the judge's private folder; the zygote removes it when the judge goes away without doing so.
    """

    def __init__(self, device: str, folder: Path) -> None:
        self._device = device
        self._folder = folder
        self._lock = threading.Lock()
        self._closed = False
        self._process = self._start()

    def backend_and_versions(self) -> tuple[str, dict[str, str]]:
        """Wait until the zygote is ready; "cuda" or "interpreter", and the versions of what it loaded.

        Raises:
            PipelineError: it does not start, or there is no GPU where one was asked for.
        """
        try:
            ready = self._process.ready.result(_START_TIMEOUT_S)
        except (ZygoteDiedError, FutureTimeoutError) as error:
            raise PipelineError(f"The judge's worker process did not start: {self._log_tail()}") from error
        if not ready["ready"]:
            raise PipelineError("No usable GPU was found for the judge; use device='cpu' or look at nvidia-smi.")
        return ready["backend"], ready["versions"]

    def run(self, task: str, folder: Path, timeout_s: float, limits: Limits) -> Outcome:
        """Run a task in a fork of its own and wait for its end.

        Raises:
            ZygoteDiedError: no answer came; the task may be run again.
        """
        process = self._living_process()
        future = process.submit(
            {"task": task, "folder": str(folder), "timeout_s": timeout_s, "limits": limits.to_dict()}
        )
        try:
            answer = future.result(timeout_s + _GRACE_S + (0 if process.ready.done() else _START_TIMEOUT_S))
        except FutureTimeoutError as error:
            process.kill()
            raise ZygoteDiedError(f"no answer {_GRACE_S:.0f} s after the deadline") from error
        return Outcome(
            exit_code=answer["exit_code"],
            signal=answer["signal"],
            timed_out=answer["timed_out"],
            report=_parse_report(answer["report"]),
            output=answer["output"],
        )

    def close(self) -> None:
        """End the zygote and every child. Threads that wait for an answer get ZygoteDiedError."""
        with self._lock:
            self._closed = True
        self._process.close()

    def _living_process(self) -> _Process:
        with self._lock:
            if self._closed:
                raise ZygoteDiedError("the judge is closed")
            if self._process.has_ended():
                self._process.kill()
                self._process = self._start()
            return self._process

    def _start(self) -> _Process:
        with (self._folder / _LOG).open("ab") as log:
            process = subprocess.Popen(
                # -P: what lies in the current directory must not take the place of a library.
                [sys.executable, "-P", "-m", _ZYGOTE, "--device", self._device, "--folder", str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=allowed_environment(_python_path()),
                start_new_session=True,
            )
        return _Process(process)

    def _log_tail(self) -> str:
        text = (self._folder / _LOG).read_text(errors="replace").strip()
        return " ".join(text.splitlines()[-3:])[-600:] or "it wrote no message."


class _Process:
    """One zygote process and the answers that are awaited from it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._next_id = 0
        self._ended = False
        self.ready: Future[dict[str, Any]] = Future()
        self._reader = threading.Thread(
            target=self._read_answers, args=(process.stdout,), daemon=True, name="zygote-reader"
        )
        self._reader.start()

    def submit(self, request: dict[str, Any]) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._ended:
                raise ZygoteDiedError("it ended before the task was sent")
            self._next_id += 1
            self._waiting[self._next_id] = future
            line = json.dumps({"id": self._next_id, **request}).encode() + b"\n"
            stdin = self._process.stdin
            try:
                assert stdin is not None
                stdin.write(line)
                stdin.flush()
            # ValueError: another thread has closed the pipe.
            except (OSError, ValueError) as error:
                # It is ending; once it has, whoever asks next gets a new one.
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(10)
                raise ZygoteDiedError("it ended before the task was sent") from error
        return future

    def has_ended(self) -> bool:
        return self._ended or self._process.poll() is not None

    def kill(self) -> None:
        """Kill it and wait until it is gone; its children have asked the kernel to be killed with it."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        """Close its input, which makes it kill its children and end; kill it when it does not."""
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def _read_answers(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                message = json.loads(line)
                if "ready" in message:
                    self.ready.set_result(message)
                    continue
                with self._lock:
                    future = self._waiting.pop(message["id"])
                future.set_result(message)
        with self._lock:
            self._ended = True
            lost = [*self._waiting.values()]
            self._waiting.clear()
        if not self.ready.done():
            lost.append(self.ready)
        for future in lost:
            future.set_exception(ZygoteDiedError("it ended before it answered"))


def _python_path() -> list[str]:
    """Where the zygote finds this package when it is not installed, as in a checkout; and the user's own PYTHONPATH."""
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    parent = str(Path(__file__).resolve().parents[2])
    # PYTHONPATH goes before the standard library, where installed packages must not be.
    return inherited if parent in sysconfig.get_paths().values() else [*inherited, parent]


def _parse_report(text: str) -> dict[str, Any] | None:
    try:
        report = json.loads(text)
    except ValueError:
        return None
    return report if isinstance(report, dict) else None
