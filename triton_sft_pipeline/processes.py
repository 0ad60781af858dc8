"""Which processes of this machine are still there: how a killed run is told from a slow one."""

from __future__ import annotations

from pathlib import Path


def process_stamp(pid: int) -> str:
    """`pid:start time in clock ticks`, from /proc (see proc_pid_stat(5), field 22); empty when there is no such
    process.

    A zombie counts as gone: nobody may ever collect it in a container without an init process.
    """
    try:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else f"{pid}:{fields[19]}"


def process_is_alive(stamp: str) -> bool:
    """Whether the process of a stamp is still there, and not another one under the same number."""
    pid = stamp.split(":")[0]
    return pid.isdigit() and process_stamp(int(pid)) == stamp
