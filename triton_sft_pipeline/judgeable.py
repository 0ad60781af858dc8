"""The kernels of traces that can be judged, each with the identity that its verdict is known by; and what cannot be.

A kernel is known by its file, its position and a hash of what is judged, because keys repeat in real files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_sft_pipeline.files import hash_json
from triton_sft_pipeline.traces.items import Break
from triton_sft_pipeline.traces.reader import open_traces
from triton_sft_pipeline.traces.record import Malformed, RawRecord
from triton_sft_pipeline.traces.sources import resolve
from triton_sft_pipeline.verification import JudgeItem

_ASKED = ("sample_key", "pytorch_code", "result", "final_result")


@dataclass(frozen=True)
class Judgeable:
    """A kernel that can be judged: it needs pytorch_code and its own code, nothing else.

    Attributes:
        record: where it stands, and of its value what is asked here: its keys, its module and its labels.
        identity: content hash, position and file; what its verdict is known by.
        code: the kernel; empty when the record has none.
        turn: which turn of a conversation wrote it, from 1; None for a record's one kernel, or its final one.
    """

    record: RawRecord
    identity: str
    code: str
    turn: int | None = None

    @property
    def item(self) -> JudgeItem:
        """What the judge is given; the verdict comes back under the identity."""
        return JudgeItem(key=self.identity, pytorch_code=self.record.value["pytorch_code"], triton_code=self.code)

    @property
    def name(self) -> str:
        """What a person knows it by: its sample_key, or file and position."""
        key = self.record.value.get("sample_key") or f"{Path(self.record.file).name}, record {self.record.position}"
        return f"{key} turn {self.turn}" if self.turn else str(key)

    @property
    def label(self) -> bool | None:
        """Whether it is labelled correct; None without a label."""
        value = self.record.value
        holder = value if self.turn is None else value["turns"][self.turn - 1]
        result = holder.get("result", holder.get("final_result"))
        correctness = result.get("correctness") if isinstance(result, dict) else None
        return correctness if isinstance(correctness, bool) else None


@dataclass(frozen=True)
class Refused:
    """What cannot be judged: a sentence that names file, record and reason."""

    sentence: str


def read_judgeable(places: Sequence[Path]) -> list[Judgeable | Refused]:
    """Every kernel of the files, in order, as something to judge or as refused.

    Of a conversation (a record with `turns`) every turn with code is one, and so is a final kernel that no turn wrote.
    Codes and labels are kept, reasoning and completions are not: some kilobytes a kernel.

    Args:
        places: files, folders, patterns or datasets of the Hub; see `sources.resolve`.

    Raises:
        PipelineError: a place cannot be read.
    """
    found: list[Judgeable | Refused] = []
    for item in open_traces(resolve(places)):
        if isinstance(item, Break):
            found.append(Refused(str(item)))
        elif isinstance(item, Malformed):
            found.append(Refused(f"{item.file}, record {item.position}: {item.detail}"))
        elif why := _why_not(item.value):
            found.append(Refused(f"{item.file}, record {item.position}{_key_of(item.value)}: {why}"))
        else:
            found += _kernels(item)
    return found


def kernels_of(record: RawRecord) -> list[Judgeable]:
    """The kernels of a record, in order; none when it cannot be judged."""
    return [] if _why_not(record.value) else _kernels(record)


def is_conversation(value: dict[str, Any]) -> bool:
    """Whether the value of a record has a kernel for each of its turns, not one kernel."""
    return "triton_code" not in value and ("turns" in value or "final_triton_code" in value)


def _key_of(value: Any) -> str:
    """How a person finds the record in its file: the sample_key, when there is one that a line can show."""
    key = value.get("sample_key") if isinstance(value, dict) else None
    return f" ({key})" if isinstance(key, str) and 0 < len(key) <= 80 and key.isprintable() else ""


def _why_not(value: Any) -> str | None:
    """The reason why a record cannot be judged, or None."""
    if not isinstance(value, dict) or not isinstance(value.get("pytorch_code"), str):
        return "pytorch_code is missing or no text"
    turns = (value.get("turns") or []) if is_conversation(value) else []
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return "turns is no list of objects"
    codes = [value.get("triton_code"), value.get("final_triton_code"), *(turn.get("triton_code") for turn in turns)]
    return None if all(isinstance(code, str | None) for code in codes) else "triton_code is no text"


def _kernels(record: RawRecord) -> list[Judgeable]:
    value = record.value
    if not is_conversation(value):
        return [_judgeable(record, value.get("triton_code"))]
    codes = [turn.get("triton_code") or "" for turn in value.get("turns") or []]
    written = [_judgeable(record, code, turn) for turn, code in enumerate(codes, 1) if code.strip()]
    final = value.get("final_triton_code") or ""
    if not written or (final.strip() and final not in codes):
        written.append(_judgeable(record, final))
    return written


def _judgeable(record: RawRecord, code: str | None, turn: int | None = None) -> Judgeable:
    content = hash_json([record.value["pytorch_code"], code])[:16]
    place = f"{record.position}.{turn}" if turn else f"{record.position}"
    light = RawRecord(record.file, record.position, record.byte, _asked(record.value), "")
    return Judgeable(light, f"{content}@{place}@{record.file}", code or "", turn)


def _asked(value: dict[str, Any]) -> dict[str, Any]:
    """What is asked of a record's value once its kernels are known."""
    light: dict[str, Any] = {name: value[name] for name in _ASKED if name in value}
    if is_conversation(value):
        turns = value.get("turns") or []
        light["turns"] = [{name: turn[name] for name in ("result", "final_result") if name in turn} for turn in turns]
    return light
