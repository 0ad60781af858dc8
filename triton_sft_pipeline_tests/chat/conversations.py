"""A repair conversation as a trace: three tries, feedback between them."""

from __future__ import annotations

import json
from typing import Any

from triton_sft_pipeline.chat.conversation import Messages
from triton_sft_pipeline.traces.record import Trace
from triton_sft_pipeline_tests.chat.examples import trace

FEEDBACK = ["Compilation error: no tl.tanh. Fix it.", "Correct but slow (0.8x PyTorch)."]


def said(*answers: str) -> Messages:
    """What stands in a trace file: the makers' own system prompt and question, answers, feedback between them."""
    messages = [{"role": "system", "content": "You are an expert."}, {"role": "user", "content": "Convert this."}]
    for number, answer in enumerate(answers):
        messages.append({"role": "assistant", "content": answer})
        if number + 1 < len(answers):
            messages.append({"role": "user", "content": FEEDBACK[number]})
    return messages


def repaired(*answers: str, number: int = 0, **changes: Any) -> Trace:
    """A multi-turn trace whose best turn is the last of `answers`."""
    spoken = json.dumps(said(*answers))
    return trace(number, messages=spoken, turn=len(answers), num_turns=len(answers), **changes)
