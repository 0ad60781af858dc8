"""Records of JSON Lines, one at a time. Knows nothing of files or of what a record should hold."""

from __future__ import annotations

from collections.abc import Iterator

from triton_sft_pipeline.traces.items import Break, Item, ReadRecord
from triton_sft_pipeline.traces.record import Malformed
from triton_sft_pipeline.traces.streams import Window
from triton_sft_pipeline.traces.values import (
    BOM,
    FAST_ERRORS,
    RECORD_LIMIT,
    SHOWN,
    SPACE,
    decode,
    fast_decode,
    storable,
)


def line_records(name: str, window: Window) -> Iterator[Item]:
    """Every line that is not empty, in order.

    A bad line in the middle is one malformed record; a bad last line without its line end is a `Break`.

    Args:
        name: what the records carry as their file.
    """
    position = 0
    for number, (at, line, whole) in enumerate(_lines(window), 1):
        content = line.strip(SPACE)
        try:
            item: Item = ReadRecord(name, position, at + line.index(content), fast_decode(content), content)
        except FAST_ERRORS:
            content = line.strip(SPACE + BOM)
            if not content:
                continue
            item = _careful(name, position, at + line.index(content), content, number, whole)
        yield item
        position += 1


def _careful(name: str, position: int, at: int, content: bytes, number: int, whole: bool) -> Item:
    """What a line is that the fast parser refused."""
    if len(content) > RECORD_LIMIT:
        message = f"line {number:,}: the record is larger than {RECORD_LIMIT / 2**20:g} MiB"
        return Malformed(name, position, at, "too_large", message, storable(content[:SHOWN]))
    value, flaw = decode(content)
    if flaw is None:
        return ReadRecord(name, position, at, value, content)
    if flaw.reason == "not_utf8":
        message = f"byte {at + flaw.index:,} of the file is not UTF-8"
        return Malformed(name, position, at, "not_utf8", message, storable(content))
    message = f"line {number:,}: {flaw.message}"
    return (
        Malformed(name, position, at, "not_json", message, storable(content))
        if whole
        else Break(name, at, position, message)
    )


def _lines(window: Window) -> Iterator[tuple[int, bytes, bool]]:
    """Offset, bytes and whether its end was there, of every line. Of one over the limit only so much is handed on as
    shows that it is.
    """
    at = 0
    while True:
        data, base = window.data, window.base
        index = at - base
        found = data.find(b"\n", index)
        while found >= 0:
            line = data[index:found]
            yield base + index, line, True
            index = found + 1
            found = data.find(b"\n", index)
        at = base + index
        if len(data) - index > RECORD_LIMIT:
            yield at, data[index : index + RECORD_LIMIT + 1], True
            end = _after_line(window)
            if end is None:
                return
            at = end
        elif not window.advance(at):
            if index < len(data):
                yield at, data[index:], False
            return


def _after_line(window: Window) -> int | None:
    """Offset of the line after the one that the window is in; None when there is none."""
    while window.advance(window.end):
        found = window.data.find(b"\n")
        if found >= 0:
            return window.base + found + 1
    return None
