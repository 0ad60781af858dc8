"""Reasonings that are none, and answers that cannot be read back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.chat import assistant_message, parse_answer
from triton_sft_pipeline.traces.answers import loop, refusal, unreadable
from triton_sft_pipeline.traces.record import RawRecord, Trace, parse_record
from triton_sft_pipeline_tests.traces.records import KERNEL, record

CODE = KERNEL.format(expression="x")
SENTENCE = "The kernel loads a block of the input, adds the bias and stores the result under a mask. "


def trace(**changes: Any) -> Trace:
    parsed = parse_record(RawRecord("t.json", 0, 0, record(**changes), ""))
    assert isinstance(parsed, Trace)
    return parsed


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, but I can\u2019t assist with that request.",
        "  Sorry, I cannot do this.",
        "I am very sorry, but I am unable to write this kernel.",
        "I apologize, but I'm not able to help.",
        "I cannot assist with this request.",
        "I can't help with that. Please ask for something else.",
        "As an AI language model, I do not run code.",
        "Generation failed",
        "Error: generation failed after 3 tries",
        "Internal server error",
        "The request asks for code that breaks a licence. So we must refuse.",
        "This is disallowed content. We should decline to help.",
    ],
)
def test_a_reasoning_that_declines_is_a_refusal(text: str) -> None:
    assert refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        SENTENCE,
        "We can't use tl.tanh here, so we write it with exp. " + SENTENCE,
        "I can't rely on the tensor being contiguous. " + SENTENCE,
        "I cannot use a single block, as the row is too long. " + SENTENCE,
        "Sorry for the earlier mistake: the stride was wrong. " + SENTENCE,
        "I apologize for the confusion. Let me fix the grid. " + SENTENCE,
        "The error 'generation failed' came from the mask. " + SENTENCE,
        "Error: the mask was wrong. " + SENTENCE,
        "The compiler will refuse a block that is no power of two; we must refuse to unroll it. " + SENTENCE,
        "",
    ],
)
def test_a_reasoning_that_speaks_of_limits_is_none(text: str) -> None:
    assert refusal(text) is None


def varied(words: int) -> str:
    """Text of English words without a repeated passage, the same each time."""
    lexicon = SENTENCE.split()
    state, chosen = 1, []
    for _ in range(words):
        state = (state * 1103515245 + 12345) % 2**31
        chosen.append(lexicon[(state >> 16) % len(lexicon)])
    return " ".join(chosen)


def _numbered(count: int) -> str:
    return "\n".join(f"Step {n}: check whether offset {n * 128} is inside the row, then go on." for n in range(count))


@pytest.mark.parametrize(
    "text",
    [
        SENTENCE * 30,
        varied(600) + SENTENCE * 60,
        "First the plan, which is short.\n" + "Wait, let me check the mask again.\n\n" * 40,
        _numbered(60),
        "ha" * 2000,
        "!" * 2000,
        "\u7b49\u4e00\u4e0b\uff0c\u8ba9\u6211\u518d\u68c0\u67e5\u4e00\u904d\u63a9\u7801\u3002" * 60,
        " ".join(f"{SENTENCE}{w}" for w in ("and", "then", "so", "but") * 20),
    ],
)
def test_a_text_that_repeats_itself_for_more_than_half_is_a_loop(text: str) -> None:
    found = loop(text)
    assert found and "repeats itself" in found


@pytest.mark.parametrize(
    "text",
    [
        "",
        SENTENCE * 5,
        varied(800),
        f"{varied(100)}\n\n{CODE}\n\nFix the mask:\n\n{CODE}\n\nFinal:\n\n{CODE}",
        varied(600) + SENTENCE * 20,
    ],
)
def test_drafts_and_short_or_partial_repetitions_are_no_loop(text: str) -> None:
    assert loop(text) is None


def test_of_a_very_long_text_the_end_decides() -> None:
    assert loop(varied(60_000) + SENTENCE * 4000) and not loop(SENTENCE * 4000 + varied(60_000))


def test_the_share_that_repeats_itself_is_told() -> None:
    found = loop(SENTENCE * 30)
    assert found is not None and found.startswith("100% of the reasoning repeats itself; 'The kernel loads a block")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"triton_code": f"{CODE}\n# </triton>"}, "the code holds </triton>"),
        ({"triton_code": f"{CODE}\n# </think>"}, "the code holds </think>"),
        ({"triton_code": f"```python\n{CODE}\n```"}, "the code is a Markdown fence"),
        ({"model_reasoning": "Follow <think> ... </think>. Go."}, "the reasoning holds </think>"),
        ({"model_reasoning": "It ends in <|im_end|>."}, "the reasoning holds <|im_end|>"),
        ({"triton_code": f"{CODE}\n# <|endoftext|>"}, "the code holds <|endoftext|>"),
        ({"pytorch_code": "a = '<|im_start|>'"}, "the PyTorch code holds <|im_start|>"),
    ],
)
def test_an_answer_that_would_be_read_otherwise_than_it_was_written_is_refused(
    changes: dict[str, Any], said: str
) -> None:
    found = unreadable(trace(**changes))
    assert found is not None and found.startswith(said)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_reasoning": "Now the answer with <think> and <triton> sections, then </triton>."},
        {"triton_code": f"{CODE}\n# <triton> <think>"},
        {"triton_code": f"{CODE}\n# ```"},
    ],
)
def test_an_answer_that_is_read_back_as_it_was_written_is_kept(changes: dict[str, Any]) -> None:
    found = trace(**changes)
    assert unreadable(found) is None
    answer = parse_answer(assistant_message(found.reasoning or "", found.triton_code))
    assert (answer.code, answer.how) == (found.triton_code, "triton")
    assert answer.reasoning == found.reasoning


@pytest.mark.skipif("TRITON_SFT_REAL_TRACES" not in os.environ, reason="TRITON_SFT_REAL_TRACES names no folder")
def test_no_real_reasoning_is_taken_for_a_refusal_or_a_loop() -> None:
    path = Path(os.environ["TRITON_SFT_REAL_TRACES"]) / "gpt_oss_120b_single_turn.json"
    texts = [t for r in json.loads(path.read_text("utf-8")) for t in (r["thinking"], r.get("model_reasoning")) if t]
    assert len(texts) == 158
    assert [t[:80] for t in texts if refusal(t) or loop(t)] == []
