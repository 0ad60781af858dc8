"""Shuts a child process in before it runs code that is not trusted: own session, resource limits, no open files.

This is the isolation level "process". What it does not do: hide the file system, the network or other processes of the
same user.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ISOLATION = "process"
# Everything else of the environment, tokens and keys above all, stays with the judge.
_ALLOWED_VARIABLES = (
    "CC",
    "CUDA_DEVICE_ORDER",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "LIBRARY_PATH",
    "PATH",
    "TRITON_LIBCUDA_PATH",
    "TRITON_PTXAS_PATH",
    "VIRTUAL_ENV",
)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Limits:
    """What a child may use.

    Attributes:
        cpu_s: seconds of processor time.
        file_bytes: size of each file that it writes.
        data_bytes: private memory; 0 for no limit, as on a GPU, where drivers map far more than they use.
    """

    cpu_s: int
    file_bytes: int
    data_bytes: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def allowed_environment(python_path: list[str]) -> dict[str, str]:
    """The environment for the process that children are forked from."""
    environment = {name: os.environ[name] for name in _ALLOWED_VARIABLES if name in os.environ}
    # One thread a process: many kernels are judged side by side, and a pool of threads does not survive a fork.
    return environment | {"PYTHONPATH": os.pathsep.join(python_path), "OMP_NUM_THREADS": "1"}


def confine(folder: Path, report_fd: int, output_fd: int, limits: Limits) -> int:
    """Turn the calling process, fresh from a fork, into a confined one whose world is `folder`.

    Returns:
        The descriptor to report on, the only one left open beside the standard three.
    """
    os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    report_fd, output_fd, nothing = (_above_standard(fd) for fd in (report_fd, output_fd, nothing))
    os.dup2(nothing, 0)
    os.dup2(output_fd, 1)
    os.dup2(output_fd, 2)
    os.dup2(report_fd, 3)
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if fd > 3:
            # The listing's own descriptor is closed already.
            with contextlib.suppress(OSError):
                os.close(fd)
    os.chdir(folder)
    sys.dont_write_bytecode = True
    tempfile.tempdir = str(folder)
    os.environ.update({"HOME": str(folder), "TMPDIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")})
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, 1024)
    _limit(resource.RLIMIT_CPU, limits.cpu_s)
    _limit(resource.RLIMIT_FSIZE, limits.file_bytes)
    if limits.data_bytes:
        _limit(resource.RLIMIT_DATA, limits.data_bytes)
    return 3


def adopt_orphans() -> None:
    """Make the calling process the parent of every descendant whose own parent dies, so that none gets away."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def children() -> set[int]:
    """Process ids of the calling process's children, adopted ones included."""
    parent = str(os.getpid())
    found: set[int] = set()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and _parent_of(entry.name) == parent:
            found.add(int(entry.name))
    return found


def _parent_of(pid: str) -> str:
    try:
        # The command's name is in brackets and may hold anything; the parent is the second field after it.
        return Path("/proc", pid, "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
    except (OSError, IndexError):
        return ""


def _above_standard(fd: int) -> int:
    """Move a descriptor out of the way of 0 to 3."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD, 10)


def _limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))


def _prctl(option: int, value: int) -> Any:
    return ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
