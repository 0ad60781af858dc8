"""Records of a JSON array of any size, one at a time.

A record's end is guessed from what stood between the records before it, and the guess is proven by parsing what lies
between: a JSON object has only one end. Where the guess fails the standard library finds the end. After bytes that are
no JSON the reading goes on at the next place that looks like the beginning of a record, and what was skipped is told
with its text. Knows nothing of files or of what a record should hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from triton_sft_pipeline.traces.items import Break, Item, ReadRecord
from triton_sft_pipeline.traces.record import Malformed, RawRecord
from triton_sft_pipeline.traces.shape import Separator, Shape
from triton_sft_pipeline.traces.streams import Window
from triton_sft_pipeline.traces.values import (
    BOM,
    FAST_ERRORS,
    RECORD_LIMIT,
    SHOWN,
    Flaw,
    decode,
    decode_first,
    fast_decode,
    storable,
)

_LOOK_AHEAD = 2**20
"""How far the next separator is looked for before the standard library is asked for the end of a record."""
_FIRST_TRY = 64 * 2**10
_NEAR = 64 * 2**10
_OVERLAP = 4096

_SPACES = re.compile(rb"[ \t\r\n]*")
_GAP = re.compile(rb"[ \t\r\n,]*")
_SCALAR = re.compile(rb'[^\s,:"{}\[\]]*')
_SIMPLE = re.compile(rb'[^,:"{}\[\]]+(?=[,\]])')
_ANY_OPENING = re.compile(rb'(?=\{[ \t\r\n]*")')
_TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["{}\[\]]', re.DOTALL)


def array_records(name: str, window: Window) -> Iterator[Item]:
    """Every record of the array that `window` begins with, in order; a `Break`, when there is one, comes last.

    A comma too many or too few between records is overlooked. Arrays that follow one another, and records that were
    appended after the end of one, are read as one array.

    Args:
        name: what the records carry as their file.
        window: on a text whose first byte, but for space and a byte order mark, is `[`.
    """
    yield from _Array(name, window).records()


class _Array:
    """Where the reading stands: `at` is the offset of the first byte that no item has accounted for."""

    def __init__(self, name: str, window: Window) -> None:
        self.name = name
        self.window = window
        self.at = len(BOM) if window.get(0, len(BOM)) == BOM else 0
        self.position = 0
        self.open = False
        self.shape = Shape()

    def records(self) -> Iterator[Item]:
        while True:
            self._skip(_GAP if self.open else _SPACES)
            byte = self.window.get(self.at, 1)
            if not byte:
                if self.open:
                    yield self._break("the file ends before the array does")
                return
            if byte == b"]" and self.open:
                self.open = False
                self.at += 1
            elif byte in b"[," and not self.open:
                self.open = True
                self.at += 1
            elif byte != b"{" and not self.open:
                appended = self._after_the_end()
                yield appended
                if isinstance(appended, Break):
                    return
            else:
                self.open = True
                if byte == b"{" and self.shape.separator:
                    before = self.position
                    yield from self._run(self.shape.separator)
                    if self.position > before:
                        continue
                item = self._nested() if byte in b'{["' else self._scalar()
                yield item
                if isinstance(item, Break):
                    return

    def _run(self, separator: Separator) -> Iterator[RawRecord]:
        """Records as long as each ends at the next separator."""
        window, name, at, position = self.window, self.name, self.at, self.position
        text, closing, skipped = separator.text, separator.closing, separator.skipped
        data, base = window.data, window.base
        index = at - base
        while True:
            found = data.find(text, index, index + _LOOK_AHEAD)
            if found < 0:
                if len(data) - index >= _LOOK_AHEAD or not window.advance(base + index):
                    return
                data, base, index = window.data, window.base, 0
                continue
            raw = data[index : found + closing]
            try:
                value = fast_decode(raw)
            except FAST_ERRORS:
                return
            byte = base + index
            index = found + skipped
            # What was handed out is accounted for, even if nobody asks for more.
            self.at, self.position = base + index, position + 1
            yield ReadRecord(name, position, byte, value, raw)
            position += 1

    def _nested(self) -> Item:
        """The object, array or text at this place: it ends where the standard library says."""
        size = _FIRST_TRY
        while True:
            data = self.window.get(self.at, size)
            value, end, flaw = decode_first(data)
            if flaw is None or flaw.reason == "not_utf8":
                return self._whole(value, data[:end], flaw)
            if not flaw.unfinished:
                return self._damaged(flaw)
            if len(data) < size:
                return self._cut_off(flaw)
            if size >= RECORD_LIMIT:
                return self._too_large()
            size = min(size * 4, RECORD_LIMIT)

    def _scalar(self) -> Item:
        """The number or the word at this place."""
        size = 64
        while True:
            data = self.window.get(self.at, size)
            token = _SCALAR.match(data)[0]  # type: ignore[index]
            if len(token) < len(data):
                break
            if len(data) < size:
                return self._break("the file ends inside a value")
            if size >= RECORD_LIMIT:
                return self._too_large()
            size = min(size * 4, RECORD_LIMIT)
        value, flaw = decode(token)
        if flaw is None or flaw.reason == "not_utf8":
            return self._whole(value, token, flaw)
        return self._damaged(flaw)

    def _whole(self, value: Any, raw: bytes, flaw: Flaw | None) -> RawRecord | Malformed:
        byte, position = self._move(self.at + len(raw))
        following = self.window.get(self.at, _OVERLAP)
        gap = _GAP.match(following)[0]  # type: ignore[index]
        self.shape.learn(raw, gap, following[len(gap) :])
        if flaw is None:
            return ReadRecord(self.name, position, byte, value, raw)
        detail = f"byte {byte + flaw.index:,} of the file is not UTF-8"
        return Malformed(self.name, position, byte, "not_utf8", detail, storable(raw))

    def _damaged(self, flaw: Flaw) -> Malformed:
        """What cannot be JSON: up to its own closing bracket if that can be told, else up to the next record."""
        message = f"{flaw.message} at {self.window.place(self.at + flaw.index)}"
        head = self.window.get(self.at, _OVERLAP)
        self.shape.learn_beginning(head)
        simple = _SIMPLE.match(head)
        if simple:
            return self._skipped(self.at + simple.end(), "not_json", message, head)
        opening = self.shape.opening or _ANY_OPENING
        end = self._own_end(self.at + _NEAR)
        if end is None or opening.search(self.window.data, self.at + 1 - self.window.base, end - self.window.base):
            following = self._find(opening, self.at + 1)
            end = self._own_end(self.window.end if following is None else following)
            if end is None:
                end = self._end_of_text(head) if following is None else following
        return self._skipped(end, "not_json", message, head)

    def _cut_off(self, flaw: Flaw) -> Break | Malformed:
        """What the file ends in, unless records follow after all: then one bracket is missing."""
        if self.shape.unmistakable and self.shape.unmistakable.search(self.window.data, self.at + 1 - self.window.base):
            return self._damaged(flaw)
        return self._break(f"{flaw.message} at {self.window.place(self.at + flaw.index)}")

    def _too_large(self) -> Malformed:
        head = self.window.get(self.at, _OVERLAP)
        self.shape.learn_beginning(head)
        following = self._find(self.shape.unmistakable or self.shape.opening or _ANY_OPENING, self.at + 1)
        end = self._end_of_text(b"") if following is None else following
        message = f"the record is larger than {RECORD_LIMIT / 2**20:g} MiB"
        return self._skipped(end, "too_large", message, head)

    def _after_the_end(self) -> Break | Malformed:
        message, head, begin = "there is text after the end of the array", self.window.get(self.at, _OVERLAP), self.at
        following = self._find(self.shape.opening or _ANY_OPENING, self.at)
        if following is None:
            return Break(self.name, begin, self.position, message)
        self.open = True
        return self._skipped(following, "not_json", message, head)

    def _skipped(self, end: int, reason: str, message: str, head: bytes) -> Malformed:
        """Account for what lies before `end` as one malformed record."""
        if self.at < self.window.base or end - self.at > RECORD_LIMIT:
            raw = head[:SHOWN]
        else:
            raw = self.window.data[self.at - self.window.base : end - self.window.base].rstrip(b" \t\r\n,")
        byte, position = self._move(end)
        return Malformed(self.name, position, byte, reason, message, storable(raw))

    def _find(self, pattern: re.Pattern[bytes], start: int) -> int | None:
        """Where the next match at or after `start` ends. What lies between stays at hand up to the record limit."""
        window = self.window
        while True:
            match = pattern.search(window.data, start - window.base)
            if match:
                return window.base + match.end()
            start = max(start, window.end - _OVERLAP)
            if not window.advance(self.at if start - self.at <= RECORD_LIMIT else start):
                return None

    def _own_end(self, stop: int) -> int | None:
        """Where the brackets that open here are closed, if that is before `stop` and a record may end there."""
        window = self.window
        if self.at < window.base:
            return None
        depth = 0
        for token in _TOKENS.finditer(window.data, self.at - window.base, stop - window.base):
            text = token[0]
            if text == b'"':
                return None
            depth += 1 if text in b"{[" else -1 if text in b"}]" else 0
            if depth <= 0:
                after = _SPACES.match(window.data, token.end()).end()  # type: ignore[union-attr]
                return window.base + token.end() if window.data[after : after + 1] in b",]" else None
        return None

    def _end_of_text(self, head: bytes) -> int:
        """Where the damage ends that no record follows: before the array's own bracket, if that seems to be there."""
        text = self.window.data.rstrip(b" \t\r\n")
        bracket = text.endswith(b"]") and head[:1] not in (b"{", b"[", b'"')
        return self.window.base + len(text) - 1 if bracket else self.window.end

    def _skip(self, pattern: re.Pattern[bytes]) -> None:
        window = self.window
        while True:
            end = pattern.match(window.data, self.at - window.base).end()  # type: ignore[union-attr]
            self.at = window.base + end
            if end < len(window.data) or not window.advance(self.at):
                return

    def _move(self, end: int) -> tuple[int, int]:
        """Offset and position of the item that ends at `end`, which is now accounted for."""
        begin, position = self.at, self.position
        self.at, self.position = end, position + 1
        return begin, position

    def _break(self, reason: str) -> Break:
        return Break(self.name, self.at, self.position, reason)
