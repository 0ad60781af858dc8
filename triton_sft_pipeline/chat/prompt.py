"""The words between user and model: one place that writes them for training and reads them back at evaluation.

Knows nothing of files, tokens or models. The texts are those of the original system, to the letter: an adapter trained
on one prompt and asked with another is a different experiment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_REQUEST = "Convert the following PyTorch code to an optimized Triton kernel:"
_DEMAND = "Generate a complete Triton implementation that produces the same output as the PyTorch code."

PROMPT_VERSION = "1"
"""Raised whenever a text below changes: it enters the code version of the chat dataset and of the evaluation."""


def user_message(pytorch_code: str) -> str:
    """The user turn: the request, the PyTorch code in a python fence, and what is wanted of the answer."""
    return f"{_REQUEST}\n\n```python\n{pytorch_code.strip()}\n```\n\n{_DEMAND}"


def pytorch_code_of(user_turn: str) -> str:
    """The PyTorch code inside a user turn that `user_message` wrote.

    Raises:
        ValueError: it is not such a turn.
    """
    head, tail = f"{_REQUEST}\n\n```python\n", f"\n```\n\n{_DEMAND}"
    if not (user_turn.startswith(head) and user_turn.endswith(tail)):
        raise ValueError("not a user turn of this project")
    return user_turn[len(head) : -len(tail)]


def assistant_message(reasoning: str, triton_code: str) -> str:
    """The assistant turn: `<think>` reasoning `</think>`, a blank line, `<triton>` code `</triton>`."""
    return f"{think_block(reasoning)}\n\n{triton_block(triton_code)}"


def think_block(reasoning: str) -> str:
    """The reasoning between its tags. It is stripped, because chat templates end the prompt in `<think>` and one
    newline.
    """
    return f"<think>\n{reasoning.strip()}\n</think>"


def triton_block(triton_code: str) -> str:
    """The kernel between its tags."""
    return f"<triton>\n{triton_code.strip()}\n</triton>"


@dataclass(frozen=True)
class Answer:
    """What a completion holds.

    Attributes:
        reasoning: the text between the think tags, or None when there is none.
        code: the kernel, or None when none could be found.
        how: where the code was: "triton" (its tags), "fence" (a Markdown fence) or "none".
    """

    reasoning: str | None
    code: str | None
    how: str


_THINK_END = re.compile(r"</think>")
_TRITON = re.compile(r"<triton>\s*\n?(.*?)(?:</triton>|\Z)", re.DOTALL)
_FENCE = re.compile(r"```(?:python|py|triton)?[ \t]*\n(.*?)```", re.DOTALL)


def parse_answer(text: str) -> Answer:
    """Read a completion leniently: the tags first, then the last fence that defines something.

    A `<triton>` block inside the reasoning is a draft, not the answer, so only what follows the last `</think>` counts
    when there is one. A block that the length limit cut off before `</triton>` is still read: the judge says what it is
    worth.

    Args:
        text: the whole completion, with or without the leading `<think>` that the prompt may have held.
    """
    reasoning, rest = _split_reasoning(text)
    if match := _last(_TRITON, rest):
        code = _without_fence(match.strip())
        return Answer(reasoning, code or None, "triton" if code else "none")
    if match := _last(_FENCE, rest, containing="def "):
        return Answer(reasoning, match.strip(), "fence")
    return Answer(reasoning, None, "none")


def _split_reasoning(text: str) -> tuple[str | None, str]:
    ends = list(_THINK_END.finditer(text))
    if ends:
        head, rest = text[: ends[-1].start()], text[ends[-1].end() :]
        return head.replace("<think>", "", 1).strip() or None, rest
    if text.lstrip().startswith("<think>") and "<triton>" not in text:
        return text.replace("<think>", "", 1).strip() or None, ""
    return None, text.replace("<think>", "", 1)


def _last(pattern: re.Pattern[str], text: str, containing: str = "") -> str | None:
    found = [m for m in pattern.findall(text) if containing in m]
    return found[-1] if found else None


def _without_fence(code: str) -> str:
    fenced = _FENCE.fullmatch(code)
    return fenced.group(1).strip() if fenced else code
