"""A trace as messages: one question and one answer, or the repair conversation that led to the answer.

Knows nothing of files, tokens or splits.
"""

from __future__ import annotations

from triton_sft_pipeline.chat.prompt import assistant_message, triton_block, user_message
from triton_sft_pipeline.traces.reasoning import THINK_CLOSE, THINK_OPEN, read_completion
from triton_sft_pipeline.traces.record import Trace

Messages = list[dict[str, str]]


def messages_of(pytorch_code: str, reasoning: str, triton_code: str) -> tuple[Messages, Messages]:
    """The user turn and the assistant turn of one trace, in the field's conversational form."""
    prompt = [{"role": "user", "content": user_message(pytorch_code)}]
    completion = [{"role": "assistant", "content": assistant_message(reasoning, triton_code)}]
    return prompt, completion


def conversation_of(trace: Trace) -> tuple[Messages, Messages]:
    """Everything that was said before a trace's best answer, and that answer; of a single-turn trace as `messages_of`.

    The first question is the one that this project asks, so a system prompt of whoever made the traces is left out:
    what the model is trained on is what it will be asked with. Feedback stays to the letter. Early answers are written
    as the last one is, reasoning and kernel in their tags. One without a reasoning keeps its kernel, and one without a
    kernel what it said aloud: both are there to be read, and a template that opens `<think>` keeps them from being
    learned.
    """
    prompt, completion = messages_of(trace.pytorch_code, trace.reasoning or "", trace.triton_code)
    said = [m for m in trace.conversation or [] if m["role"] in ("user", "assistant")]
    return prompt + [_as_trained(message) for message in said[1:-1]], completion


def _as_trained(message: dict[str, str]) -> dict[str, str]:
    if message["role"] != "assistant":
        return message
    return {"role": "assistant", "content": _answer(message["content"])}


def _answer(text: str) -> str:
    found = read_completion(text)
    if found.code and found.reasoning:
        return assistant_message(found.reasoning, found.code)
    if found.code:
        return triton_block(found.code)
    aloud = text.rpartition(THINK_CLOSE)[2].replace(THINK_OPEN, "")
    return aloud.strip() or text.replace(THINK_OPEN, "").replace(THINK_CLOSE, "").strip()
