"""The judge's folders: made for one task each, removed whatever was done to them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def new_folder(parent: Path, kind: str) -> Path:
    """A folder with a name that cannot be guessed, for the judge's user alone."""
    return Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=parent))


@contextmanager
def scratch(parent: Path, kind: str) -> Iterator[Path]:
    """A folder that is gone when the block ends."""
    folder = new_folder(parent, kind)
    try:
        yield folder
    finally:
        remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder, also one from which a kernel has taken the permission to."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        return
    folder.chmod(0o700)
    for directory, names, _ in os.walk(folder):
        for path in (Path(directory, name) for name in names):
            # Through a link this would open somebody else's folder.
            if not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
