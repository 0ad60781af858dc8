"""Finds what lies in files of problems: KernelBench-format *.py, JSON Lines, Parquet. Judges no code.

Each entry has a key, a place that a person finds it by, and either its code or what is wrong with it. A folder may be a
flat one, KernelBench's own repository (`KernelBench/level1/*.py`), its level folders, or a copy of its dataset
(`data/level_*.parquet`, with the columns code, level, name and problem_id).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError

KERNELBENCH = "kernelbench"
"""What problems of KernelBench carry as their source."""

TABLES = (".jsonl", ".parquet")

# KernelBench calls its files "23_Softmax.py" and keeps them in folders called "level1" to "level4"; its dataset has one
# "level_1-00000-of-00001.parquet" a level.
_FILE_NAME = re.compile(r"(?:\d+_)?(?P<name>.+)", re.DOTALL)
_LEVEL_FOLDER = re.compile(r"level_?(?P<level>\d+)")
_LEVEL_FILE = re.compile(r"level_?(?P<level>\d+)\b.*")


@dataclass(frozen=True)
class Entry:
    """One problem as it lies there.

    Attributes:
        key: its name among all that were read; may not be unique yet.
        file: the file that it is in, as a person knows it.
        spot: where in the file, such as "line 3"; empty for all of it.
        code: its source text; None when `fault` says why there is none.
        fault: what is wrong with the entry, as half a sentence; None when there is code.
        source, level, name: as of a `Problem`.
        named: `key` is one that the file gives.
    """

    key: str
    file: str
    spot: str = ""
    code: str | None = None
    fault: str | None = None
    source: str = ""
    level: int | None = None
    name: str | None = None
    named: bool = True

    @property
    def place(self) -> str:
        """Where a person finds it."""
        return f"{self.file}, {self.spot}" if self.spot else self.file


@dataclass(frozen=True)
class Layout:
    """The files of a folder.

    Attributes:
        files: in the order to read them, with the prefix that their keys get.
        kernelbench: the folder is laid out as KernelBench's repository or dataset.
    """

    files: list[tuple[Path, str]]
    kernelbench: bool = False


def layout_of(folder: Path) -> Layout:
    """The problem files of a folder, by name: its dataset's Parquet files if it has such, else its *.py and those of
    its level folders. A leading underscore or dot hides a file.
    """
    tables = [file for at in (folder / "data", folder) for file in sorted(at.glob("level_*.parquet"))]
    if tables:
        return Layout([(file, "") for file in tables], kernelbench=True)
    own = folder / "KernelBench"
    if _level_folders(own):
        return Layout(_sources(own), kernelbench=True)
    return Layout(_sources(folder))


def _level_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _LEVEL_FOLDER.fullmatch(path.name))


def _sources(folder: Path) -> list[tuple[Path, str]]:
    nested = [(at, f"level{_level_of(_LEVEL_FOLDER, at.name)}/") for at in _level_folders(folder)]
    return [
        (file, prefix)
        for at, prefix in [(folder, ""), *nested]
        for file in sorted(at.glob("*.py"))
        if not file.name.startswith(("_", "."))
    ]


def entries_of(file: Path, *, prefix: str = "", name: str | None = None, source: str = "") -> Iterator[Entry]:
    """The entries of one file, in order.

    Args:
        prefix: what a .py file's key begins with, such as "level3/".
        name: how a person knows the file; default its path.
        source: what its problems come from, where they do not say so themselves.
    """
    shown = name or str(file)
    if file.suffix == ".parquet":
        yield from _rows(file, shown, source)
    elif file.suffix == ".jsonl":
        yield from _lines(file, shown, source)
    else:
        yield _source_file(file, shown, prefix, source)


def _source_file(file: Path, shown: str, prefix: str, source: str) -> Entry:
    code, fault = _text(file)
    called = _FILE_NAME.fullmatch(file.stem)
    return Entry(
        key=prefix + file.stem,
        file=shown,
        code=code,
        fault=fault,
        source=source,
        level=_level_of(_LEVEL_FOLDER, file.resolve().parent.name),
        name=called["name"] if called else None,
    )


def _text(file: Path) -> tuple[str | None, str | None]:
    try:
        return file.read_text(encoding="utf-8-sig"), None
    except UnicodeDecodeError as error:
        return None, f"cannot be read: not UTF-8 ({error})"
    except OSError as error:
        return None, f"cannot be read: {error}"


def _lines(file: Path, shown: str, source: str) -> Iterator[Entry]:
    try:
        data = file.read_bytes()
    except OSError as error:
        yield Entry(file.name, shown, fault=f"cannot be read: {error}", named=False)
        return
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            spot = f"line {number}"
            record, fault = _record(line)
            blank = Entry(f"{file.name}:{number}", shown, spot, fault=fault, source=source, named=False)
            yield blank if record is None else _from_record(record, blank)


def _record(line: bytes) -> tuple[dict[str, Any] | None, str | None]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 ({error})"
    # RecursionError: nested too deep.
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({error})"
    if not isinstance(record, dict):
        return None, f"expected a JSON object, found {type(record).__name__}"
    return record, None


def _rows(file: Path, shown: str, source: str) -> Iterator[Entry]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    unread = Entry(file.name, shown, source=source, level=_level_of(_LEVEL_FILE, file.stem), named=False)
    try:
        with pq.ParquetFile(file) as table:
            columns = [name for name in table.schema_arrow.names if name in _FIELDS]
            if not {"code", "pytorch_code"} & set(columns):
                found = ", ".join(table.schema_arrow.names[:10]) or "none"
                fault = f"no column code or pytorch_code; it has {found}"
                yield replace(unread, fault=fault)
                return
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    blank = replace(unread, key=f"{file.name}:{number}", spot=f"row {number}")
                    yield _from_record(row, blank)
    # ValueError: text that is not UTF-8.
    except (OSError, ValueError, pa.ArrowException) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        yield replace(unread, fault=f"not readable as Parquet after row {number} ({first})")


_FIELDS = frozenset({"key", "sample_key", "pytorch_code", "code", "source", "level", "name", "problem_id"})


def _from_record(record: Mapping[str, Any], blank: Entry) -> Entry:
    """The entry of a record in our words (key, pytorch_code) or in KernelBench's (code, level, name, problem_id)."""
    level, name = record.get("level"), record.get("name")
    level = level if isinstance(level, int) and not isinstance(level, bool) else blank.level
    key = _key(record, level)
    if key is None:
        return replace(blank, fault="no key; give each problem a string `key` (or `sample_key`)")
    named = replace(blank, key=key, level=level, named=True)
    field = "pytorch_code" if "pytorch_code" in record or "code" not in record else "code"
    code = record.get(field)
    if not isinstance(code, str):
        return replace(named, fault=f"`{field}` must be a string, found {type(code).__name__}")
    # KernelBench's names are those of its files.
    stem = _FILE_NAME.fullmatch(name) if field == "code" and isinstance(name, str) else None
    return replace(
        named,
        code=code,
        source=str(record.get("source") or blank.source),
        name=stem["name"] if stem else name if isinstance(name, str) and name else None,
    )


