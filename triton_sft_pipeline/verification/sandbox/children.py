"""The children of the zygote: forks them into their sandboxes, watches over them and tells how each ended.

It reads nothing of what a child sends to the judge, keeps no deadlines and never waits for a child that runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton_sft_pipeline.verification.sandbox import confine
from triton_sft_pipeline.verification.sandbox.confine import PROCESS, Limits, Plan, linux
from triton_sft_pipeline.verification.sandbox.leftovers import (
    memory_below,
    memory_of,
    reap_strays,
    remove_folder,
    send_signal,
    signal_group,
    stop_descendants,
)
from triton_sft_pipeline.verification.sandbox.warm_up import Task

_MAX_MESSAGE = 1 << 16
_MAX_OUTPUT = 2000
_READ = 1 << 16
_FAILED = 70
_MEMORY_INTERVAL_S = 0.25
_Answer = Callable[[dict[str, Any]], None]


@dataclass
class _Child:
    id: int
    pid: int
    pid_fd: int
    output_fd: int
    slot: int
    folder: Path | None
    data_bytes: int
    output: bytes = b""
    note: str = ""
    open_fds: set[int] = field(default_factory=set)


class Children:
    """Forks children, watches over them and calls `answer` with what happened to each."""

    def __init__(self, plan: Plan, folder: Path, backend: str, answer: _Answer) -> None:
        self.plan = plan
        self.backend = backend
        self._folder = folder
        self._answer = answer
        self._children: dict[int, _Child] = {}
        self._free_slots = list(range(confine.SLOTS))
        self._selector = selectors.DefaultSelector()
        self._own_memory = 0
        self._self_fd = os.pidfd_open(os.getpid())
        self._own_pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)

    def spawn(self, id: int, task: Task, limits: Limits, connection: int) -> None:
        """Start a child that serves a task on a socket, which is closed here."""
        output, output_write = os.pipe()
        folder = None
        if self.plan.level == PROCESS:
            folder = self._folder / f"scratch-{id}-{os.urandom(8).hex()}"
            folder.mkdir(mode=0o700)
        slot = self._free_slots[0]
        if folder and (user := self.plan.first_user and self.plan.first_user + slot):
            # On its way there the child goes through the judge's folder, which it may not list.
            self._folder.chmod(0o711)
            os.chown(folder, user, user)
        pid = self._fork()
        if pid == 0:
            self._run_child(task, limits, connection, output_write, slot, folder)
        self._free_slots.remove(slot)
        os.close(connection)
        os.close(output_write)
        child = _Child(id, pid, os.pidfd_open(pid), output, slot, folder, limits.data_bytes)
        self._children[id] = child
        for fd, kind in ((child.pid_fd, "exit"), (output, "output")):
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ, (kind, child))
            child.open_fds.add(fd)

    def kill(self, id: int) -> None:
        """Kill a child and all that it started, if it still runs; its end is answered like any other."""
        if child := self._children.get(id):
            self._kill(child)

    def serve(self, control: socket.socket, supervisor: int, tasks: dict[str, Task]) -> None:
        """Serve requests until the other end closes or the supervisor, a pidfd, ends."""
        self._selector.register(control, selectors.EVENT_READ, ("request", None))
        self._selector.register(supervisor, selectors.EVENT_READ, ("alone", None))
        self._own_memory = memory_of(os.getpid())
        looked = time.monotonic()
        while True:
            watched = any(child.data_bytes for child in self._children.values())
            for key, _ in self._selector.select(_MEMORY_INTERVAL_S if watched else None):
                kind, child = key.data
                if kind == "alone" or (kind == "request" and not self._take_request(control, tasks)):
                    return
                if child:
                    self._handle(kind, child)
            if watched and time.monotonic() - looked >= _MEMORY_INTERVAL_S:
                self._kill_hogs()
                looked = time.monotonic()

    def output_of(self, id: int) -> str:
        """The end of what a living or just ended child has printed."""
        child = self._children[id]
        while child.output_fd in child.open_fds and self._read(child):
            pass
        return child.output.decode(errors="replace")[-500:]

    def kill_all(self) -> None:
        """Leave no child alive."""
        for child in self._children.values():
            self._kill(child)
        reap_strays(set())

    def close(self) -> None:
        """Kill the children, tell nobody, and give up what watched over them."""
        for child in self._children.values():
            self._kill(child)
            os.waitpid(child.pid, 0)
            for fd in list(child.open_fds):
                self._forget(child, fd)
            if child.folder is not None:
                remove_folder(child.folder)
        self._children.clear()
        self._selector.close()
        os.close(self._self_fd)
        os.close(self._own_pid_namespace)

    def _fork(self) -> int:
        """Fork, at the upper level into a new process namespace."""
        if self.plan.level == PROCESS:
            return os.fork()
        linux.unshare(linux.CLONE_NEWPID)
        pid = -1
        try:
            pid = os.fork()
        finally:
            if pid:
                linux.setns(self._own_pid_namespace, linux.CLONE_NEWPID)
        return pid

    def _run_child(
        self, task: Task, limits: Limits, connection: int, output: int, slot: int, folder: Path | None
    ) -> None:
        """The child's whole life. Never returns."""
        status = _FAILED
        try:
            os.setsid()
            zygote = confine.arrange_descriptors(connection, output, self._self_fd)
            if folder is None:
                scratch = confine.enter_namespaces(self.plan, self._folder / "root", slot, limits)
            else:
                scratch = confine.enter_process_level(self.plan, folder, slot, limits)
            confine.give_up_rights(limits, folder is not None, zygote)
            confine.set_up_surroundings(scratch)
            task(socket.socket(fileno=3), self.backend)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            # Neither exit handlers nor threads of the kernel get to run.
            os._exit(status & 0xFF)

    def _kill_hogs(self) -> None:
        """Kill what has got around the limit of each process, by sharing memory or by starting many."""
        for child in self._children.values():
            if child.data_bytes:
                used, processes = memory_below(child.pid)
                if used > child.data_bytes + processes * self._own_memory:
                    self._kill(child)
                    child.note = f"\nKilled: {processes} processes with {used >> 20} MiB exceed its memory limit.\n"

    def _take_request(self, control: socket.socket, tasks: dict[str, Task]) -> bool:
        """False when the judge is gone."""
        try:
            data, fds, _, _ = socket.recv_fds(control, _MAX_MESSAGE, 1)
        except ConnectionError:
            return False
        if not data:
            return False
        request = json.loads(data)
        if "kill" in request:
            self.kill(request["kill"])
            return True
        try:
            self.spawn(request["spawn"], tasks[request["task"]], Limits(**request["limits"]), fds[0])
        except (OSError, IndexError) as error:
            # No process, descriptor or slot is left: this one child fails, the others go on.
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
            self._answer(_end(request["spawn"], _FAILED, f"It could not be started: {error}".encode()))
        return True

    def _handle(self, kind: str, child: _Child) -> None:
        if child.id not in self._children:
            return
        if kind == "output":
            self._read(child)
        else:
            self._finish(child)

    def _read(self, child: _Child) -> bool:
        """Take what a child printed; True while there may be more."""
        try:
            chunk = os.read(child.output_fd, _READ)
        except BlockingIOError:
            return False
        if not chunk:
            self._forget(child, child.output_fd)
            return False
        child.output = (child.output + chunk)[-_MAX_OUTPUT:]
        return True

    def _forget(self, child: _Child, fd: int) -> None:
        self._selector.unregister(fd)
        child.open_fds.discard(fd)
        os.close(fd)

    def _kill(self, child: _Child) -> None:
        if self.plan.level == PROCESS:
            # Stopped first, so that what it started cannot run ahead of the killing.
            signal_group(child.pid, signal.SIGSTOP)
            for pid in stop_descendants(child.pid):
                send_signal(pid, signal.SIGKILL)
        # At the upper level the kernel kills the whole process namespace with its first process.
        signal_group(child.pid, signal.SIGKILL)

    def _finish(self, child: _Child) -> None:
        _, status = os.waitpid(child.pid, 0)
        if self.plan.level == PROCESS:
            # What it started has become ours: nothing else that we did not fork can have.
            reap_strays({other.pid for other in self._children.values()})
        del self._children[child.id]
        reads = 0
        while child.output_fd in child.open_fds and reads < 64 and self._read(child):
            reads += 1
        for fd in list(child.open_fds):
            self._forget(child, fd)
        self._free_slots.append(child.slot)
        if child.folder is not None:
            remove_folder(child.folder)
        self._answer(_end(child.id, os.waitstatus_to_exitcode(status), child.output + child.note.encode()))


def _end(id: int, code: int, output: bytes) -> dict[str, Any]:
    return {
        "ended": id,
        "exit_code": code if code >= 0 else None,
        "signal": _signal_name(-code) if code < 0 else None,
        "output": output.decode(errors="replace"),
    }


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
