"""Writing files so that no reader ever sees half of one, keeping others out of one, and hashing what was written.

Everything is built under a temporary name in the directory of its destination and renamed into place. Knows nothing of
what is in the files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import IOBase
from pathlib import Path
from typing import IO, Any, TypeVar

TEMPORARY_PREFIX = ".tmp-"

_Open = TypeVar("_Open", bound=IOBase)


@contextmanager
def atomic_writer(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a temporary file that becomes `path` when the block ends without an error, and vanishes when it does not.

    Args:
        path: the destination; its parent directory is made when it is missing.
        mode: "wb" or "w"; text is UTF-8 unless `options` says otherwise.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, suffix=path.suffix, dir=path.parent)
    try:
        with os.fdopen(descriptor, mode, **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files that only their owner can read; artifacts follow the user's umask like any other file.
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        # A full disk is reported without a name.
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)
        raise


def _umask() -> int:
    """The process's umask, from /proc where there is one: asking the system means changing it for an instant, for every
    thread.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    current = os.umask(0)
    os.umask(current)
    return current


def locked(file: _Open, in_use: Exception, *, required: bool = True) -> _Open:
    """An open file that no other process has until this one closes it or ends: `with locked(open(...), ...) as file`.

    The lock goes with the open file, so nothing is left of it after a kill. The file itself is neither written nor
    removed.

    Args:
        in_use: what is raised, the file being closed, when another process has it.
        required: False goes on without a lock where the file system knows none.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise in_use from error
    except OSError:
        if required:
            file.close()
            raise
    return file


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_writer(path) as stream:
        stream.write(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    atomic_write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON that a person can read and `git diff` can compare."""
    atomic_write_bytes(path, json_bytes(json.dumps(value, indent=2, ensure_ascii=False) + "\n"))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    atomic_write_bytes(path, json_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)))


def json_bytes(text: str) -> bytes:
    """JSON text as UTF-8. Half of a surrogate pair, which UTF-8 cannot hold, becomes `\\udXXX`: inside a JSON string
    that is its own escape.
    """
    return text.encode("utf-8", "backslashreplace")


def read_json(path: Path) -> Any:
    """Read a JSON file that this project wrote."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content, read in blocks."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form: the order of keys does not matter, that of lists does."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return sha256_bytes(text.encode("utf-8", "surrogatepass"))


def hash_tree(directory: Path) -> str:
    """Hex SHA-256 over the relative path and the content of every file under `directory`."""
    directory = Path(directory)
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return hash_json([[p.relative_to(directory).as_posix(), sha256_file(p)] for p in files])
