"""One JSON value out of bytes: what `json.loads` makes of them, faster; and of bytes that are none, what is wrong.

msgspec reads what most files hold. What it refuses (NaN, half of a surrogate pair, a float beyond the largest) the
standard library decides about, so that the meaning is the standard library's throughout.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import msgspec

RECORD_LIMIT = 16 * 2**20
"""Bytes of the largest record that is read. A larger one is quarantined: it is no trace, and memory stays bounded."""

SHOWN = 4096
"""Bytes of raw text that the quarantine keeps of a record over the limit."""

SPACE = b" \t\r\n"
BOM = b"\xef\xbb\xbf"

fast_decode = msgspec.json.Decoder().decode
FAST_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)

_ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,4})?\Z")
_NUMBER_BEGUN = re.compile(r"(?<=[0-9])(?:\.|[eE][+-]?)\Z")
_LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")


@dataclass(frozen=True)
class Flaw:
    """What is wrong with a value.

    Attributes:
        reason: a word for the funnel: not_json, not_utf8.
        message: a sentence, without a place.
        index: byte of the value at which it shows.
        unfinished: whether more bytes could make it whole.
    """

    reason: str
    message: str
    index: int
    unfinished: bool = False


def decode(data: bytes) -> tuple[Any, Flaw | None]:
    """The value that `data` is, all of it, or its flaw."""
    try:
        return fast_decode(data), None
    except FAST_ERRORS:
        value, end, flaw = decode_first(data)
    if flaw is None and data[end:].strip(SPACE):
        return None, Flaw("not_json", "there is text after the object", end)
    return value, flaw


def decode_first(data: bytes) -> tuple[Any, int, Flaw | None]:
    """The value that `data` begins with (no space before it), and the index of the byte after it; or its flaw.

    A flaw is `unfinished` exactly when `data` is the beginning of some JSON value.
    """
    text = data.decode("utf-8", "surrogateescape")
    try:
        value, end = _decoder.raw_decode(text)
    except json.JSONDecodeError as error:
        message, index = error.msg.removesuffix(" at"), _bytes(text[: error.pos])
        return None, 0, Flaw("not_json", message, index, _unfinished(text, error))
    except ValueError as error:
        return None, 0, Flaw("not_json", str(error), 0)
    except RecursionError:
        return None, 0, Flaw("not_json", "nested too deeply", 0)
    try:
        return value, len(text[:end].encode("utf-8")), None
    except UnicodeEncodeError as error:
        index = _bytes(text[: error.start])
        return None, _bytes(text[:end]), Flaw("not_utf8", "is not UTF-8", index)


def storable(data: bytes) -> str:
    """Raw text with every byte that is not UTF-8 as \\xNN: the quarantine is a UTF-8 file."""
    return data.decode("utf-8", "backslashreplace")


def _integer(digits: str) -> int | float:
    """Python refuses to convert more than 4,300 digits. As a float such a number is infinite, and its field is refused
    like any other bad value.
    """
    return int(digits) if len(digits) <= 4300 else float(digits)


_decoder = json.JSONDecoder(parse_int=_integer)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def _unfinished(text: str, error: json.JSONDecodeError) -> bool:
    if error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip(" \t\r\n")):
        return True
    if "escape" in error.msg:
        begun = _ESCAPE_BEGUN.search(text, max(0, len(text) - 6))
        return begun is not None and begun.start() >= error.pos - 2
    rest = text[error.pos :]
    if error.msg == "Expecting value":
        return any(word.startswith(rest) for word in _LITERALS)
    return _NUMBER_BEGUN.match(text, error.pos) is not None