def _key(record: Mapping[str, Any], level: int | None) -> str | None:
    """The record's own key; else what KernelBench's files are called: "level3/23_Name"."""
    own = record.get("key", record.get("sample_key"))
    if own is not None or "code" not in record:
        return own if isinstance(own, str) and own else None
    name, number = record.get("name"), record.get("problem_id")
    if not isinstance(name, str) or not name:
        return None
    if isinstance(number, int) and not name.startswith(f"{number}_"):
        name = f"{number}_{name}"
    return name if level is None else f"level{level}/{name}"


def _level_of(pattern: re.Pattern[str], name: str) -> int | None:
    match = pattern.fullmatch(name)
    return int(match["level"]) if match else None


def require_place(path: Path) -> None:
    """Refuse a path that is nothing that problems can be read from.

    Raises:
        PipelineError: nothing is there, or it is a file of another kind.
    """
    if path.is_dir():
        return
    if not path.is_file():
        raise PipelineError(
            f"There are no problems at {path}: name a folder of *.py files, a .py, .jsonl or .parquet file, "
            "or hf://ScalingIntelligence/KernelBench."
        )
    if path.suffix not in (".py", *TABLES):
        raise PipelineError(f"{path} is neither a folder of *.py files, nor a .py, .jsonl or .parquet file.")
