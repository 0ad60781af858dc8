"""Reading trace files: JSON arrays, JSON Lines and Parquet, record by record, each with its place and its raw text.

A file that breaks off gives every whole record before the break and says where it broke. Memory is bounded by one
record, never by a file. Knows nothing of what a record should hold.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import hash_json
from triton_sft_pipeline.traces.arrays import array_records
from triton_sft_pipeline.traces.items import Break, Item
from triton_sft_pipeline.traces.lines import line_records
from triton_sft_pipeline.traces.parquet import parquet_records
from triton_sft_pipeline.traces.sources import SourceFile, resolve
from triton_sft_pipeline.traces.streams import ByteSource, Window
from triton_sft_pipeline.traces.values import BOM

Progress = Callable[[int, int], None]

_NOT_SPACE = re.compile(rb"[^ \t\r\n]")
# A file that was written to this recently may be written to again without its time of change showing it.
_SETTLED_S = 2.0
_hashes: dict[tuple[str, int, int, int], str] = {}


class _TraceFile:
    """One file, read once and while its records are asked for.

    Attributes:
        path: what its records carry as their file.
        sha256: hash of its bytes, after the last record: what is hashed is what was parsed.
    """

    def __init__(self, file: SourceFile, progress: Callable[[int], None] | None = None) -> None:
        self.path = file.name
        self._file = file
        self._progress = progress
        self.sha256 = ""

    def records(self) -> Iterator[Item]:
        """Every record in order; a `Break`, when there is one, comes last.

        Raises:
            PipelineError: the file cannot be read, is empty, or is not of the format that its name says.
        """
        if self._file.path.name.lower().endswith(".parquet"):
            yield from self._rows()
        else:
            yield from self._text()

    def _text(self) -> Iterator[Item]:
        source = ByteSource(self._file.path, self._progress)
        blocks = source.blocks()
        window = Window(blocks)
        read = line_records if _is_lines(self._file.path) else array_records
        _check_beginning(self.path, window, arrays=read is array_records, source=source)
        last: Item | None = None
        for last in read(self.path, window):
            if isinstance(last, Break):
                break
            yield last
        # Nothing more can be made of the rest, but it belongs to what is hashed.
        rest = sum(len(block) for block in blocks)
        if isinstance(last, Break):
            yield last if source.cut is None else replace(last, reason=f"{source.cut}: {last.reason}")
        elif source.cut is not None:
            yield Break(self.path, window.end + rest, last.position + 1 if last else 0, source.cut)
        self.sha256 = source.sha256

    def _rows(self) -> Iterator[Item]:
        path = self._file.path
        try:
            with open(path, "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                stream.seek(0)
                if not size:
                    raise PipelineError(f"{self.path}: the file is empty; expected Parquet.")
                yield from parquet_records(self.path, stream, lambda share: self._report(int(share * size)))
        except OSError as error:
            raise PipelineError(f"{self.path}: cannot be read ({error.strerror or error}).") from error
        self.sha256 = digest

    def _report(self, done: int) -> None:
        if self._progress:
            self._progress(done)


class Reading:
    """The records of several files, in order, read once and while they are asked for.

    Iterate over it once. Of each file a `Break`, when there is one, comes last; the files after it are read all the
    same.

    Attributes:
        files: what is read.
        hashes: (file name, SHA-256 of the file's bytes) of every file that was read to its end so far.
    """

    def __init__(self, files: Sequence[SourceFile], progress: Progress | None = None) -> None:
        self.files = list(files)
        self.hashes: list[tuple[str, str]] = []
        self._progress = progress

    @property
    def source_hash(self) -> str:
        """The hash of all that was read, as `hash_location` tells it: known after the last record."""
        return hash_sources(self.hashes)

    def __iter__(self) -> Iterator[Item]:
        sizes = [_size(file.path) for file in self.files]
        total, before = sum(sizes), 0
        for file, size in zip(self.files, sizes, strict=True):
            opened = _TraceFile(file, self._told(before, total))
            yield from opened.records()
            self.hashes.append((file.path.name, opened.sha256))
            before += size

    def _told(self, before: int, total: int) -> Callable[[int], None] | None:
        progress = self._progress
        if progress is None:
            return None
        return lambda done: progress(before + done, max(total, before + done))


def open_traces(files: Sequence[SourceFile], progress: Progress | None = None) -> Reading:
    """The records of `files` (see `sources.resolve`), parsed as they are iterated over.

    Args:
        progress: called with (bytes read, bytes in all), in bytes of the files as they lie on the disk.

    Raises, while iterating:
        PipelineError: a file cannot be read, is empty, or is not of the format that its name says.
    """
    return Reading(files, progress)


def hash_location(location: str | Path | Sequence[str | Path], origin: str | None = None) -> str:
    """Hash of the content that `location` names: the observed version of `reasoning_traces`. Names of files count,
    their place does not. Of a file that has not changed since this process last hashed it the hash is remembered.

    Raises:
        PipelineError: see `sources.resolve`, or a file cannot be read.
    """
    return hash_sources([(file.path.name, _hash_file(file.path)) for file in resolve(location, origin)])


def hash_sources(hashes: list[tuple[str, str]]) -> str:
    """One hash of (file name, content hash) pairs. A single file is known by its content alone."""
    return hashes[0][1] if len(hashes) == 1 else hash_json(sorted(hashes))


def _hash_file(path: Path) -> str:
    try:
        with open(path, "rb") as stream:
            found = os.fstat(stream.fileno())
            key = (str(path), found.st_ino, found.st_size, found.st_mtime_ns)
            if key in _hashes:
                return _hashes[key]
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            settled = time.time() - found.st_mtime > _SETTLED_S and os.fstat(stream.fileno()).st_mtime_ns == key[3]
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read ({error.strerror}).") from error
    if settled and stat.S_ISREG(found.st_mode):
        _hashes[key] = digest
    return digest


def _is_lines(path: Path) -> bool:
    name = path.name.lower()
    return name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst"))


def _check_beginning(name: str, window: Window, arrays: bool, source: ByteSource) -> None:
    """Refuse a text that is empty or, where an array is expected, begins otherwise. Space at the beginning is left
    where it is: it counts.
    """
    at = 0
    while (found := _NOT_SPACE.search(window.data, at)) is None:
        at = len(window.data)
        if not window.advance(0):
            cut = f" ({source.cut})" if source.cut else ""
            raise PipelineError(
                f"{name}: the file is empty{cut}; expected a JSON array of traces, or JSON Lines in a .jsonl file."
            )
    begin = found.start()
    window.get(0, begin + 64)
    text = window.data[begin:].removeprefix(BOM)
    if arrays and not text.lstrip(b" \t\r\n").startswith(b"["):
        start = window.data[begin : begin + 64].decode("utf-8", "surrogateescape")[:40]
        raise PipelineError(
            f"{name}: not a JSON array; it begins with {start!r}. "
            "Expected `[{...}, ...]`; JSON Lines must be named .jsonl."
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read ({error.strerror}).") from error
