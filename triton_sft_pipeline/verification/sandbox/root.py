"""The files that a judged kernel may see: a read-only tree of the interpreter, its libraries, a compiler and devices.

The tree is made once, of bind mounts on a small tmpfs, in a mount namespace of the caller's own. The project, the
user's files and everything else that is not listed here is not in it. Knows nothing of processes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import site
import stat
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from triton_sft_pipeline.verification.sandbox import linux

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
# Where whole systems keep their libraries, and where a driver or CUDA may live outside /usr.
_OTHER_SYSTEMS = ("/nix/store", "/gnu/store", "/run/opengl-driver", "/opt/cuda", "/opt/nvidia")
_ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_TOOLS = ("cc", "gcc", "clang", "ld", "as", "ptxas")
_PACKAGE = Path(__file__).resolve().parents[2]


def build_root(root: Path, users: Iterable[int], private: Iterable[Path] = (), readable: Iterable[Path] = ()) -> None:
    """Mount the tree on an empty folder.

    Args:
        root: the folder.
        users: ids of the users that will run in it, for /etc/passwd.
        private: folders that must not be seen even where they lie inside a part that is shown.
        readable: folders that are shown whatever lies around them.

    Raises:
        OSError: the kernel refuses a mount.
    """
    linux.mount("root", root, "tmpfs", linux.MS_NOSUID, "size=16m,mode=755")
    tree = _Tree(root)
    for path in [*_exposed([*private, *_home()]), *readable]:
        tree.show(path)
    _fill_etc(tree, users)
    _fill_dev(tree)
    for name in ("scratch", "proc"):
        (root / name).mkdir()
    if list(Path("/dev").glob("nvidia*")):
        tree.show(Path("/sys"))
    if not (root / "tmp").exists():
        # Else the interpreter itself lies below it, and only what asks for TMPDIR can write.
        (root / "tmp").symlink_to("/scratch")
    libraries = _library_folders()
    project = [] if _PACKAGE.parent in libraries else [_PACKAGE.parent]
    for path in [*private, *project, *(folder / _PACKAGE.name for folder in libraries)]:
        tree.hide(path)
    linux.make_read_only(root)


class _Tree:
    """A root in the making."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._shown: list[Path] = []

    def show(self, path: Path, depth: int = 0) -> None:
        """Make a file or folder appear under its own name, with the links on the way to it."""
        if depth > 40 or not path.exists():
            return
        at = Path("/")
        for i, part in enumerate(path.parts[1:], start=2):
            at = at / part
            if at.is_symlink():
                if not self._is_shown(at) and not os.path.lexists(self._inside(at)):
                    self._inside(at).symlink_to(at.readlink())
                target = os.path.normpath(at.parent / at.readlink())
                self.show(Path(target, *path.parts[i:]), depth + 1)
                return
            if not self._is_shown(at) and at != path:
                self._inside(at).mkdir(mode=0o755, exist_ok=True)
        if not self._is_shown(path):
            self.bind(path)

    def bind(self, path: Path) -> None:
        """Mount a real path on its like in the tree, whose folder is there already."""
        inside = self._inside(path)
        if path.is_dir():
            inside.mkdir(mode=0o755, exist_ok=True)
        else:
            inside.touch(mode=0o644)
        linux.mount(str(path), inside, None, linux.MS_BIND | linux.MS_REC)
        self._shown.append(path)

    def hide(self, path: Path) -> None:
        """Cover a folder, if it is in the tree, with an empty one."""
        if self._is_shown(path) and self._inside(path).is_dir():
            linux.mount("hidden", self._inside(path), "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=4k,mode=755")

    def file(self, path: Path) -> Path:
        """Where a path of the tree lies now."""
        return self._inside(path)

    def _is_shown(self, path: Path) -> bool:
        return any(path.is_relative_to(shown) for shown in self._shown)

    def _inside(self, path: Path) -> Path:
        return self._root / path.relative_to("/")


def _fill_etc(tree: _Tree, users: Iterable[int]) -> None:
    for name in _ETC:
        tree.show(Path("/etc", name))
    etc = tree.file(Path("/etc"))
    etc.mkdir(exist_ok=True)
    lines = [f"judged{user}:x:{user}:{user}::/scratch:/bin/sh\n" for user in users if user]
    (etc / "passwd").write_text("root:x:0:0::/scratch:/bin/sh\n" + "".join(lines))
    (etc / "group").write_text("root:x:0:\n")


def _fill_dev(tree: _Tree) -> None:
    dev = tree.file(Path("/dev"))
    dev.mkdir(exist_ok=True)
    graphics = [path for pattern in ("nvidia*", "dxg") for path in Path("/dev").glob(pattern)]
    for path in [Path("/dev", name) for name in _DEVICES] + sorted(graphics):
        tree.bind(path) if _is_open_to_all(path) else _copy_device(tree, path)
    for name, target in (("fd", "/proc/self/fd"), ("shm", "/scratch"), ("stdin", "fd/0"), ("stdout", "fd/1")):
        (dev / name).symlink_to(target)
    (dev / "stderr").symlink_to("fd/2")


def _is_open_to_all(path: Path) -> bool:
    return path.is_dir() or path.stat().st_mode & 0o006 == 0o006


def _copy_device(tree: _Tree, path: Path) -> None:
    """Make a device that only root may open anew for the users inside; without the right to, show it as it is."""
    node, found = tree.file(path), path.stat()
    try:
        os.mknod(node, stat.S_IFCHR | 0o666, found.st_rdev)
        node.chmod(0o666)
    except OSError:
        tree.bind(path)


def _exposed(forbidden: list[Path]) -> list[Path]:
    """The paths to show, the broad ones first."""
    system = [Path(name) for name in (*_SYSTEM, *_OTHER_SYSTEMS)]
    prefixes = [Path(name) for name in dict.fromkeys((sys.base_prefix, sys.prefix, sys.base_exec_prefix))]
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    searched = [Path(entry) for name in ("LD_LIBRARY_PATH", "LIBRARY_PATH") for entry in _entries(name)]
    wanted = [*prefixes, *named, *_library_folders(), *searched, *_tool_folders()]
    return system + [path for path in wanted if path.is_absolute() and not _is_too_broad(path, forbidden)]


def _library_folders() -> list[Path]:
    """Where installed packages are. A folder of somebody's own modules, as the project's, is not such a one."""
    installed = [Path(path) for path in (*sysconfig.get_paths().values(), *site.getsitepackages())]
    searched = [Path(entry) for entry in sys.path if entry and any(Path(entry).glob("*.dist-info"))]
    folders = dict.fromkeys(path for path in (*installed, *searched) if path.is_dir())
    return [path for path in folders if path != _PACKAGE.parent or path in installed]


def _tool_folders() -> list[Path]:
    """The folders of the compilers: their whole installation when they lie in a bin."""
    named = [os.environ.get(name, "").split(" ")[0] for name in ("CC", "TRITON_PTXAS_PATH")]
    found = [Path(tool).resolve() for name in (*_TOOLS, *named) if name and (tool := shutil.which(name))]
    return [path.parents[1] if path.parent.name == "bin" else path.parent for path in found]


def _is_too_broad(path: Path, forbidden: list[Path]) -> bool:
    """Whether showing a folder would show one that must not be seen."""
    real = path.resolve()
    return any(other.resolve().is_relative_to(real) for other in forbidden)


def _home() -> list[Path]:
    # A user that the system has no name for has no home either.
    with contextlib.suppress(RuntimeError):
        return [Path.home()]
    return []


def _entries(name: str) -> list[str]:
    return [entry for entry in os.environ.get(name, "").split(os.pathsep) if entry]
