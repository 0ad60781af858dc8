"""Conversations: which turn is the best, and what was said up to its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from triton_sft_pipeline.traces.reasoning import (
    THINK_CLOSE,
    THINK_OPEN,
    TRITON_CLOSE,
    TRITON_OPEN,
    kernel_of,
    reasoning_of,
)
from triton_sft_pipeline.traces.schemas import Attempt, Wrong, is_code, kind, storable

Messages = list[dict[str, str]]

_ROLES = ("system", "developer", "user")


def best_attempt(attempts: Sequence[Attempt]) -> Attempt:
    """The attempt that a conversation is remembered for: one with code, then a correct one (and of those one whose
    label no error text contradicts), then the greatest speedup, then the earliest.
    """
    return max(enumerate(attempts), key=lambda item: (*_merit(item[1]), -item[0]))[1]


def _merit(attempt: Attempt) -> tuple[bool, bool, bool, float]:
    labels = attempt.labels
    correct = labels.correctness is True
    speedup = labels.speedup if labels.speedup is not None else -1.0
    return is_code(kernel_of(attempt)[0]), correct, correct and not labels.error, speedup


def conversation_to(record: Mapping[str, Any], turn: int) -> Messages | None:
    """The conversation from its first message to the answer of turn `turn` (from 1), roles alternating.

    What opens it comes from `full_messages`; answers and feedback come from the turns, because `full_messages` leaves
    out the last answer. A turn without an answer is left out together with its feedback.

    Returns:
        None when `full_messages` holds no question, or the turn no answer.

    Raises:
        Wrong: a message or feedback is of the wrong type or cannot be stored.
    """
    messages = _opening(record.get("full_messages"))
    if messages is None:
        return None
    for number, item in enumerate(record["turns"][:turn], 1):
        answer = _answer(item)
        if answer is None:
            if number == turn:
                return None
            continue
        messages.append({"role": "assistant", "content": storable(answer, f"turns[{number - 1}].full_completion")})
        if number < turn:
            feedback = item.get("feedback_given")
            name = f"turns[{number - 1}].feedback_given"
            if feedback is None:
                # Two answers in a row are no conversation; only what follows the last question is.
                messages.pop()
                continue
            if not isinstance(feedback, str):
                raise Wrong("wrong_type", f"{name} is {kind(feedback)}, expected text")
            messages.append({"role": "user", "content": storable(feedback, name)})
    return messages


def _opening(found: Any) -> Messages | None:
    """The messages up to the first question."""
    if found is None:
        return None
    if not isinstance(found, list):
        raise Wrong("wrong_type", f"full_messages is {kind(found)}, expected an array")
    messages: Messages = []
    for index, message in enumerate(found):
        place = f"full_messages[{index}]"
        if not isinstance(message, dict):
            raise Wrong("wrong_type", f"{place} is {kind(message)}, expected an object")
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES or content is None:
            return None
        if not isinstance(content, str):
            raise Wrong("wrong_type", f"{place}.content is {kind(content)}, expected text")
        messages.append({"role": role, "content": storable(content, f"{place}.content")})
        if role == "user":
            return messages
    return None


def _answer(turn: Mapping[str, Any]) -> str | None:
    """What the model said in a turn: its completion as it was, else reasoning and code between their tags."""
    completion = turn.get("full_completion")
    if isinstance(completion, str) and completion.strip():
        return completion
    code = turn.get("triton_code")
    if not isinstance(code, str) or not is_code(code):
        return None
    block = f"{TRITON_OPEN}\n{code.strip()}\n{TRITON_CLOSE}"
    reasoning, _ = reasoning_of(turn)
    return f"{THINK_OPEN}\n{reasoning.strip()}\n{THINK_CLOSE}\n\n{block}" if reasoning else block
