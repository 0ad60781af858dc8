"""What a trace is: the canonical record, and how a raw JSON record becomes one or is refused with a reason.

A missing result is no malformation (real files hold traces that were never judged); a value of the wrong type is.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from triton_sft_pipeline.files import hash_json
from triton_sft_pipeline.problems import fingerprint

REASONING_FIELDS = ("model_reasoning", "reasoning", "thinking")
"""Where the reasoning is looked for, best first: the model's own chain of thought before the explanation inside its
answer.
"""


@dataclass(frozen=True)
class RawRecord:
    """One record as it stood in a file.

    Attributes:
        file: path as the user named it.
        position: 0-based index of the record in the file.
        byte: offset of its first byte.
        value: the parsed JSON value.
        raw: the text of the record.
    """

    file: str
    position: int
    byte: int
    value: Any
    raw: str


@dataclass(frozen=True)
class Malformed:
    """A record that is no trace: where it stood, why, and what it said."""

    file: str
    position: int
    byte: int
    reason: str
    detail: str
    raw: str


@dataclass(frozen=True)
class Trace:
    """A canonical record. None stands for what the file did not say.

    Attributes:
        reasoning_field: which field the reasoning was taken from.
        has_result: whether the trace was ever judged; without it the label fields are None.
        problem: fingerprint of the PyTorch module (see `problems.fingerprint`): what split and decontamination go by.
        speedup: reference time / kernel time, as labelled.
        file, position: where it stood when it was read.
    """

    sample_key: str
    source: str | None
    level: int | None
    name: str | None
    problem_id: int | None
    pytorch_code: str
    reasoning: str | None
    reasoning_field: str | None
    triton_code: str
    has_result: bool
    correctness: bool | None
    fast_0: bool | None
    fast_1: bool | None
    fast_2: bool | None
    speedup: float | None
    error: str | None
    timestamp: str | None
    problem: str
    file: str
    position: int

    @property
    def version(self) -> str:
        """Hash of all that was said, not of where it stood: a record inserted above it in the file changes nothing."""
        content = asdict(self)
        del content["file"], content["position"]
        return hash_json(content)


class _Wrong(Exception):
    """A field that keeps a record from being a trace: reason (a word for the funnel) and detail (a sentence)."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def parse_record(record: RawRecord) -> Trace | Malformed:
    """The canonical trace of a raw record, or why there is none."""
    try:
        return _parse(record)
    except _Wrong as wrong:
        return Malformed(record.file, record.position, record.byte, wrong.reason, str(wrong), record.raw)


def reasoning_of(record: dict[str, Any]) -> tuple[str | None, str | None]:
    """The reasoning of a raw record and the field it stood in: model_reasoning, else reasoning, else thinking."""
    for field in REASONING_FIELDS:
        value = record.get(field)
        if isinstance(value, str) and value.strip():
            return value, field
    return None, None


def _parse(record: RawRecord) -> Trace:
    value = record.value
    if not isinstance(value, dict):
        raise _Wrong("not_an_object", f"the record is {_kind(value)}, expected an object")
    code = _text(value, "pytorch_code", required=True)
    kernel = _text(value, "triton_code", required=True)
    for name in REASONING_FIELDS:
        _text(value, name)
    reasoning, field = reasoning_of(value)
    result = value.get("result")
    if result is not None and not isinstance(result, dict):
        raise _Wrong("wrong_type", f"result is {_kind(result)}, expected an object or null")
    return Trace(
        sample_key=_text(value, "sample_key") or _unnamed(code or "", kernel or ""),
        source=_text(value, "source"),
        level=_integer(value, "level"),
        name=_text(value, "name"),
        problem_id=_integer(value, "problem_id"),
        pytorch_code=code or "",
        reasoning=reasoning,
        reasoning_field=field,
        triton_code=kernel or "",
        has_result=result is not None,
        timestamp=_text(value, "timestamp"),
        problem=fingerprint(code or ""),
        file=record.file,
        position=record.position,
        **_labels(result),
    )


def _unnamed(code: str, kernel: str) -> str:
    """A name for a trace without one. It follows what the trace holds, not where it stands: the name is part of the
    version.
    """
    return f"unnamed_{hash_json([code, kernel])[:12]}"


def _labels(result: dict[str, Any] | None) -> dict[str, Any]:
    if result is None:
        return dict.fromkeys(("correctness", "fast_0", "fast_1", "fast_2", "speedup", "error"))
    correctness = _flag(result, "correctness")
    if correctness is None:
        raise _Wrong("missing_field", "result.correctness is missing")
    speedup = _number(result, "speedup")
    fast_0, fast_1, fast_2 = (_flag(result, name) for name in ("fast_0", "fast_1", "fast_2"))
    return {
        "correctness": correctness,
        # Older results carry no flags. What they mean is fixed: fast_0 is correctness, fast_1 a speedup above 1, fast_2
        # one of at least 2.
        "fast_0": correctness if fast_0 is None else fast_0,
        "fast_1": (correctness and (speedup or 0) > 1.0) if fast_1 is None else fast_1,
        "fast_2": (correctness and (speedup or 0) >= 2.0) if fast_2 is None else fast_2,
        "speedup": speedup,
        "error": _text(result, "error", prefix="result."),
    }


def _text(value: dict[str, Any], name: str, required: bool = False, prefix: str = "") -> str | None:
    found = value.get(name)
    if found is None:
        if required:
            raise _Wrong("missing_field", f"{prefix}{name} is missing")
        return None
    if not isinstance(found, str):
        raise _Wrong("wrong_type", f"{prefix}{name} is {_kind(found)}, expected text")
    if required and not found.strip():
        raise _Wrong("missing_field", f"{prefix}{name} is empty")
    try:
        found.encode("utf-8")
    except UnicodeEncodeError:
        raise _Wrong("bad_text", f"{prefix}{name} holds half of a surrogate pair, which no file can store") from None
    return found


def _flag(value: dict[str, Any], name: str) -> bool | None:
    found = value.get(name)
    if found is None or isinstance(found, bool):
        return found
    raise _Wrong("wrong_type", f"result.{name} is {_kind(found)}, expected true or false")


def _number(value: dict[str, Any], name: str) -> float | None:
    found = value.get(name)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise _Wrong("wrong_type", f"result.{name} is {_kind(found)}, expected a number")
    try:
        number = float(found)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _Wrong("wrong_type", f"result.{name} is not a finite number")
    return number


def _integer(value: dict[str, Any], name: str) -> int | None:
    found = value.get(name)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int) or not -(2**63) <= found < 2**63:
        raise _Wrong("wrong_type", f"{name} is {_kind(found)}, expected a 64-bit integer")
    return found


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "an array", dict: "an object"}
    return names.get(type(value), type(value).__name__)
