"""Shuts a child process in before it runs code that is not trusted, as tightly as the machine allows.

Level "namespaces": the child is the first process of its own process, mount, network, IPC and host name namespaces.
It sees a read-only tree of libraries (`root`), a scratch folder in memory and no other process or network, and
has no capabilities. Level "process": its own session, a folder on disk, resource limits, no network and no signals to
others; it does not hide the file system. At both, where root starts it, the child has a user id of its own if that can
read the interpreter. Knows nothing of tasks or verdicts.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import select
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from triton_sft_pipeline.verification.sandbox import linux
from triton_sft_pipeline.verification.sandbox.seccomp import install_filter

NAMESPACES = "namespaces"
PROCESS = "process"
SLOTS = 256
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
_CHILD_NAMESPACES = linux.CLONE_NEWNS | linux.CLONE_NEWIPC | linux.CLONE_NEWNET | linux.CLONE_NEWUTS
# User ids from here up belong to nobody: above those that systems and containers hand out, below the signed limit.
_FREE_USERS = (0x70000000, 0x7FFF0000)
_MAX_OPEN_FILES = 1024


@dataclass(frozen=True)
class Limits:
    """What a child may use.

    Attributes:
        cpu_s: seconds of processor time.
        file_bytes: size of each file that it writes.
        data_bytes: private memory; 0 for no limit, as on a GPU, where drivers map far more than they use.
        processes: processes and threads alive at a time.
        scratch_bytes: size of all files in scratch, which lies in memory (level "namespaces" only).
    """

    cpu_s: int
    file_bytes: int
    data_bytes: int = 0
    processes: int = 64
    scratch_bytes: int = 1 << 30

    def to_dict(self) -> dict[str, int]:
        """As JSON carries it."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """How children are shut in.

    Attributes:
        level: NAMESPACES or PROCESS.
        reason: why it is not more, "" when nothing more is known.
        own_user_namespace: namespaces are made by an ordinary user, inside a user namespace.
        first_user: the first of SLOTS user ids for children, 0 when they keep the id of the caller.
    """

    level: str
    reason: str = ""
    own_user_namespace: bool = False
    first_user: int = 0

    def users(self) -> list[int]:
        """The ids that children may run as."""
        return [self.first_user + slot for slot in range(SLOTS)] if self.first_user else [os.getuid()]


def allowed_environment(python_path: list[str]) -> dict[str, str]:
    """The environment for the process that children are forked from."""
    environment = {name: os.environ[name] for name in _ALLOWED_VARIABLES if name in os.environ}
    # One thread a process: many kernels are judged side by side, and a pool of threads does not survive a fork.
    return environment | {"PYTHONPATH": os.pathsep.join(python_path), "OMP_NUM_THREADS": "1"}


def choose_plan(wish: str = "auto") -> Plan:
    """Find out, in a process that is thrown away, which namespaces this machine lets us have.

    Args:
        wish: "auto" for the best; "user" for namespaces inside a user namespace at best; PROCESS for none.
    """
    if wish == PROCESS:
        return Plan(PROCESS, "it was asked for")
    reasons = []
    for own_user_namespace in (False, True) if wish == "auto" else (True,):
        reason = _outcome_of(partial(_try_namespaces, own_user_namespace))
        if not reason:
            return Plan(NAMESPACES, "", own_user_namespace, 0 if own_user_namespace else free_users())
        reasons.append(f"{'in a user namespace' if own_user_namespace else 'as this user'}: {reason}")
    return Plan(PROCESS, "; ".join(reasons))


def enter_outer_namespaces(plan: Plan) -> None:
    """Prepare the calling process to fork the one that forks children: its next child starts process namespace."""
    user, group = os.getuid(), os.getgid()
    if plan.own_user_namespace:
        linux.unshare(linux.CLONE_NEWUSER)
        _map_user(user, group)
    linux.unshare(linux.CLONE_NEWPID)


def enter_own_mounts() -> None:
    """Give the calling process, the first of its process namespace, mounts and a /proc that nobody else sees."""
    linux.unshare(linux.CLONE_NEWNS)
    linux.make_private()
    linux.mount("proc", Path("/proc"), "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)


def enter_namespaces(plan: Plan, root: Path, slot: int, limits: Limits) -> Path:
    """Move the calling process, the first of a process namespace, into the tree at `root` and take its rights away.

    Returns:
        The scratch folder, as it is called from now on.

    Raises:
        OSError: the kernel refuses a step; the process must end then.
    """
    user, group = os.getuid(), os.getgid()
    if plan.first_user:
        user = group = plan.first_user + slot
    # No privilege is needed to be killed first when memory runs out; the file is not ours any more later.
    Path("/proc/self/oom_score_adj").write_text("1000")
    outer_proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    linux.unshare(_CHILD_NAMESPACES)
    # tmpfs counts pages, and an inode costs a kilobyte that it does not count.
    options = f"size={limits.scratch_bytes},nr_inodes=20000,mode=700,uid={user},gid={group}"
    linux.mount("scratch", root / "scratch", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, options)
    restricted = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    # CUDA does not start without writing to its own files there; others it may not write to.
    if not (root / "dev" / "nvidiactl").exists():
        restricted |= linux.MS_RDONLY
    linux.mount("proc", root / "proc", "proc", restricted)
    linux.pivot_root(root)
    os.chdir("/scratch")
    with contextlib.suppress(OSError):
        _set_host_name("judged")
    if plan.own_user_namespace:
        # One more, in which this child's processes are counted apart, and which has no power over the mounts.
        linux.unshare(linux.CLONE_NEWUSER)
        _map_user(user, group, outer_proc)
    os.close(outer_proc)
    _set_limit(resource.RLIMIT_NPROC, limits.processes)
    _give_up_user(plan, slot)
    return Path("/scratch")


def give_up_rights(limits: Limits, alone: bool, zygote: int) -> None:
    """The last step at both levels: limits, no new privileges, death with the zygote.

    Args:
        limits: what the process may use.
        alone: there are no namespaces, so that the filter of system calls must do some of their work.
        zygote: a pidfd of the process that forked this one.
    """
    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_NOFILE, _MAX_OPEN_FILES)
    _set_limit(resource.RLIMIT_CPU, limits.cpu_s)
    _set_limit(resource.RLIMIT_FSIZE, limits.file_bytes)
    if limits.data_bytes:
        _set_limit(resource.RLIMIT_DATA, limits.data_bytes)
    linux.die_with_parent(signal.SIGKILL)
    if select.select([zygote], [], [], 0)[0]:
        os._exit(1)
    os.close(zygote)
    linux.forbid_new_privileges()
    # Without filters in the kernel, namespaces still hold; alone it is the best that there is.
    with contextlib.suppress(OSError):
        install_filter(os.getpid() if alone else None)


def enter_process_level(plan: Plan, folder: Path, slot: int, limits: Limits) -> Path:
    """Make `folder` the calling process's world as far as that goes without namespaces. Gives the folder."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    # What it leaves running stays below it until it ends, and is then the zygote's to kill.
    linux.adopt_orphans()
    # The limit counts all that the user runs: where others run too, it is what there is and a share on top.
    others = 0 if plan.first_user else _tasks_of(os.getuid())
    _set_limit(resource.RLIMIT_NPROC, others + limits.processes)
    _give_up_user(plan, slot)
    os.chdir(folder)
    return folder


