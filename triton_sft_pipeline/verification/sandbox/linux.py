"""The few calls of Linux that Python does not offer before 3.12: namespaces, mounts, capabilities, prctl.

Every function raises OSError with the call's name when the kernel refuses. Knows nothing of sandboxes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
_MNT_DETACH = 2

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_SYS_MOUNT_SETATTR = 442
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def unshare(flags: int) -> None:
    """Put the calling process (with CLONE_NEWPID: its next child) into new namespaces."""
    _check("unshare", _libc().unshare(flags))


def setns(fd: int, kind: int) -> None:
    """Join the namespace that a descriptor of /proc/PID/ns stands for."""
    _check("setns", _libc().setns(fd, kind))


def mount(source: str, target: Path, kind: str | None = None, flags: int = 0, options: str | None = None) -> None:
    """Mount a file system, bind a path or change a mount."""
    status = _libc().mount(
        source.encode(),
        os.fsencode(target),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode() if options else None,
    )
    _check("mount", status, target)


def detach(target: Path) -> None:
    """Take a mount and all below it away, at once; what is still open of it stays usable."""
    _check("umount2", _libc().umount2(os.fsencode(target), _MNT_DETACH), target)


def make_private(root: Path = Path("/")) -> None:
    """Let no mount that is made from now on be seen in another namespace."""
    mount("none", root, None, MS_REC | MS_PRIVATE)


def make_read_only(root: Path) -> None:
    """Turn a mount and all that are below it read-only, and let no program in them gain privileges."""
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID, 0, 0, 0)
    flags = ctypes.c_uint(_AT_RECURSIVE)
    size = ctypes.c_size_t(len(attributes))
    number = ctypes.c_long(_SYS_MOUNT_SETATTR)
    status = _libc().syscall(number, ctypes.c_long(_AT_FDCWD), os.fsencode(root), flags, attributes, size)
    _check("mount_setattr", status, root)


def pivot_root(root: Path) -> None:
    """Make a mount the calling process's root and leave nothing of the old one reachable."""
    os.chdir(root)
    number = _SYS_PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise OSError(f"pivot_root: unknown on {platform.machine()}")
    # With "." for both, the old root comes to lie on top of the new one and is then taken off.
    _check("pivot_root", _libc().syscall(ctypes.c_long(number), b".", b"."), root)
    _check("umount2", _libc().umount2(b".", _MNT_DETACH))
    os.chdir("/")


def lower_capability_bound() -> None:
    """Let no program that is run from now on have any capability, where the caller may decide that."""
    capability = 0
    while _libc().prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1


def drop_capabilities() -> None:
    """Give up every capability that the caller has."""
    _prctl("PR_CAP_AMBIENT", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _check("capset", _libc().capset(header, bytes(24)))


def forbid_new_privileges() -> None:
    """Let no program that is run from now on have more rights than the caller, setuid or not."""
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent(number: int) -> None:
    """Have the kernel send the caller a signal when the thread that forked it ends. Changes of user undo this."""
    _prctl("PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, number)


def make_dumpable() -> None:
    """Give /proc/self back to the caller after a change of user."""
    _prctl("PR_SET_DUMPABLE", _PR_SET_DUMPABLE, 1)


def adopt_orphans() -> None:
    """Make the calling process the parent of every descendant whose own parent dies, so that none gets away."""
    _prctl("PR_SET_CHILD_SUBREAPER", _PR_SET_CHILD_SUBREAPER, 1)


def _prctl(name: str, option: int, value: int) -> None:
    _check(name, _libc().prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def _check(call: str, status: int, path: Path | None = None) -> None:
    if status < 0:
        error = ctypes.get_errno()
        reason = "no more namespaces are allowed" if error == errno.ENOSPC and call == "unshare" else os.strerror(error)
        raise OSError(error, f"{call}: {reason}", str(path) if path else None)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
