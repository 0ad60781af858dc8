"""What lets a killed evaluation go on: rows that are on disk when the call returns, and a record of what was asked.

Three files of one directory: `run.json` says what is asked of whom, `generations.jsonl` and `verdicts.jsonl` grow line
by line. Knows nothing of what is in a row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.files import json_bytes, locked, read_json, write_json

RUN, GENERATIONS, VERDICTS = "run.json", "generations.jsonl", "verdicts.jsonl"
_NAMED = 3
"""Differences that an error names; the rest is counted."""


class Journal:
    """A file of JSON objects, one a line, that only grows.

    Args:
        path: the file; it is made when missing.

    Attributes:
        rows: what earlier runs left, without a last line that a kill cut off: that is removed from the file.

    Raises:
        PipelineError: the file cannot be written, another process has it open, or it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._stream = FileIO(path, "a+")
        except OSError as error:
            raise PipelineError(f"{path}: cannot be written ({error.strerror}). Give --out another place.") from error
        in_use = PipelineError(f"{path}: another run is writing there. Wait for it, or give --out another name.")
        try:
            # Not every file system knows locks.
            locked(self._stream, in_use, required=False)
            self.rows = self._read()
        except BaseException:
            self._stream.close()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; it is on the disk when this returns.

        Raises:
            StepError: it cannot be, as on a full disk.
        """
        data = json_bytes(json.dumps(row, ensure_ascii=False) + "\n")
        try:
            while data:
                data = data[self._stream.write(data) :]
            os.fdatasync(self._stream)
        except OSError as error:
            raise StepError(
                f"{self.path}: {error.strerror}. Every row before is kept: start again with the same --out to go on."
            ) from error

    def close(self) -> None:
        """Close the file and let other processes have it."""
        self._stream.close()

    def _read(self) -> list[dict[str, Any]]:
        self._stream.seek(0)
        data = self._stream.readall() or b""
        *lines, rest = data.split(b"\n")
        rows = [self._row(line, number) for number, line in enumerate(lines, 1)]
        if rest:
            # A row is written with its newline at its end, so whatever lacks one is no whole row.
            self._stream.truncate(len(data) - len(rest))
        return rows

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise self._foreign(number) from error
        if not isinstance(row, dict):
            raise self._foreign(number)
        return row

    def _foreign(self, number: int) -> PipelineError:
        return PipelineError(
            f"{self.path}, line {number}: not a row of an evaluation. Remove the line, or give --out another name."
        )


class Run(NamedTuple):
    """The two journals of a run."""

    generations: Journal
    verdicts: Journal


@contextmanager
def open_run(directory: Path, identity: Mapping[str, Any]) -> Iterator[Run]:
    """Begin an evaluation in `directory`, or go on with the one that is there, for this process alone.

    Args:
        directory: it is made when missing.
        identity: JSON data that says what is asked of whom; written to `run.json` before anything else.

    Raises:
        PipelineError: another process evaluates there; what is there was asked something else, which is named; or the
            directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PipelineError(f"{directory}: cannot be made ({error.strerror}). Give --out another place.") from error
    journals: list[Journal] = []
    try:
        # The first one is the lock of the whole directory.
        journals.append(Journal(directory / GENERATIONS))
        journals.append(Journal(directory / VERDICTS))
        _check_identity(directory / RUN, identity, is_new=not any(journal.rows for journal in journals))
        yield Run(*journals)
    finally:
        for journal in journals:
            journal.close()


def rows_of_same_run(directory: Path, asked: Mapping[str, Any]) -> int:
    """How many generations lie in `directory`; nothing is written.

    Args:
        asked: those entries of `open_run`'s identity that are known yet; the others are not compared.

    Raises:
        PipelineError: what is there was asked something else, or nobody knows what.
    """
    path = directory / GENERATIONS
    rows = path.read_bytes().count(b"\n") if path.is_file() else 0
    if rows:
        _refuse_another(directory / RUN, asked, set(asked))
    return rows


def _check_identity(path: Path, identity: Mapping[str, Any], is_new: bool) -> None:
    if is_new:
        try:
            write_json(path, identity)
        except OSError as error:
            raise StepError(f"{path}: {error.strerror}.") from error
        return
    _refuse_another(path, identity)


def _refuse_another(path: Path, identity: Mapping[str, Any], compared: set[str] | None = None) -> None:
    """Compare with what `run.json` says, in these entries or in all."""
    try:
        recorded = read_json(path)
        earlier = _flat({k: v for k, v in recorded.items() if compared is None or k in compared})
    except (OSError, ValueError, AttributeError) as error:
        raise PipelineError(
            f"{path}: cannot be read, but answers lie beside it: what was asked is not known. Give --out another name."
        ) from error
    now = _flat(json.loads(json.dumps(identity)))
    differing = [name for name in sorted({*earlier, *now}) if earlier.get(name) != now.get(name)]
    if differing:
        named = "; ".join(f"{name} was {_shown(earlier, name)}, is {_shown(now, name)}" for name in differing[:_NAMED])
        more = f"; and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
        raise PipelineError(
            f"{path}: an earlier run there asked something else ({named}{more}). Give --out another name, ask as "
            "before, or remove the folder to start anew."
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, its names joined with dots."""
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {name: leaf for key, inner in value.items() for name, leaf in _flat(inner, f"{prefix}{key}.").items()}


def _shown(side: Mapping[str, Any], name: str) -> str:
    return json.dumps(side[name], ensure_ascii=False) if name in side else "not there"
