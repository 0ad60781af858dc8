"""Where traces lie: files, folders, patterns and datasets of the Hugging Face Hub, as one list of files.

Knows names and places, nothing of what is in a file.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from triton_sft_pipeline import hub
from triton_sft_pipeline.errors import PipelineError

FORMATS = (".json", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
SUFFIXES = (*FORMATS, *(text + packed for text in (".json", ".jsonl") for packed in COMPRESSIONS))
"""What a trace file may be called in a folder, a pattern or a dataset. A file that is named itself may be called
anything: without one of these it is read as a JSON array.
"""

# os.pathsep on every system that this runs on; the colon of hf:// joins nothing.
_SEPARATOR = re.compile(r"(?<!\bhf):|:(?!/)")


@dataclass(frozen=True)
class SourceFile:
    """One file of traces.

    Attributes:
        path: where its bytes lie.
        name: how a person knows it: the path as named, or hf://owner/name/path. Records carry it as their `file`.
    """

    path: Path
    name: str


def resolve(location: str | Path | Sequence[str | Path], origin: str | None = None) -> list[SourceFile]:
    """The trace files that `location` names, each once, in the order of naming.

    Args:
        location: a file; a folder, which stands for its trace files by name; a pattern (`runs/*/traces.json`, `**` for
            any depth); `hf://owner/name[@revision][/path]`; several of these joined by colons like PATH; or a list of
            such. Hidden files are somebody's temporary ones. A name that exists is never taken for a pattern or split.
        origin: what the location was read from, such as TRITON_SFT_TRACES: errors tell a person to change it there.

    Raises:
        PipelineError: nothing is there, or a place holds no trace file, or a dataset can neither be reached nor is it
            in the cache.
    """
    places = [location] if isinstance(location, str | Path) else location
    found: dict[object, SourceFile] = {}
    for place in places:
        for part in _split(str(place)):
            for identity, file in _files(part, origin):
                found.setdefault(identity, file)
    if not found:
        raise PipelineError(f"No traces are named: {location!r} is empty.{_advice(origin)}")
    return list(found.values())


def is_remote(location: str | Path) -> bool:
    """Whether a single place is a dataset of the Hub."""
    return hub.is_hub(str(location))


def _split(location: str) -> Iterator[str]:
    if location and _exists(Path(location)):
        yield location
        return
    yield from (part for part in _SEPARATOR.split(location) if part)


def _files(place: str, origin: str | None) -> Iterator[tuple[object, SourceFile]]:
    if hub.is_hub(place):
        # Files of equal content are one file in the Hub's cache, so the name tells them apart.
        for name, path in hub.fetch(place, SUFFIXES, origin):
            yield name, SourceFile(path, name)
        return
    path = Path(place).expanduser()
    try:
        paths = _local(path, origin)
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read ({error.strerror}).") from error
    for file in paths:
        yield file.resolve(), SourceFile(file, str(file))


def _local(path: Path, origin: str | None) -> list[Path]:
    if path.is_dir():
        files = _folder(path)
        if not files:
            raise PipelineError(f"{path}: the folder holds no .json or .jsonl file (also .gz or .zst) and no .parquet.")
        return files
    try:
        path.stat()
    except FileNotFoundError as error:
        if not glob.has_magic(str(path)):
            raise PipelineError(f"{path}: no such file or folder.{_advice(origin)}") from error
    else:
        return [path]
    # Path.glob takes no absolute pattern.
    matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
    files = [file for match in matches for file in (_folder(match) if match.is_dir() else [match])]
    files = [file for file in files if is_trace_name(file.name)]
    if not files:
        raise PipelineError(f"{path}: no trace file matches this pattern.{_advice(origin)}")
    return files


def _folder(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if is_trace_name(file.name) and file.is_file())


def is_trace_name(name: str) -> bool:
    """Whether a file of this name is taken from a folder: one of SUFFIXES, and not hidden."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _advice(origin: str | None) -> str:
    if origin is None:
        return ""
    return (
        f" Set {origin} to a .json or .jsonl file of traces (also .gz or .zst) or .parquet, a folder of them, "
        "a pattern, or hf://owner/name; several are joined by a colon."
    )
