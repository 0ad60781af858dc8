"""How the records of one JSON array are written: what stands between them, and what only a record begins with.

In a pretty-printed file the line ends and the indentation tell a record's beginning from anything inside one, for no
string of JSON holds a bare line end. Elsewhere the first key does: inside a string its quotes would be escaped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FIRST_KEY = re.compile(rb'\{([ \t\r\n]*)("(?:[^"\\]|\\.){0,200}")[ \t\r\n]*:', re.DOTALL)
_MOST_KEYS = 16


@dataclass(frozen=True)
class Separator:
    """What stands between two records: the end of one, the gap, the beginning of the next.

    Attributes:
        text: all three.
        closing: how many of its bytes belong to the record that ends.
        skipped: how many bytes come before the next record.
    """

    text: bytes
    closing: int
    skipped: int


class Shape:
    """What was learned so far of the way in which a file's records are written.

    Attributes:
        separator: what stood between the last two records; None when nothing stood there that can be told apart.
        opening: matches where a record seems to begin; the match ends at its brace.
        unmistakable: matches nothing but a record's beginning; None where there is no such thing.
    """

    def __init__(self) -> None:
        self.separator: Separator | None = None
        self.opening: re.Pattern[bytes] | None = None
        self.unmistakable: re.Pattern[bytes] | None = None
        self._keys: list[bytes] = []
        self._pretty: bytes | None = None

    def learn(self, record: bytes, gap: bytes, following: bytes) -> None:
        """Learn from a whole record, the gap after it and the first bytes of what follows."""
        self.learn_beginning(record)
        self.separator = None
        first = _FIRST_KEY.match(following)
        if first is None or not record.endswith(b"}"):
            return
        self.learn_beginning(following)
        last_line = record[record.rfind(b"\n") + 1 :]
        closing, beginning = b"}", first[0]
        if _is_pretty(record, last_line, gap, first[1]):
            closing, beginning = b"\n" + last_line, following[: first.start(2) + 1]
            self._set_pretty(gap[gap.rindex(b"\n") :] + beginning)
        self.separator = Separator(closing + gap + beginning, len(closing), len(closing) + len(gap))

    def learn_beginning(self, record: bytes) -> None:
        """Learn the first key of a record, though the record itself may be damaged."""
        first = _FIRST_KEY.match(record)
        if first and first[2] not in self._keys and len(self._keys) < _MOST_KEYS:
            self._keys.append(first[2])
            self._compile()

    def _set_pretty(self, beginning: bytes) -> None:
        if beginning != self._pretty:
            self._pretty = beginning
            self._compile()

    def _compile(self) -> None:
        keys = b"(?:" + b"|".join(re.escape(key) for key in self._keys) + rb")[ \t]*:"
        if self._pretty is None:
            self.opening = re.compile(rb"(?=\{[ \t\r\n]*" + keys + b")")
            return
        pretty = b"(?=" + re.escape(self._pretty) + rb")\n[ \t]*"
        self.unmistakable = re.compile(pretty)
        # A record that somebody appended in one line: in a pretty-printed one no key stands directly behind a brace.
        self.opening = re.compile(pretty + rb"|(?=\{" + keys + b")")


def _is_pretty(record: bytes, last_line: bytes, gap: bytes, indentation: bytes) -> bool:
    """Whether the record's braces stand on lines of their own, less indented than its keys."""
    closing_indentation = len(last_line) - 1
    return (
        b"\n" in record
        and b"\n" in gap
        and b"\n" in indentation
        and not last_line[:-1].strip(b" \t")
        and len(indentation.rpartition(b"\n")[2]) > closing_indentation
    )
