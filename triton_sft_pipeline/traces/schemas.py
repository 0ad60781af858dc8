"""The shapes that records come in, and how a field is read or refused.

A record is either one attempt (its kernel in `triton_code`, its labels in `result`) or a conversation of several (its
kernels in `turns` and `final_triton_code`, its labels in each turn's `result` and in `final_result`). Knows nothing of
which attempt is best, nor of what is worth training on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REASONING_FIELDS = ("model_reasoning", "reasoning", "thinking")
"""Where the reasoning is looked for, best first: the model's own chain of thought before the explanation inside its
answer.
"""

LAUNCH_BOUND_MS = 0.05
"""A reference below this takes less time than its launch, as the judge has it; its speedup says little."""


LONGEST_CODE = 200_000
"""Characters. Longer code, ten times what a model writes, is not parsed: a syntax tree is a hundred times its text."""


class Wrong(Exception):
    """A field that keeps a record from being a trace: reason (a word for the funnel) and detail (a sentence)."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Labels:
    """What a result says. All None when there is none.

    Attributes:
        given: whether there was a result that says if the kernel is correct.
    """

    given: bool = False
    correctness: bool | None = None
    fast_0: bool | None = None
    fast_1: bool | None = None
    fast_2: bool | None = None
    speedup: float | None = None
    error: str | None = None
    launch_bound: bool | None = None
    speedup_low: float | None = None


@dataclass(frozen=True)
class Attempt:
    """One try at a kernel: a record of one attempt, a turn, or the final code of a conversation.

    Attributes:
        code: the kernel where the attempt names it, or None; a completion may still hold it.
        code_field: the field that the code stood in.
        fields: what may hold reasoning and completion.
        turn: from 1, in a conversation.
    """

    code: str | None
    code_field: str
    labels: Labels
    fields: Mapping[str, Any]
    turn: int | None = None


def is_conversation(record: Mapping[str, Any]) -> bool:
    """Whether a record holds several turns: a `triton_code` of its own makes it a single attempt."""
    return "triton_code" not in record and ("turns" in record or "final_triton_code" in record)


def single_attempt(record: Mapping[str, Any]) -> Attempt:
    """The attempt of a record that is no conversation."""
    labels = labels_of(_object(record, "result"), "result.")
    return Attempt(text(record, "triton_code"), "triton_code", labels, record)


def attempts(record: Mapping[str, Any]) -> list[Attempt]:
    """Every attempt of a conversation, oldest first; the final code is one of its own when no turn wrote it.

    Raises:
        Wrong: a field is of the wrong type.
    """
    turns = record.get("turns")
    if turns is None:
        turns = []
    if not isinstance(turns, list):
        raise Wrong("wrong_type", f"turns is {kind(turns)}, expected an array")
    found = [_turn(turn, number) for number, turn in enumerate(turns, 1)]
    final = text(record, "final_triton_code")
    labels = labels_of(_object(record, "final_result"), "final_result.", strict=False)
    if not found or (is_code(final) and all((final or "").strip() != (a.code or "").strip() for a in found)):
        found.append(Attempt(final, "final_triton_code", labels, record))
    return found


def _turn(turn: Any, number: int) -> Attempt:
    prefix = f"turns[{number - 1}]."
    if not isinstance(turn, dict):
        raise Wrong("wrong_type", f"{prefix[:-1]} is {kind(turn)}, expected an object")
    for name in REASONING_FIELDS:
        text(turn, name, prefix=prefix)
    code = text(turn, "triton_code", prefix=prefix)
    # A turn that was never judged does not spoil the others.
    labels = labels_of(_object(turn, "result", prefix), f"{prefix}result.", strict=False)
    return Attempt(code, f"turn {number}", labels, turn, number)


