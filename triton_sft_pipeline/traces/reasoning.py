"""Takes a completion apart: the reasoning before the answer, and the kernel in the answer.

The reasoning is what stands before the end of its marker, whichever model wrote it:

- `<think>...</think>` (DeepSeek, Qwen, GLM and most others), `<thinking>...</thinking>`, `[THINK]...[/THINK]`
  (Magistral), each also without the opening tag, which the prompt may have held: everything before the last closing
  tag is reasoning;
- an opening tag that is never closed: everything up to the code;
- gpt-oss's channels, `<|channel|>analysis<|message|>...<|channel|>final<|message|>...`, and what is left of them when
  special tokens are not written out: `analysis...assistantfinal...`;
- no marker at all: the prose before the code, when there is enough of it to be one.

The kernel is the last `<triton>` block of the answer, else its last Markdown fence that defines a wrapper. A block
inside the reasoning is a draft, not the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triton_sft_pipeline.traces.schemas import REASONING_FIELDS, Attempt, is_code

WRAPPER = "triton_kernel_wrapper"
MODEL_CLASS = "ModelNew"

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
TRITON_OPEN, TRITON_CLOSE = "<triton>", "</triton>"

PROSE = "prose"

LEAST_PROSE = 20
"""Fewer words than this before the code ("Here is the corrected kernel:") are no reasoning."""

_OPENING = re.compile(r"<think(?:ing)?>|\[THINK\]")
_CLOSING = re.compile(r"</think(?:ing)?>|\[/THINK\]")
_ENCLOSING = re.compile(r"\A\s*(?:<think(?:ing)?>|\[THINK\])|(?:</think(?:ing)?>|\[/THINK\])\s*\Z")
_FINAL_CHANNEL = re.compile(r"<\|channel\|>final(?:\s*<\|constrain\|>\w+)?<\|message\|>")
_ANALYSIS_CHANNEL = re.compile(r"<\|channel\|>analysis<\|message\|>")
_SPECIAL_TOKEN = re.compile(r"<\|(?:start|end|return|channel|message|call)\|>")
_BARE_FINAL = "assistantfinal"
# Without special tokens the channel's name and the first word run together: "analysisWe need to".
_BARE_ANALYSIS = re.compile(r"\s*analysis(?=\S)")
_CUT_OFF_ANALYSIS = re.compile(r"\s*analysis(?=[A-Z])")

_BLOCK = re.compile(r"<triton>(.*?)(?:</triton>|\Z)", re.DOTALL)
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_WHOLE_FENCE = re.compile(r"\s*```[^\n`]*\n(.*?)\n?```\s*", re.DOTALL)
_DEFINES_WRAPPER = re.compile(rf"^[ \t]*(?:def {WRAPPER}\b|class {MODEL_CLASS}\b|{WRAPPER}[ \t]*=)", re.MULTILINE)


@dataclass(frozen=True)
class Completion:
    """What a completion holds.

    Attributes:
        reasoning: the text before the answer, or None.
        marker: what showed where it ends: "<think>", "</think>" (its opening was in the prompt), "analysis", "prose",
            or None.
        code: the kernel, or None.
        how: where the code was: "<triton>", "fence", or None.
    """

    reasoning: str | None = None
    marker: str | None = None
    code: str | None = None
    how: str | None = None


def read_completion(text: str) -> Completion:
    """Take a whole completion apart."""
    reasoning, marker, answer = _split(text)
    block = _code_block(answer)
    if marker in (None, "open"):
        # Nothing says where the reasoning ends, so it ends where the code begins; without code it does not.
        before = answer[: block.start()] if block else (answer if marker else "")
        return _with_code(_cleaned(before, marker), block)
    return _with_code((reasoning, marker), block)


def _split(text: str) -> tuple[str | None, str | None, str]:
    """(reasoning, marker, answer); an unclosed or missing marker leaves all of it to the answer."""
    if final := list(_FINAL_CHANNEL.finditer(text)):
        head = _ANALYSIS_CHANNEL.sub("", text[: final[-1].start()], count=1)
        answer = _SPECIAL_TOKEN.sub("", text[final[-1].end() :])
        return _stripped(_SPECIAL_TOKEN.sub("", head.removesuffix("<|start|>assistant"))), "analysis", answer
    if bare := _BARE_ANALYSIS.match(text):
        head, found, answer = text[bare.end() :].rpartition(_BARE_FINAL)
        if found:
            return _stripped(head), "analysis", answer
        if _CUT_OFF_ANALYSIS.match(text):
            return _stripped(text[bare.end() :]), "analysis", ""
    if closing := list(_CLOSING.finditer(text)):
        head, answer = text[: closing[-1].start()], text[closing[-1].end() :]
        opening = _OPENING.search(head)
        if opening is None:
            return _stripped(head), THINK_CLOSE, answer
        return _stripped(head[: opening.start()] + head[opening.end() :]), THINK_OPEN, answer
    if opening := _OPENING.match(text.lstrip()):
        return None, "open", text.lstrip()[opening.end() :]
    return None, None, text


def _cleaned(before: str, marker: str | None) -> tuple[str | None, str | None]:
    reasoning = _stripped(before)
    if reasoning is None:
        return None, None
    if marker:
        return reasoning, THINK_OPEN
    return (reasoning, PROSE) if len(reasoning.split()) >= LEAST_PROSE else (None, None)


def _with_code(reasoning: tuple[str | None, str | None], block: re.Match[str] | None) -> Completion:
    if block is None:
        return Completion(*(reasoning if reasoning[0] else (None, None)))
    how = TRITON_OPEN if block.re is _BLOCK else "fence"
    return Completion(*(reasoning if reasoning[0] else (None, None)), _without_fence(block.group(1)), how)


def _code_block(answer: str) -> re.Match[str] | None:
    """The last `<triton>` block that holds code, else the last fence that defines a wrapper."""
    blocks = [m for m in _BLOCK.finditer(answer) if is_code(_without_fence(m.group(1)))]
    if blocks:
        return blocks[-1]
    fences = [m for m in _FENCE.finditer(answer) if _DEFINES_WRAPPER.search(m.group(1))]
    return fences[-1] if fences else None


def _without_fence(code: str) -> str:
    fenced = _WHOLE_FENCE.fullmatch(code)
    return (fenced.group(1) if fenced else code).strip()


def _stripped(text: str) -> str | None:
    return text.strip() or None


def reasoning_of(fields: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The reasoning of a raw record or turn and where it stood: model_reasoning, else reasoning, else thinking, else
    the part of full_completion that its marker shows ("full_completion <think>", and so on).

    Tags around a field's text are taken off: whoever writes the answer puts them there.
    """
    for field in REASONING_FIELDS:
        value = fields.get(field)
        if isinstance(value, str) and (inside := _ENCLOSING.sub("", value)).strip():
            return inside, field
    found = _completion_of(fields)
    return (found.reasoning, f"full_completion {found.marker}") if found.reasoning else (None, None)


def kernel_of(attempt: Attempt) -> tuple[str, str | None]:
    """The kernel of an attempt and where it stood ("completion <triton>" and "completion fence" included); ("", None)
    when there is none.

    A literal `...` stays what it is: it is what was judged, so no other code may take its labels.
    """
    if attempt.code is not None and attempt.code.strip():
        return attempt.code, attempt.code_field
    found = _completion_of(attempt.fields)
    return (found.code, f"completion {found.how}") if found.code else ("", None)


def _completion_of(fields: Mapping[str, Any]) -> Completion:
    text = fields.get("full_completion")
    return read_completion(text) if isinstance(text, str) else Completion()
