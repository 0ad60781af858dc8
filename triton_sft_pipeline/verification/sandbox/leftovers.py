"""What children may leave behind, and how it is found and removed: processes, memory and folders.

Knows nothing of tasks or sandboxes.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def children() -> set[int]:
    """Process ids of the calling process's children, adopted ones included."""
    return {pid for pid, parent in _parents().items() if parent == os.getpid()}


def stop_descendants(ancestor: int) -> set[int]:
    """Stop every process below one, those that are started meanwhile too, and give their ids."""
    stopped: set[int] = set()
    while True:
        if not (fresh := _below(ancestor) - stopped):
            return stopped
        for pid in fresh:
            send_signal(pid, signal.SIGSTOP)
        stopped |= fresh


def reap_strays(known: set[int]) -> None:
    """Kill the caller's children that are not known, and the orphans that this makes its own, until there are none."""
    while strays := children() - known:
        for pid in strays:
            for below in stop_descendants(pid):
                send_signal(below, signal.SIGKILL)
            send_signal(pid, signal.SIGKILL)
        for pid in strays:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def remove_folder(folder: Path) -> None:
    """Remove a folder whatever was done to it: permissions taken away, nested more deeply than a path can name."""
    with contextlib.suppress(OSError):
        while below := _emptied(folder):
            for entry in below:
                # What lies in it moves up, so that no path gets long, and is seen in the next round.
                for inner in _emptied(Path(entry.path)):
                    os.rename(inner.path, folder / os.urandom(8).hex())
                Path(entry.path).rmdir()
        folder.rmdir()


def memory_of(pid: int) -> int:
    """Bytes of memory that a process holds, files' pages aside."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
    return 0


def _emptied(folder: Path) -> list[os.DirEntry[str]]:
    """Remove the files of a folder and list its folders."""
    folder.chmod(0o700)
    entries = list(os.scandir(folder))
    for entry in entries:
        if not entry.is_dir(follow_symlinks=False):
            Path(entry.path).unlink()
    folders = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    for entry in folders:
        os.chmod(entry.path, 0o700)
    return folders


def memory_below(ancestor: int) -> tuple[int, int]:
    """Bytes of memory that a process and all below it hold, files' pages aside, and how many processes that are.

    Pages that a fork shares with its parent are counted for both.
    """
    pids = _below(ancestor) | {ancestor}
    return sum(memory_of(pid) for pid in pids), len(pids)


def send_signal(pid: int, number: int) -> None:
    """Send a signal to a process if it is there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def signal_group(pid: int, number: int) -> None:
    """Send a signal to a process and the group that it leads, if they are there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
    send_signal(pid, number)


def _below(ancestor: int) -> set[int]:
    parents = _parents()
    below = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return below - {ancestor}


def _parents() -> dict[int, int]:
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                # The command's name is in brackets and may hold anything; the parent is the second field after it.
                text = Path(entry.path, "stat").read_text(errors="replace")
                found[int(entry.name)] = int(text.rpartition(")")[2].split()[1])
    return found
