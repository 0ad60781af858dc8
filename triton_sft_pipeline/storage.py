"""Where artifacts live: content-addressed directories that appear whole or not at all, and a `current` pointer each.

    storage/<asset key>/<hash of all its content>/   built under a temporary name, renamed into place once, never edited
    storage/<asset key>/current                      a symlink, replaced atomically
    storage/<asset key>/.work/<fingerprint>/         checkpoints: what lets a killed step go on
    storage/.cache/                                  what can be worked out again, and may be removed at any time

Every artifact holds `artifact.json`: its data version, the configuration that made it and the versions of what it was
made from. Steps find their inputs through `current` alone, so that they run the same from Dagster, the command line and
Python. Knows nothing of Dagster or of what is in an artifact.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.files import hash_tree, locked, read_json, write_json
from triton_sft_pipeline.processes import process_stamp

MANIFEST = "artifact.json"
CURRENT = "current"
_DRAFT_PREFIX = ".building-"


@dataclass(frozen=True)
class Artifact:
    """One version of what an asset made.

    Attributes:
        key: the asset key.
        path: its directory, the resolved one and not `current`, so that a reader keeps the version it began with.
        data_version: hash of what downstream steps see in it.
        code_version: hash of everything beyond its inputs that it depended on when it was made.
        inputs: asset key -> data version of what it was made from.
        record: whatever the step noted about the making of it (settings, counts, source hash).
    """

    key: str
    path: Path
    data_version: str
    code_version: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


class Draft:
    """An artifact being built: write into `path`, check it, then `promote` it. What is not promoted is removed."""

    def __init__(self, store: ArtifactStore, key: str, path: Path) -> None:
        self.key = key
        self.path = path
        self._store = store

    def promote(
        self,
        data_version: str,
        code_version: str,
        inputs: Mapping[str, str] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Give the draft its place and its name, and make it the current version of its key."""
        manifest = {
            "key": self.key,
            "data_version": data_version,
            "code_version": code_version,
            "inputs": dict(inputs or {}),
            "record": dict(record or {}),
        }
        write_json(self.path / MANIFEST, manifest)
        return self._store._install(self.key, self.path)


class ArtifactStore:
    """Artifacts under one root directory.

    Args:
        root: made when it is missing and first written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()

    def current(self, key: str) -> Artifact | None:
        """The current version of `key`, or None when nothing was promoted yet or its directory is gone."""
        return _read_artifact(key, (self.root / key / CURRENT).resolve())

    def require(self, key: str) -> Artifact:
        """The current version of `key`.

        Raises:
            PipelineError: there is none.
        """
        artifact = self.current(key)
        if artifact is None:
            raise PipelineError(
                f"{self.root / key}: there is no current {key}. Materialise it first: "
                "`triton-sft refresh`, or "
                f"`dagster asset materialize -m triton_sft_pipeline.definitions --select {key}`."
            )
        return artifact

    def version(self, key: str, name: str) -> Artifact:
        """One version of `key` by the name of its directory, current or not: what an adapter was trained on stays what
        it was trained on.

        Raises:
            PipelineError: it is gone.
        """
        artifact = _read_artifact(key, self.root / key / name)
        if artifact is None:
            raise PipelineError(
                f"{self.root / key / name}: this version of {key} is gone. Materialise it and what is made of it again."
            )
        return artifact

    def current_link(self, key: str) -> Path:
        """The stable path of whatever version of `key` is current; it need not exist yet."""
        return self.root / key / CURRENT

    @contextmanager
    def building(self, key: str) -> Iterator[Draft]:
        """A draft directory on the disk of its destination. It is removed on the way out unless it was promoted.

        Raises:
            StepError: the disk is full or not writable; the current version stays what it was.
        """
        parent = self.root / key
        path = parent / f"{_DRAFT_PREFIX}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            with _failures_explained(self.root):
                parent.mkdir(parents=True, exist_ok=True)
                _remove_abandoned_drafts(parent)
                path.mkdir()
                yield Draft(self, key, path)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def workspace(self, key: str, fingerprint: str) -> Iterator[Path]:
        """A directory that outlives a killed run, for what lets the next run go on: it is the same for the same
        `fingerprint`.

        The caller removes what it holds once the result was promoted (`discard_workspace`).

        Raises:
            PipelineError: another process is working in it.
            StepError: the disk is full or not writable.
        """
        path = self.root / key / ".work" / fingerprint
        with _failures_explained(self.root):
            path.mkdir(parents=True, exist_ok=True)
            lock = open(path.with_suffix(".lock"), "w", encoding="utf-8")  # noqa: SIM115
        in_use = PipelineError(f"{path}: another run is working on the same {key}; wait for it or cancel it first.")
        with locked(lock, in_use):
            yield path

    def discard_workspace(self, key: str, fingerprint: str) -> None:
        """Remove a workspace whose result was promoted."""
        path = self.root / key / ".work" / fingerprint
        shutil.rmtree(path, ignore_errors=True)
        path.with_suffix(".lock").unlink(missing_ok=True)

    def _install(self, key: str, draft: Path) -> Artifact:
        final = self.root / key / hash_tree(draft)[:16]
        if final.is_dir() and hash_tree(final)[:16] != final.name:
            # Somebody edited or emptied it. Making it again must mend it, not point at what is broken.
            broken = draft.with_name(f"{draft.name}.broken")
            final.rename(broken)
            shutil.rmtree(broken, ignore_errors=True)
        try:
            os.rename(draft, final)
        except OSError as error:
            # The same content was promoted before, by an earlier run or by one beside this one: that directory is this
            # artifact.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        self._point_current(key, final)
        # Not `current`, which a run beside this one may have moved on already.
        return self.version(key, final.name)

    def _point_current(self, key: str, final: Path) -> None:
        link = self.root / key / CURRENT
        temporary = link.with_name(f".{CURRENT}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        temporary.symlink_to(final.name, target_is_directory=True)
        os.replace(temporary, link)


def _read_artifact(key: str, directory: Path) -> Artifact | None:
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return None
    try:
        content = read_json(manifest)
        return Artifact(
            key=key,
            path=directory,
            data_version=content["data_version"],
            code_version=content["code_version"],
            inputs=content["inputs"],
            record=content["record"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(
            f"{manifest}: damaged ({error!r}). Remove {directory} and materialise {key} again."
        ) from error


def _remove_abandoned_drafts(parent: Path) -> None:
    """Drafts of processes of this machine that are gone: what a `kill -9` leaves behind."""
    for path in parent.glob(f"{_DRAFT_PREFIX}*"):
        # From the right: a host name may hold hyphens and digits itself.
        host, *rest = path.name.removeprefix(_DRAFT_PREFIX).rsplit("-", 2)
        if host == socket.gethostname() and len(rest) == 2 and rest[0].isdigit() and not process_stamp(int(rest[0])):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _failures_explained(root: Path) -> Iterator[None]:
    """Say in a sentence what the disk under `root` refused; an error about a file elsewhere passes as it is."""
    try:
        yield
    except OSError as error:
        place = Path(error.filename).absolute() if isinstance(error.filename, str) else root
        if not place.is_relative_to(root):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StepError(
                f"{place}: the disk is full. Nothing was promoted and the previous version stays; "
                "free some space and run again."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StepError(
                f"{place}: not writable ({error.strerror}). Point TRITON_SFT_HOME at a directory that is."
            ) from error
        raise