def labels_of(result: Mapping[str, Any] | None, prefix: str, strict: bool = True) -> Labels:
    """The labels of a result; flags that it leaves out are filled in from what they mean.

    Args:
        strict: a result that does not say whether the kernel is correct is malformed, not merely no label.

    Raises:
        Wrong: a label is of the wrong type, or correctness is missing.
    """
    if result is None:
        return Labels()
    correctness = _flag(result, "correctness", prefix)
    if correctness is None:
        if strict:
            raise Wrong("missing_field", f"{prefix}correctness is missing")
        return Labels()
    speedup = _number(result, "speedup", prefix)
    fast_0, fast_1, fast_2 = (_flag(result, name, prefix) for name in ("fast_0", "fast_1", "fast_2"))
    # Older results carry no flags. What they mean is fixed: fast_0 is correctness, fast_1 a speedup above 1, fast_2 one
    # of at least 2.
    return Labels(
        given=True,
        correctness=correctness,
        fast_0=correctness if fast_0 is None else fast_0,
        fast_1=(correctness and (speedup or 0) > 1.0) if fast_1 is None else fast_1,
        fast_2=(correctness and (speedup or 0) >= 2.0) if fast_2 is None else fast_2,
        speedup=speedup,
        error=text(result, "error", prefix=prefix),
        launch_bound=_launch_bound(result),
        speedup_low=_measured(result.get("speedup_low")),
    )


def is_code(code: str | None) -> bool:
    """Whether this is code at all: not empty, and not the `...` that stands for code in an explanation."""
    return bool(code) and (code or "").strip(" \t\r\n.\u2026`") != ""


def text(record: Mapping[str, Any], name: str, required: bool = False, prefix: str = "") -> str | None:
    """A field that holds text or nothing.

    Raises:
        Wrong: it is of another type, cannot be stored, or is required and missing or blank.
    """
    found = record.get(name)
    if found is None:
        if required:
            raise Wrong("missing_field", f"{prefix}{name} is missing")
        return None
    if not isinstance(found, str):
        raise Wrong("wrong_type", f"{prefix}{name} is {kind(found)}, expected text")
    if required and not found.strip():
        raise Wrong("missing_field", f"{prefix}{name} is empty")
    return storable(found, f"{prefix}{name}")


def storable(found: str, name: str) -> str:
    """The text itself.

    Raises:
        Wrong: UTF-8 cannot hold it.
    """
    try:
        found.encode("utf-8")
    except UnicodeEncodeError:
        raise Wrong("bad_text", f"{name} holds half of a surrogate pair, which no file can store") from None
    return found


def integer(record: Mapping[str, Any], name: str) -> int | None:
    """A field that holds a 64-bit integer or nothing.

    Raises:
        Wrong: it holds anything else.
    """
    found = record.get(name)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int) or not -(2**63) <= found < 2**63:
        raise Wrong("wrong_type", f"{name} is {kind(found)}, expected a 64-bit integer")
    return found


def kind(value: Any) -> str:
    """A JSON value's type in words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "an array", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _object(record: Mapping[str, Any], name: str, prefix: str = "") -> dict[str, Any] | None:
    found = record.get(name)
    if found is not None and not isinstance(found, dict):
        raise Wrong("wrong_type", f"{prefix}{name} is {kind(found)}, expected an object or null")
    return found


def _flag(record: Mapping[str, Any], name: str, prefix: str) -> bool | None:
    found = record.get(name)
    if found is None or isinstance(found, bool):
        return found
    raise Wrong("wrong_type", f"{prefix}{name} is {kind(found)}, expected true or false")


def _number(record: Mapping[str, Any], name: str, prefix: str) -> float | None:
    found = record.get(name)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise Wrong("wrong_type", f"{prefix}{name} is {kind(found)}, expected a number")
    number = _measured(found)
    if number is None:
        raise Wrong("wrong_type", f"{prefix}{name} is not a finite number")
    return number


def _measured(found: Any) -> float | None:
    """A finite number, or None: what is said beside the labels is no reason to refuse them."""
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    try:
        number = float(found)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _launch_bound(result: Mapping[str, Any]) -> bool | None:
    said = result.get("launch_bound")
    if isinstance(said, bool):
        return said
    reference = _measured(result.get("reference_time_ms"))
    return None if reference is None else reference < LAUNCH_BOUND_MS