def arrange_descriptors(connection: int, output: int, keep: int) -> int:
    """Standard input is empty, output and errors go to `output`, 3 is `connection`, and `keep` is 4: all others close.

    Returns:
        Where `keep` is now.
    """
    nothing = os.open(os.devnull, os.O_RDONLY)
    # Out of the way of 0 to 4 first: one may lie where another is to go.
    high = [_move_above(fd) for fd in (nothing, output, output, connection, keep)]
    for target, fd in enumerate(high):
        os.dup2(fd, target, inheritable=target < 3)
    os.closerange(5, os.sysconf("SC_OPEN_MAX"))
    return 4


def set_up_surroundings(scratch: Path) -> None:
    """Point what looks for a place to write, and what is printed, to where it may go."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    sys.dont_write_bytecode = True
    tempfile.tempdir = str(scratch)
    here = str(scratch)
    os.environ.update({"HOME": here, "TMPDIR": here, "TRITON_CACHE_DIR": str(scratch / "triton"), "USER": "judged"})
    os.environ.pop("PYTHONPATH", None)
    # The process ends without flushing: what is printed must be out before.
    sys.stdout = os.fdopen(1, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)


def _try_namespaces(own_user_namespace: bool) -> None:
    """Do once all that needs the kernel's leave; runs in a process of its own."""
    user, group = os.getuid(), os.getgid()
    if own_user_namespace:
        linux.unshare(linux.CLONE_NEWUSER)
        _map_user(user, group)
    linux.unshare(linux.CLONE_NEWPID | _CHILD_NAMESPACES)
    if reason := _outcome_of(_try_mounts):
        raise OSError(reason)


def _try_mounts() -> None:
    linux.make_private()
    linux.mount("proc", Path("/proc"), "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
    linux.mount("root", Path("/tmp"), "tmpfs")
    linux.make_read_only(Path("/tmp"))
    linux.pivot_root(Path("/tmp"))


def _outcome_of(action: Callable[[], None]) -> str:
    """Run something in a forked process. Gives "" or why it failed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            os.write(write, str(error).encode()[:500])
        os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        reason = stream.read().decode(errors="replace")
    _, status = os.waitpid(pid, 0)
    return reason or ("" if status == 0 else "the process that tried it was killed")


def _give_up_user(plan: Plan, slot: int) -> None:
    """Become the user of a slot, if children have users of their own, and lose all capabilities."""
    # While there still is the capability to.
    linux.lower_capability_bound()
    if plan.first_user:
        user = plan.first_user + slot
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    linux.drop_capabilities()
    linux.make_dumpable()


def _map_user(user: int, group: int, proc: int | None = None) -> None:
    """Let a fresh user namespace know its caller by the id that it has outside.

    Args:
        user: the id of the user.
        group: the id of the group.
        proc: a descriptor of a writable /proc; None for the one that is mounted.
    """
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        path = f"/proc/self/{name}" if proc is None else f"self/{name}"
        fd = os.open(path, os.O_WRONLY, dir_fd=proc)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def free_users() -> int:
    """The first of SLOTS user ids that exist here and that nobody uses; 0 when there are none."""
    low, high = _FREE_USERS
    ranges = []
    for name in ("uid_map", "gid_map"):
        first, _, count = Path("/proc/self", name).read_text().split()[:3]
        ranges.append((int(first), int(first) + int(count)))
    top = min(end for _, end in ranges)
    if top < high:
        # A container with few ids: the last ones of 16 bits are seldom anybody's.
        low, high = 60_000, min(top, 65_000)
    if high - low <= SLOTS or any(first > low for first, _ in ranges):
        return 0
    # Chosen at random, because the number of processes is counted by id and other judges may be at work.
    return low + secrets.randbelow(high - low - SLOTS)


def _tasks_of(user: int) -> int:
    count = 0
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == user:
                count += sum(1 for _ in os.scandir(f"/proc/{entry.name}/task"))
    return count


def _move_above(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD, 10)


def _set_limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))


def _set_host_name(name: str) -> None:
    import socket

    socket.sethostname(name)
