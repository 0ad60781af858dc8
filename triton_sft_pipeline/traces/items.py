"""What reading a trace file gives: records, what is malformed, and a break where the file stops being readable."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from triton_sft_pipeline.traces.record import Malformed, RawRecord


@dataclass(frozen=True)
class Break:
    """Where a file stopped being readable: everything before is kept, nothing after.

    Attributes:
        byte: offset of the first byte that could not be read as part of a whole record; of a compressed file, in the
            text that it holds.
        position: index that the broken record would have had.
    """

    file: str
    byte: int
    position: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: breaks off at byte {self.byte:,}, in record {self.position}: {self.reason}"


class ReadRecord(RawRecord):
    """A raw record whose text is decoded when somebody asks for it: few do, and where it is not ASCII that takes half
    as long as parsing.
    """

    def __init__(self, file: str, position: int, byte: int, value: Any, data: bytes) -> None:
        # A frozen class guards its attributes, not its dictionary.
        self.__dict__.update(file=file, position=position, byte=byte, value=value, _data=data)

    @cached_property
    def raw(self) -> str:  # type: ignore[override]
        return self.__dict__["_data"].decode()


Item = RawRecord | Malformed | Break
