"""A filter of system calls: what no kernel needs and what has let programs out of sandboxes before.

It closes the doors to new namespaces and mounts (and with them new capabilities), to other processes' memory, and to
the parts of Linux that are seldom used and often broken. Everything else is allowed. Knows nothing of sandboxes.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

# Numbers below 424 differ between machines; from 424 on they are the same everywhere.
_REFUSED = {
    "x86_64": {
        "ptrace": 101,
        "personality": 135,
        "pivot_root": 155,
        "chroot": 161,
        "acct": 163,
        "mount": 165,
        "umount2": 166,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "unshare": 272,
        "perf_event_open": 298,
        "open_by_handle_at": 304,
        "setns": 308,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "bpf": 321,
        "userfaultfd": 323,
    },
    "aarch64": {
        "umount2": 39,
        "mount": 40,
        "pivot_root": 41,
        "chroot": 51,
        "acct": 89,
        "personality": 92,
        "unshare": 97,
        "ptrace": 117,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
        "perf_event_open": 241,
        "open_by_handle_at": 265,
        "setns": 268,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "bpf": 280,
        "userfaultfd": 282,
    },
}
_REFUSED_EVERYWHERE = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsmount": 432,
    "mount_setattr": 442,
}
# Where there is no namespace to do it: no sockets but those of the machine itself, none that is connected to a service
# of the user's, and no signals to processes that are not the caller's.
_SOCKET = {"x86_64": 41, "aarch64": 198}
_CONNECT = {"x86_64": 42, "aarch64": 203}
_SIGNALS = {
    "x86_64": {"kill": 62, "rt_sigqueueinfo": 129, "tkill": 200, "tgkill": 234, "rt_tgsigqueueinfo": 297},
    "aarch64": {"kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240},
}
_UNIX_DOMAIN = 1
_PIDFD_SEND_SIGNAL = 424
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NEW_NAMESPACES = 0x7E020000
# On x86_64, numbers from here on are the x32 variants of the same calls.
_X32 = 0x40000000

_LOAD = 0x20
_JUMP_IF_EQUAL = 0x15
_JUMP_IF_AT_LEAST = 0x35
_JUMP_IF_ANY_BIT = 0x45
_RETURN = 0x06
_ALLOW = 0x7FFF0000
_FAIL = 0x00050000
_KILL = 0x80000000
# Offsets in what the kernel shows a filter of a call.
_NUMBER = 0
_ARCHITECTURE = 4
_FIRST_ARGUMENT = 16
_PR_SET_SECCOMP = 22
_FILTER = 2


def install_filter(alone: int | None = None) -> None:
    """Refuse the calls for the calling process and all that it starts. Needs no_new_privs.

    Args:
        alone: the caller's process id where no namespaces shut it in: then sockets to a network are refused too, and
            signals to any other process than this one or its group.

    Raises:
        OSError: the kernel has no filters, or the machine is neither x86_64 nor aarch64.
    """
    machine = platform.machine()
    if machine not in _REFUSED:
        raise OSError(f"seccomp: unknown on {machine}")
    program = _program(machine, alone)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_FILTER), header, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "seccomp: the kernel refused the filter")


def _program(machine: str, alone: int | None) -> list[tuple[int, int, int, int]]:
    """The filter: (operation, steps to skip if true, if false, value)."""
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_IF_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_IF_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _FAIL | errno.ENOSYS),
        # Its flags lie in memory, which a filter cannot read; the C library falls back to clone.
        (_JUMP_IF_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _FAIL | errno.ENOSYS),
    ]
    refused = {*_REFUSED[machine].values(), *_REFUSED_EVERYWHERE.values()}
    if alone is not None:
        refused |= {_CONNECT[machine], _PIDFD_SEND_SIGNAL}
        # CUDA does not start without a socket of this machine's own; such a one reaches no network.
        steps += [
            (_JUMP_IF_EQUAL, 0, 4, _SOCKET[machine]),
            (_LOAD, 0, 0, _FIRST_ARGUMENT),
            (_JUMP_IF_EQUAL, 1, 0, _UNIX_DOMAIN),
            (_RETURN, 0, 0, _FAIL | errno.EPERM),
            (_LOAD, 0, 0, _NUMBER),
        ]
        for number in _SIGNALS[machine].values():
            steps += [
                (_JUMP_IF_EQUAL, 0, 5, number),
                (_LOAD, 0, 0, _FIRST_ARGUMENT),
                (_JUMP_IF_EQUAL, 2, 0, 0),
                (_JUMP_IF_EQUAL, 1, 0, alone),
                (_RETURN, 0, 0, _FAIL | errno.EPERM),
                (_LOAD, 0, 0, _NUMBER),
            ]
    for number in sorted(refused):
        steps += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _FAIL | errno.EPERM)]
    return [
        *steps,
        (_JUMP_IF_EQUAL, 0, 3, _CLONE[machine]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_JUMP_IF_ANY_BIT, 0, 1, _NEW_NAMESPACES),
        (_RETURN, 0, 0, _FAIL | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
