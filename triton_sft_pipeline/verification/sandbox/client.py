"""The judge's end of the zygote: starts it, asks it for children, hands out their ends, replaces it when it has died.

Knows nothing of kernels. Safe to use from several threads.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.verification.sandbox.confine import Limits, allowed_environment
from triton_sft_pipeline.verification.sandbox.models import cached_models, hub_environment

_START_TIMEOUT_S = 180.0
# A killed child that has not ended by then hangs in a driver, and nothing more can be done about it.
_END_TIMEOUT_S = 20.0
_LOG = "zygote.log"
_ZYGOTE = "triton_sft_pipeline.verification.sandbox.zygote"
_MAX_MESSAGE = 1 << 16


class ZygoteDiedError(Exception):
    """The zygote ended before the child did; its children were killed with it."""


@dataclass(frozen=True)
class End:
    """How a child ended.

    Attributes:
        exit_code: 0 when its task returned, 70 when the task raised; None when a signal killed it.
        signal: the signal's name, as "SIGSEGV".
        output: the end of what it and its own children printed.
    """

    exit_code: int | None
    signal: str | None
    output: str


class Child:
    """A process that serves a task.

    Attributes:
        socket: the judge's end of the child's stream socket; it reads end-of-file when the child has ended.
    """

    def __init__(self, id: int, connection: socket.socket, process: _Process, end: Future[End]) -> None:
        self.socket = connection
        self._id = id
        self._process = process
        self._end = end

    def kill(self) -> None:
        """Have the child and all that it started killed; does not wait, and does nothing when it has ended."""
        if not self._end.done():
            self._process.kill_child(self._id)

    def end(self, timeout_s: float | None = None) -> End | None:
        """Wait for the child's end; None when it has not come in time.

        Raises:
            ZygoteDiedError: the zygote died, and the child with it.
        """
        try:
            return self._end.result(timeout_s)
        except FutureTimeoutError:
            return None

    def close(self) -> None:
        """Kill the child if it runs, wait until it is gone and close the socket. May be called again."""
        self.kill()
        with suppress(ZygoteDiedError):
            self.end(_END_TIMEOUT_S)
        self.socket.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ZygoteClient:
    """A zygote that is started at once and restarted when it is needed again.

    Args:
        device: "auto", "cuda" or "cpu".
        folder: the judge's private folder; the zygote removes it when the judge goes away without doing so.
        models: repositories of the Hub that children may read where the local cache holds them.
        options: more arguments for the zygote, for tests.

    Attributes, after `wait_ready`:
        backend: "cuda" or "interpreter".
        versions: of python, torch, triton and, on a GPU, of gpu, cuda and driver.
        isolation: "namespaces" or "process".
        isolation_reason: why it is only "process"; "" otherwise.
    """

    backend: str
    versions: dict[str, str]
    isolation: str
    isolation_reason: str

    def __init__(self, device: str, folder: Path, models: Sequence[str] = (), *, options: Sequence[str] = ()) -> None:
        self._device = device
        self._folder = folder
        self._readable = cached_models(models)
        self._options = list(options)
        self._lock = threading.Lock()
        self._closed = False
        self._process = self._start()

    @property
    def pid(self) -> int:
        """Process id of the present zygote's supervisor."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until the first zygote is ready.

        Raises:
            PipelineError: it does not start, or there is no GPU where one was asked for.
        """
        try:
            ready = self._process.ready.result(_START_TIMEOUT_S)
        except (ZygoteDiedError, FutureTimeoutError) as error:
            raise PipelineError(f"The judge's worker process did not start: {self._log_tail()}") from error
        if not ready["ready"]:
            raise PipelineError("No usable GPU was found for the judge; use the device cpu or look at nvidia-smi.")
        self.backend, self.versions = ready["backend"], ready["versions"]
        self.isolation, self.isolation_reason = ready["isolation"], ready["isolation_reason"]

    def spawn(self, task: str, limits: Limits) -> Child:
        """Start a child, in a new zygote when the last one has died.

        Raises:
            ZygoteDiedError: the zygote is closed, does not start again or ended meanwhile; it may be tried again.
        """
        process = self._living_process()
        try:
            ready = process.ready.result(_START_TIMEOUT_S)
        except FutureTimeoutError as error:
            process.kill()
            raise ZygoteDiedError("it did not start again") from error
        # A device that was there and is gone, or a sandbox that has changed, would make verdicts say what is not so.
        known = getattr(self, "backend", None), getattr(self, "isolation", None)
        if not ready["ready"] or known not in ((None, None), (ready["backend"], ready["isolation"])):
            process.kill()
            raise ZygoteDiedError("it came back with another device or isolation than before")
        return process.spawn(task, limits)

    def close(self) -> None:
        """End the zygote and every child. Threads that wait for an end get ZygoteDiedError."""
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
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        options = ["--device", self._device, "--folder", str(self._folder), "--control", str(theirs.fileno())]
        options += [f"--readable={path}" for path in self._readable]
        with theirs, (self._folder / _LOG).open("ab") as log:
            process = subprocess.Popen(
                # -P: what lies in the current directory must not take the place of a library.
                [sys.executable, "-P", "-m", _ZYGOTE, *options, *self._options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=allowed_environment(_python_path()) | hub_environment(self._readable),
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )
        return _Process(process, ours)

    def _log_tail(self) -> str:
        text = (self._folder / _LOG).read_text(errors="replace").strip()
        return " ".join(text.splitlines()[-3:])[-600:] or "it wrote no message."


class _Process:
    """One zygote process and the ends that are awaited from it."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self._process = process
        self.pid = process.pid
        self._control = control
        self._lock = threading.Lock()
        self._ends: dict[int, Future[End]] = {}
        self._next_id = 0
        self._ended = False
        self.ready: Future[dict[str, Any]] = Future()
        self._reader = threading.Thread(target=self._read_events, daemon=True, name="zygote-reader")
        self._reader.start()

    def spawn(self, task: str, limits: Limits) -> Child:
        ours, theirs = socket.socketpair()
        end: Future[End] = Future()
        with theirs, self._lock:
            if self._ended:
                ours.close()
                raise ZygoteDiedError("it ended before the task was sent")
            self._next_id += 1
            id = self._next_id
            self._ends[id] = end
            request = {"spawn": id, "task": task, "limits": limits.to_dict()}
            try:
                socket.send_fds(self._control, [json.dumps(request).encode()], [theirs.fileno()])
            except OSError as error:
                # It is ending; the reader notices and settles what is awaited.
                ours.close()
                raise ZygoteDiedError("it ended before the task was sent") from error
        return Child(id, ours, self, end)

    def kill_child(self, id: int) -> None:
        with self._lock, suppress(OSError):
            self._control.send(json.dumps({"kill": id}).encode())

    def has_ended(self) -> bool:
        return self._ended or self._process.poll() is not None

    def kill(self) -> None:
        """Kill it, which takes its children along but leaves the judge's folder, and wait until it is gone."""
        self._process.terminate()
        self.close()

    def close(self) -> None:
        """Close the control socket, which makes it kill its children and end; kill it when it does not."""
        # Wakes the reader, too, which closing alone does not.
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._control.close()

    def _read_events(self) -> None:
        while message := self._receive():
            if "ready" in message:
                self.ready.set_result(message)
                continue
            with self._lock:
                end = self._ends.pop(message["ended"])
            end.set_result(End(message["exit_code"], message["signal"], message["output"]))
        with self._lock:
            self._ended = True
            lost: list[Future[Any]] = [*self._ends.values()]
            self._ends.clear()
        if not self.ready.done():
            lost.append(self.ready)
        for future in lost:
            future.set_exception(ZygoteDiedError("it ended before the child did"))

    def _receive(self) -> dict[str, Any] | None:
        try:
            data = self._control.recv(_MAX_MESSAGE)
            return json.loads(data) if data else None
        except OSError:
            return None


def _python_path() -> list[str]:
    """Where the zygote finds this package when it is not installed, as in a checkout; and the user's own PYTHONPATH."""
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    parent = str(Path(__file__).resolve().parents[3])
    # PYTHONPATH goes before the standard library, where installed packages must not be.
    return inherited if parent in sysconfig.get_paths().values() else [*inherited, parent]
