"""Reading trace files: a JSON array or JSON Lines, record by record, each with its place and its raw text.

A file that breaks off gives every whole record before the break and says where it broke. Knows nothing of what a record
should hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import hash_json, sha256_bytes
from triton_sft_pipeline.traces.record import Malformed, RawRecord

SUFFIXES = (".json", ".jsonl")
_SPACE = " \t\r\n"
_NOT_UTF8 = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class Break:
    """Where a file stopped being readable: everything before is kept, nothing after.

    Attributes:
        byte: offset of the first byte that could not be read as part of a whole record.
        position: index that the broken record would have had.
    """

    file: str
    byte: int
    position: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: breaks off at byte {self.byte:,}, in record {self.position}: {self.reason}"


@dataclass(frozen=True)
class TraceFile:
    """A file that was read once, whole: its bytes' hash and its text.

    Attributes:
        is_utf8: whether all of it is. A byte that is not stands in `text` as half of a surrogate pair (PEP 383), so
            that only its own record is lost.
    """

    path: str
    sha256: str
    text: str
    is_utf8: bool

    def records(self) -> Iterator[RawRecord | Malformed | Break]:
        """Every record in order; a `Break`, when there is one, comes last."""
        if self.path.lower().endswith(".jsonl"):
            yield from _lines(self)
        else:
            yield from _array(self)


def trace_files(location: Path) -> list[Path]:
    """The files that `location` names: itself, or the .json and .jsonl files of a folder, by name. Hidden files are
    somebody's temporary ones.

    Raises:
        PipelineError: nothing is there, or a folder holds no such file.
    """
    location = Path(location)
    try:
        location.stat()
        if not location.is_dir():
            return [location]
        files = sorted(
            p for p in location.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
        )
    except FileNotFoundError as error:
        raise PipelineError(
            f"{location}: no such file or folder. "
            "Set TRITON_SFT_TRACES to a .json or .jsonl file of traces, or to a folder of them."
        ) from error
    except OSError as error:
        raise PipelineError(f"{location}: cannot be read ({error.strerror}).") from error
    if not files:
        raise PipelineError(f"{location}: the folder holds no .json or .jsonl file.")
    return files


def open_trace_file(path: Path) -> TraceFile:
    """Read a file once; what is hashed is what is parsed.

    Raises:
        PipelineError: it cannot be read, is empty, or does not begin as a JSON array or as JSON Lines.
    """
    data = _read(path)
    if not data.strip():
        raise PipelineError(
            f"{path}: the file is empty; expected a JSON array of traces, or JSON Lines in a .jsonl file."
        )
    text, is_utf8 = _decode(data)
    if not str(path).lower().endswith(".jsonl") and not text.removeprefix("\ufeff").lstrip(_SPACE).startswith("["):
        start = text.lstrip(_SPACE)[:40]
        raise PipelineError(
            f"{path}: not a JSON array; it begins with {start!r}. "
            "Expected `[{...}, ...]`; JSON Lines must be named .jsonl."
        )
    return TraceFile(str(path), sha256_bytes(data), text, is_utf8)


def hash_location(location: Path) -> str:
    """Hash of the content that `location` names: the observed version of `reasoning_traces`. Names of files count,
    their place does not.
    """
    return hash_sources([(path.name, sha256_bytes(_read(path))) for path in trace_files(location)])


def hash_sources(hashes: list[tuple[str, str]]) -> str:
    """One hash of (file name, content hash) pairs. A single file is known by its content alone."""
    return hashes[0][1] if len(hashes) == 1 else hash_json(sorted(hashes))


def _read(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read ({error.strerror}).") from error


def _decode(data: bytes) -> tuple[str, bool]:
    try:
        return data.decode("utf-8"), True
    except UnicodeDecodeError:
        return data.decode("utf-8", "surrogateescape"), False


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _array(file: TraceFile) -> Iterator[RawRecord | Malformed | Break]:
    """Records of a JSON array by the standard library's decoder, one value at a time, so that the text of each is
    known.
    """
    text, decoder = file.text, json.JSONDecoder(parse_int=_integer)
    index = _skip(text, 1 if text.startswith("\ufeff") else 0) + 1
    counted, byte = 0, 0

    def byte_of(character: int) -> int:
        nonlocal counted, byte
        byte += len(_bytes(text[counted:character]))
        counted = character
        return byte

    position = 0
    index = _skip(text, index)
    while index < len(text):
        if text[index] == "]":
            rest = _skip(text, index + 1)
            if rest < len(text):
                yield Break(file.path, byte_of(rest), position, "there is text after the end of the array")
            return
        start = byte_of(index)
        value, end, reason = _decode_value(decoder, text, index)
        if reason:
            yield Break(file.path, start, position, reason)
            return
        following = _skip(text, end)
        if following >= len(text) and not _self_delimiting(text[end - 1]):
            # `[1, 23` may be a cut-off `[1, 234`: only a bracket or a quote proves that the last value is whole.
            yield Break(file.path, start, position, "the file ends inside a value")
            return
        yield _record(file, position, start, value, text[index:end])
        position += 1
        if following < len(text) and text[following] == ",":
            index = _skip(text, following + 1)
        elif following < len(text) and text[following] != "]":
            yield Break(file.path, byte_of(following), position, f"expected ',' or ']', found {text[following]!r}")
            return
        else:
            index = following
    yield Break(file.path, byte_of(len(text)), position, "the file ends before the array does")


def _record(file: TraceFile, position: int, byte: int, value: Any, raw: str) -> RawRecord | Malformed:
    bad = None if file.is_utf8 else _NOT_UTF8.search(raw)
    if bad is None:
        return RawRecord(file.path, position, byte, value, raw)
    place = byte + len(_bytes(raw[: bad.start()]))
    return Malformed(file.path, position, byte, "not_utf8", f"byte {place:,} of the file is not UTF-8", _storable(raw))


def _decode_value(decoder: json.JSONDecoder, text: str, index: int) -> tuple[Any, int, str]:
    try:
        value, end = decoder.raw_decode(text, index)
    except json.JSONDecodeError as error:
        return None, index, f"{error.msg} at line {error.lineno}, column {error.colno}"
    except ValueError as error:
        return None, index, str(error)
    except RecursionError:
        return None, index, "nested too deeply"
    return value, end, ""


def _lines(file: TraceFile) -> Iterator[RawRecord | Malformed | Break]:
    """Records of JSON Lines. A bad line in the middle is one malformed record; a bad last line without its newline is a
    break.
    """
    decoder, byte, position = json.JSONDecoder(parse_int=_integer), 0, 0
    lines = file.text.split("\n")
    for number, line in enumerate(lines):
        start, byte = byte, byte + len(_bytes(line)) + 1
        content = line.strip("\ufeff" + _SPACE)
        if not content:
            continue
        value, end, reason = _decode_value(decoder, content, 0)
        if not reason and end != len(content):
            reason = "there is text after the object"
        if not reason:
            yield _record(file, position, start, value, content)
        elif number == len(lines) - 1:
            yield Break(file.path, start, position, reason)
        else:
            yield Malformed(file.path, position, start, "not_json", f"line {number + 1}: {reason}", _storable(content))
        position += 1


def _storable(raw: str) -> str:
    """Raw text with every byte that is not UTF-8 as \\xNN: the quarantine is a UTF-8 file."""
    return _bytes(raw).decode("utf-8", "backslashreplace")


def _integer(digits: str) -> int | float:
    """Python refuses to convert more than 4,300 digits. As a float such a number is infinite, and its field is refused
    like any other bad value.
    """
    return int(digits) if len(digits) <= 4300 else float(digits)


def _skip(text: str, index: int) -> int:
    while index < len(text) and text[index] in _SPACE:
        index += 1
    return index


def _self_delimiting(last: str) -> bool:
    return last in '}]"'
