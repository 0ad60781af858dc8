"""The process that every task is forked from: torch and Triton are imported, CUDA is untouched.

It runs no code of a problem or a kernel itself, keeps no deadlines and reads nothing of what a child sends to the
judge. On a SOCK_SEQPACKET socket it takes JSON requests: {"spawn": id, "task", "limits"} with the child's socket as a
descriptor, and {"kill": id}. It sends {"ready", "backend", "versions", "isolation", "isolation_reason"} once and
{"ended": id, "exit_code", "signal", "output"} for every child, `output` being the end of what it printed.

Two processes: a supervisor, which stays small, and the zygote proper, the first process of its own process namespace
where the machine allows that. When the judge or the zygote ends, however it ends, no child survives; when the judge
has gone without removing its folder, the supervisor does.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from triton_sft_pipeline.verification.sandbox import confine
from triton_sft_pipeline.verification.sandbox.children import Children
from triton_sft_pipeline.verification.sandbox.confine import NAMESPACES, PROCESS, Limits, Plan, linux
from triton_sft_pipeline.verification.sandbox.leftovers import (
    reap_strays,
    remove_folder,
    send_signal,
)
from triton_sft_pipeline.verification.sandbox.root import build_root
from triton_sft_pipeline.verification.sandbox.warm_up import library_files, load_tasks, probe, warm_up

_TASKS = {
    "kernel": "triton_sft_pipeline.verification.worker.kernel_session:serve",
    "reference": "triton_sft_pipeline.verification.worker.reference_session:serve",
}
_PROBE_TIMEOUT_S = 60.0
_PROBE_LIMITS = Limits(cpu_s=600, file_bytes=1 << 30)
# The judge's ids begin at 1.
_PROBE = 0
_Answer = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class _Attempt:
    """What a plan was found to be good for: what forks by it, what the probe found, and the socket that keeps it."""

    children: Children
    found: dict[str, Any]
    connection: socket.socket

    def is_good(self, device: str) -> bool:
        """Whether nothing looser could do better."""
        if self.found["error"]:
            return False
        return device == "cpu" or bool(self.found.get("gpu")) or not list(Path("/dev").glob("nvidia*"))


def _probe(plan: Plan, folder: Path, device: str, answer: _Answer) -> _Attempt:
    """Try a plan with a child."""
    children = Children(plan, folder, device, answer)
    ours, theirs = socket.socketpair()
    children.spawn(_PROBE, partial(probe, files=library_files()), _PROBE_LIMITS, theirs.detach())
    ours.settimeout(_PROBE_TIMEOUT_S)
    try:
        line = ours.makefile("rb").readline()
        found = json.loads(line) if line else {"error": "the child that tried it ended: " + children.output_of(_PROBE)}
    except TimeoutError:
        found = {"error": f"the child that tried it did not answer within {_PROBE_TIMEOUT_S:.0f} s"}
    return _Attempt(children, found, ours)


def _choose_level(plan: Plan, folder: Path, device: str, answer: _Answer, readable: list[Path]) -> _Attempt:
    """The tightest plan with which everything works; a looser one carries the reason."""
    best: _Attempt | None = None
    reason = plan.reason
    if plan.level == NAMESPACES:
        try:
            build_root(folder / "root", plan.users(), [folder], readable)
            best = _probe(plan, folder, device, answer)
        except OSError as error:
            reason = str(error)
        else:
            reason = best.found["error"] or "CUDA finds no GPU in namespaces"
    # As root, children can still be made other users; that fails where only root can read the interpreter.
    users = confine.free_users() if os.getuid() == 0 else 0
    for first_user in dict.fromkeys((users, 0)):
        if best is not None and best.is_good(device):
            break
        loose = Plan(PROCESS, reason, first_user=first_user)
        best = _better(best, _probe(loose, folder, device, answer))
    assert best is not None
    return best


def _better(old: _Attempt | None, new: _Attempt) -> _Attempt:
    """The one that finds more; the older, which is the tighter, where both find the same. Ends the other."""
    if old is None:
        return new
    worth = [(not attempt.found["error"], bool(attempt.found.get("gpu"))) for attempt in (old, new)]
    chosen, other = (new, old) if worth[1] > worth[0] else (old, new)
    other.connection.close()
    other.children.close()
    return chosen


def _run_zygote(options: argparse.Namespace, plan: Plan, control: socket.socket, supervisor: int) -> None:
    def answer(message: dict[str, Any]) -> None:
        if message.get("ended") != _PROBE:
            control.send(json.dumps(message).encode())

    # A new one, or a zygote that takes another's place would find its kernel compiled and load nothing.
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-", dir=options.folder)
    if plan.level == NAMESPACES:
        confine.enter_own_mounts()
        (options.folder / "root").mkdir(exist_ok=True)
    if options.device != "cpu" and options.warm_up:
        os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        # Before the fork, which then need not import it again.
        importlib.import_module("torch")
    device = options.device if options.warm_up else "cpu"
    attempt = _choose_level(plan, options.folder, device, answer, options.readable)
    children, found = attempt.children, attempt.found
    if found["error"]:
        raise RuntimeError(f"not even a plain child works: {found['error']}")
    if device == "cuda" and not found.get("gpu"):
        answer({"ready": False})
        return
    children.backend = "cuda" if found.get("gpu") else "interpreter"
    if children.backend != "cuda":
        attempt.connection.close()
    versions = warm_up(children.backend, found.get("capability")) if options.warm_up else {}
    tasks = load_tasks(json.loads(options.tasks))
    # Keeps the children's garbage collectors off the pages they share with this process.
    gc.collect()
    gc.freeze()
    versions |= {name: found[name] for name in ("gpu", "cuda", "driver") if name in found}
    message = {"backend": children.backend, "versions": versions}
    isolation = {"isolation": children.plan.level, "isolation_reason": children.plan.reason}
    # A broken pipe, like the end of the requests, means that the judge is gone.
    with contextlib.suppress(ConnectionError):
        answer({"ready": True} | message | isolation)
        children.serve(control, supervisor, tasks)
    children.kill_all()


def _start_zygote(options: argparse.Namespace, plan: Plan, control: socket.socket) -> int:
    """Fork the zygote proper. Gives its process id."""
    supervisor = os.pidfd_open(os.getpid())
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if plan.level == NAMESPACES:
            linux.die_with_parent(signal.SIGKILL)
        # Without namespaces it must live a little longer than the supervisor, to kill what children have started.
        linux.adopt_orphans()
        if not select.select([supervisor], [], [], 0)[0]:
            _run_zygote(options, plan, control, supervisor)
            status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    """Serve the judge on the other end of a socket."""
    parser = argparse.ArgumentParser(description="Internal: the process that the kernel judge forks its workers from.")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--readable", type=Path, action="append", default=[])
    parser.add_argument("--tasks", default=json.dumps(_TASKS), help=argparse.SUPPRESS)
    parser.add_argument("--no-warm-up", dest="warm_up", action="store_false", help=argparse.SUPPRESS)
    parser.add_argument("--level", choices=("auto", "user", PROCESS), default="auto", help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.umask(0o022)
    linux.adopt_orphans()
    control = socket.socket(fileno=options.control)
    plan = confine.choose_plan(options.level)
    if plan.level == NAMESPACES:
        confine.enter_outer_namespaces(plan)
    pid = _start_zygote(options, plan, control)
    ordered: list[int] = []

    def end(*_: object) -> None:
        # The judge goes on with another zygote, and with its folder.
        ordered.append(pid)
        send_signal(pid, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    _, status = os.waitpid(pid, 0)
    reap_strays(set())
    gone = select.poll()
    gone.register(control, 0)
    if gone.poll(0) and not ordered:
        remove_folder(options.folder)
    sys.exit(0 if status == 0 else 1)


if __name__ == "__main__":
    main()
