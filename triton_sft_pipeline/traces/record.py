"""What a trace is: the canonical record, and how a raw JSON record becomes one or is refused with a reason.

A missing kernel or result is no malformation (real files hold attempts that failed or were never judged); a value of
the wrong type is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from triton_sft_pipeline.files import hash_json, sha256_bytes
from triton_sft_pipeline.problems import fingerprint
from triton_sft_pipeline.traces.reasoning import kernel_of, reasoning_of
from triton_sft_pipeline.traces.schemas import (
    LONGEST_CODE,
    REASONING_FIELDS,
    Attempt,
    Wrong,
    attempts,
    integer,
    is_conversation,
    kind,
    single_attempt,
    storable,
    text,
)
from triton_sft_pipeline.traces.turns import best_attempt, conversation_to


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


# Modules up to this many characters are remembered with their fingerprints.
_SHORT = 16_384
# Where it stood, and what was read of the measurement beside the labels only later: not what a trace is.
_BESIDE = ("file", "position", "kernel_field", "launch_bound", "speedup_low")
# Fields that older traces do not have.
_ADDED = ("turn", "num_turns", "messages")


@dataclass(frozen=True)
class Trace:
    """A canonical record. None stands for what the file did not say.

    Attributes:
        reasoning_field: which field the reasoning was taken from.
        has_result: whether the trace was ever judged; without it the label fields are None.
        problem: fingerprint of the PyTorch module (see `problems.fingerprint`): what split and decontamination go by.
        speedup: reference time / kernel time, as labelled.
        file, position: where it stood when it was read.
        kernel_field: where the code was found: "triton_code", "final_triton_code", "turn 2", "completion <triton>" or
            "completion fence"; None when there is none, and then `triton_code` is empty.
        turn, num_turns: of a conversation, the turn (from 1) that the trace was made of, and how many there were.
        messages: the conversation up to that turn's answer, as JSON: [{"role", "content"}, ...]; see `conversation`.
        launch_bound: the reference is so short that launching it outweighs what it computes.
        speedup_low: lower end of the speedup's confidence interval.
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
    kernel_field: str | None = None
    turn: int | None = None
    num_turns: int | None = None
    messages: str | None = None
    launch_bound: bool | None = None
    speedup_low: float | None = None

    @property
    def version(self) -> str:
        """Hash of all that was said, not of where it stood: a record inserted above it in the file changes nothing.

        A trace keeps its version when fields are added to this class: a new one counts only where it says something.
        """
        content = {k: v for k, v in vars(self).items() if k not in _BESIDE and not (k in _ADDED and v is None)}
        return hash_json(content)

    @property
    def conversation(self) -> list[dict[str, str]] | None:
        """The messages from the first to the best turn's answer; None when it was no conversation."""
        found: list[dict[str, str]] | None = json.loads(self.messages) if self.messages else None
        return found


def parse_record(record: RawRecord, problem: str | None = None) -> Trace | Malformed:
    """The canonical trace of a raw record, or why there is none. A missing kernel, reasoning or result is no
    malformation: those are for the filter to judge.

    Args:
        problem: the fingerprint of its module when it is known already.
    """
    try:
        return _parse(record, problem)
    except Wrong as wrong:
        return Malformed(record.file, record.position, record.byte, wrong.reason, str(wrong), record.raw)


def _parse(record: RawRecord, problem: str | None) -> Trace:
    value = record.value
    if not isinstance(value, dict):
        raise Wrong("not_an_object", f"the record is {kind(value)}, expected an object")
    code = text(value, "pytorch_code", required=True) or ""
    for name in REASONING_FIELDS:
        text(value, name)
    conversation = _conversation(value) if is_conversation(value) else _Conversation(single_attempt(value))
    attempt, labels = conversation.best, conversation.best.labels
    kernel, kernel_field = kernel_of(attempt)
    reasoning, reasoning_field = reasoning_of(attempt.fields)
    return Trace(
        sample_key=text(value, "sample_key") or _unnamed(code, kernel),
        source=text(value, "source"),
        level=integer(value, "level"),
        name=text(value, "name"),
        problem_id=integer(value, "problem_id"),
        pytorch_code=code,
        reasoning=storable(reasoning, reasoning_field or "") if reasoning else None,
        reasoning_field=reasoning_field,
        triton_code=storable(kernel, kernel_field or ""),
        has_result=labels.given,
        correctness=labels.correctness,
        fast_0=labels.fast_0,
        fast_1=labels.fast_1,
        fast_2=labels.fast_2,
        speedup=labels.speedup,
        error=labels.error,
        timestamp=text(value, "timestamp"),
        problem=problem or _problem_of(code),
        file=record.file,
        position=record.position,
        kernel_field=kernel_field,
        turn=attempt.turn,
        num_turns=conversation.num_turns,
        messages=conversation.messages,
        launch_bound=labels.launch_bound,
        speedup_low=labels.speedup_low,
    )


@dataclass(frozen=True)
class _Conversation:
    best: Attempt
    num_turns: int | None = None
    messages: str | None = None


def _conversation(value: dict[str, Any]) -> _Conversation:
    declared = integer(value, "num_turns")
    best = best_attempt(attempts(value))
    num_turns = len(value.get("turns") or []) or declared
    said = conversation_to(value, best.turn) if best.turn else None
    return _Conversation(best, num_turns, json.dumps(said, ensure_ascii=False) if said else None)


def _problem_of(code: str) -> str:
    """Traces of one problem often stand together, and a fingerprint costs more than all the rest of a record."""
    if len(code) > LONGEST_CODE:
        return sha256_bytes(code.encode())
    return _remembered(code) if len(code) <= _SHORT else fingerprint(code)


_remembered = lru_cache(maxsize=2048)(fingerprint)


def _unnamed(code: str, kernel: str) -> str:
    """A name for a trace without one. It follows what the trace holds, not where it stands: the name is part of the
    version.
    """
    return f"unnamed_{hash_json([code, kernel])[:12]}"
