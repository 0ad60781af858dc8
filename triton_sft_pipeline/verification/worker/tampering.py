"""Notices when code replaces what its judge relies on, or leaves threads or processes behind.

Runs in the kernel's own process, beside code that could mislead it; what it finds may lower a verdict and never raise
one. Knows nothing of kernels.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

# Modules whose functions and classes stay as they are. Adding to them is fine: torch loads parts of itself on demand.
_MODULES = (
    "builtins",
    "gc",
    "io",
    "json",
    "os",
    "socket",
    "struct",
    "threading",
    "time",
    "_thread",
    "torch",
    "torch._C",
    "torch.cuda",
    "torch.cuda.streams",
    "torch.nn.functional",
    "torch.overrides",
    "torch.random",
    "torch.testing",
    "torch.utils._python_dispatch",
    "torch.utils.flop_counter",
    "triton",
    "triton.compiler",
    "triton.compiler.compiler",
    "triton.runtime",
    "triton.runtime.autotuner",
    "triton.runtime.interpreter",
    "triton.runtime.jit",
    "triton.testing",
)
# Classes whose methods, inherited ones too, stay as they are.
_CLASSES = (
    "torch.Tensor",
    "torch.Generator",
    "torch.nn.Module",
    "torch.cuda.Event",
    "torch.cuda.Stream",
    "torch.cuda.CUDAGraph",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "triton.compiler.compiler.CompiledKernel",
    "triton.runtime.autotuner.Autotuner",
    "triton.runtime.interpreter.GridExecutor",
    "triton.runtime.interpreter.InterpretedFunction",
    "triton.runtime.jit.JITFunction",
    "triton.runtime.jit.KernelInterface",
    "socket.socket",
)
_OWN = __name__.rpartition(".")[0]
# The interpreter exchanges these for the time of a launch, and code for a notebook sets `_`.
_COME_AND_GO = frozenset({"builtins._", "builtins.print", "builtins.range"})


class Fingerprint(NamedTuple):
    """What was there before the kernel's code was loaded. Holds on to all of it, so that no identity is used again.

    Attributes:
        modules: every loaded module by its name.
        members: {dotted name of a module or class: (it, {name of a member: (member, its code)})}.
        hooks: what Python calls at every step.
    """

    modules: dict[str, Any]
    members: dict[str, tuple[Any, dict[str, tuple[Any, Any]]]]
    hooks: tuple[Any, ...]


def fingerprint() -> Fingerprint:
    """Take down what there is now. Take it when everything that the harness itself exchanges is in place."""
    if "torch" in sys.modules:
        # PyTorch loads this when it is first needed, and then exchanges functions of its own.
        importlib.import_module("torch._dynamo")
    owners: dict[str, Any] = {name: sys.modules[name] for name in _names() if name in sys.modules}
    owners |= _classes(owners)
    members = {name: (owner, _members(owner)) for name, owner in owners.items()}
    return Fingerprint(dict(sys.modules), members, _hooks())


def changed(before: Fingerprint) -> list[str]:
    """Dotted names of what has been replaced, removed or rewritten since, in a fixed order; empty when nothing was."""
    found = [f"sys.modules[{name!r}]" for name, module in before.modules.items() if sys.modules.get(name) is not module]
    for dotted, (owner, members) in before.members.items():
        now = _members(owner)
        found += [
            f"{dotted}.{name}"
            for name, member in members.items()
            if f"{dotted}.{name}" not in _COME_AND_GO and not _same(member, now.get(name))
        ]
    names = ("sys.settrace", "sys.setprofile", "threading.settrace", "threading.setprofile")
    return found + [name for name, old, new in zip(names, before.hooks, _hooks(), strict=True) if old is not new]


def threads() -> int:
    """Python threads besides the main one, however they were started. Threads of libraries in C++ do not count."""
    # A thread of the bare _thread module is in none of threading's lists, but has a frame.
    return max(len(sys._current_frames()), threading.active_count()) - 1


def processes() -> int:
    """Other live processes: all of this process namespace when we are its first, else those of our session or line."""
    entries = {int(path.name): _status(path) for path in _process_folders()}
    alive = {pid: status for pid, status in entries.items() if status is not None and status[0] not in "ZX"}
    own = os.getpid()
    if own == 1:
        return len(alive.keys() - {own})
    ours = {own}
    while more := {pid for pid, (_, parent, _) in alive.items() if parent in ours} - ours:
        ours |= more
    session = os.getsid(0)
    # A leader's session is its own; a mere member's is that of the shell that it was started from.
    members = {pid for pid, (_, _, leader) in alive.items() if leader == session} if session == own else set()
    return len((ours | members) - {own})


class ThreadCounter:
    """Counts the Python threads that are started from when it is made, ended ones too. `started` is their number.

    A thread has its own stack of PyTorch's modes, so what it computes is in no log.
    """

    def __init__(self) -> None:
        import _thread

        self.started = 0
        start = self._counted(_thread.start_new_thread)
        for module, name in ((_thread, "start_new_thread"), (_thread, "start_new"), (threading, "_start_new_thread")):
            setattr(module, name, start)

    def _counted(self, start: Callable[..., int]) -> Callable[..., int]:
        def start_new_thread(*args: Any, **kwargs: Any) -> int:
            self.started += 1
            return start(*args, **kwargs)

        return start_new_thread


def _names() -> list[str]:
    return [*_MODULES, *sorted(name for name in sys.modules if name.startswith(f"{_OWN}."))]


def _classes(modules: dict[str, Any]) -> dict[str, Any]:
    """The listed classes, and those that the harness itself defines."""
    found: dict[str, Any] = {}
    for dotted in _CLASSES:
        module, _, name = dotted.rpartition(".")
        found[dotted] = getattr(sys.modules.get(module), name, None)
    for module, owner in modules.items():
        if module.startswith(f"{_OWN}."):
            found |= {f"{module}.{name}": value for name, value in vars(owner).items() if _is_defined_in(module, value)}
    return {dotted: value for dotted, value in found.items() if inspect.isclass(value)}


def _is_defined_in(module: str, value: Any) -> bool:
    return getattr(value, "__module__", None) == module


def _members(owner: Any) -> dict[str, tuple[Any, Any]]:
    """What can be called or looked up on a module or class, with the code behind it, which can be exchanged too."""
    spaces = reversed(owner.__mro__) if inspect.isclass(owner) else [vars(owner)]
    found: dict[str, Any] = {"__class__": type(owner)}
    for space in spaces:
        found.update(space if isinstance(space, dict) else vars(space))
    return {name: (value, getattr(value, "__code__", None)) for name, value in found.items() if _is_code(value)}


def _is_code(value: Any) -> bool:
    return (
        callable(value) or isinstance(value, property | staticmethod | classmethod) or inspect.isdatadescriptor(value)
    )


def _same(old: tuple[Any, Any], new: tuple[Any, Any] | None) -> bool:
    return new is not None and old[0] is new[0] and old[1] is new[1]


def _hooks() -> tuple[Any, ...]:
    return sys.gettrace(), sys.getprofile(), threading.gettrace(), threading.getprofile()


def _process_folders() -> Iterable[Path]:
    try:
        return [path for path in Path("/proc").iterdir() if path.name.isdigit()]
    except OSError:
        return []


def _status(folder: Path) -> tuple[str, int, int] | None:
    """(state, parent, session) of a process; None when it is gone."""
    try:
        text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name, in brackets, may hold anything.
    state, parent, _, session = text.rpartition(")")[2].split()[:4]
    return state, int(parent), int(session)
