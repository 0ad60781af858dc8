"""Completions taken apart: every marker of a reasoning, every place of a kernel."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_sft_pipeline.chat import assistant_message, parse_answer
from triton_sft_pipeline.traces.reasoning import (
    LEAST_PROSE,
    Completion,
    kernel_of,
    read_completion,
    reasoning_of,
)
from triton_sft_pipeline.traces.schemas import Attempt, Labels

CODE = "import triton\n\n\ndef triton_kernel_wrapper(x):\n    return x"
BLOCK = f"<triton>\n{CODE}\n</triton>"
FENCE = f"```python\n{CODE}\n```"
PROSE = "The module adds one to every element. " * 5


@pytest.mark.parametrize(
    ("text", "reasoning", "marker"),
    [
        (f"<think>\nWhy.\n</think>\n\n{BLOCK}", "Why.", "<think>"),
        (f"Why.\n</think>\n\n{BLOCK}", "Why.", "</think>"),
        (f"<thinking>Why.</thinking>{BLOCK}", "Why.", "<think>"),
        (f"[THINK]Why.[/THINK]{BLOCK}", "Why.", "<think>"),
        (f"<think>\nWhy.\n\n{BLOCK}", "Why.", "<think>"),
        (f"<think>\nWhy, and {PROSE}", f"Why, and {PROSE}".strip(), "<think>"),
        (f"analysisWe need it. Sure.assistantfinal{BLOCK}", "We need it. Sure.", "analysis"),
        ("analysisWe need it and then the length limit", "We need it and then the length limit", "analysis"),
        (
            f"<|channel|>analysis<|message|>Why.<|end|><|start|>assistant<|channel|>final<|message|>{BLOCK}<|return|>",
            "Why.",
            "analysis",
        ),
        (f"<|channel|>final<|message|>{BLOCK}", None, None),
        (f"{PROSE}\n{BLOCK}", PROSE.strip(), "prose"),
        (f"{PROSE}\n{FENCE}", PROSE.strip(), "prose"),
        (f"Here is the corrected kernel:\n{BLOCK}", None, None),
        (BLOCK, None, None),
        (PROSE, None, None),
        (f"<think></think>{BLOCK}", None, None),
        ("", None, None),
    ],
)
def test_the_reasoning_ends_where_its_marker_says(text: str, reasoning: str | None, marker: str | None) -> None:
    found = read_completion(text)
    assert (found.reasoning, found.marker) == (reasoning, marker)


def test_an_answer_that_repeats_its_reasoning_in_tags_does_not_hide_the_channel_before_it() -> None:
    text = f"analysisWe add.assistantfinal<think>\nPolished.\n</think>\n\n{BLOCK}"
    assert read_completion(text) == Completion("We add.", "analysis", CODE, "<triton>")


def test_a_word_that_begins_an_ordinary_sentence_is_no_channel() -> None:
    text = f"analysis of the module: {PROSE}{BLOCK}"
    assert read_completion(text).marker == "prose"


@pytest.mark.parametrize(("words", "marker"), [(LEAST_PROSE - 1, None), (LEAST_PROSE, "prose")])
def test_so_few_words_are_no_reasoning(words: int, marker: str | None) -> None:
    assert read_completion("word " * words + BLOCK).marker == marker


@pytest.mark.parametrize(
    ("text", "code", "how"),
    [
        (f"<think>r</think>{BLOCK}", CODE, "<triton>"),
        (f"<think>a draft: <triton>draft = 1</triton></think>{BLOCK}", CODE, "<triton>"),
        (f"<think>a draft: {BLOCK}</think>Done.", None, None),
        (f"Put it inside <triton>...</triton> tags.\n{BLOCK}", CODE, "<triton>"),
        (f"{BLOCK}\nAs asked, inside <triton>...</triton>.", CODE, "<triton>"),
        (f"<triton>\n{FENCE}\n</triton>", CODE, "<triton>"),
        (f"<triton>\n{CODE}", CODE, "<triton>"),
        ("<triton>...</triton>", None, None),
        (f"{FENCE}\nCall it so:\n```python\ntriton_kernel_wrapper(x)\n```", CODE, "fence"),
        (f"```python\ndef helper(): pass\n```\n{FENCE}", CODE, "fence"),
        ("```python\ndef helper(): pass\n```", None, None),
        ("```\nclass ModelNew(nn.Module): pass\n```", "class ModelNew(nn.Module): pass", "fence"),
        ("no code", None, None),
    ],
)
def test_the_kernel_is_the_last_block_else_the_last_fence_that_defines_a_wrapper(
    text: str, code: str | None, how: str | None
) -> None:
    found = read_completion(text)
    assert (found.code, found.how) == (code, how)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_reasoning": "m", "thinking": "t", "full_completion": "<think>c</think>"}, ("m", "model_reasoning")),
        ({"reasoning": "r", "thinking": "t"}, ("r", "reasoning")),
        ({"thinking": "t", "full_completion": "<think>c</think>"}, ("t", "thinking")),
        ({"reasoning": None, "full_completion": "<think>c</think>"}, ("c", "full_completion <think>")),
        ({"thinking": " ", "full_completion": "c</think>"}, ("c", "full_completion </think>")),
        ({"full_completion": f"{PROSE}{BLOCK}"}, (PROSE.strip(), "full_completion prose")),
        ({"thinking": "<think>\nt\n</think>\n"}, ("\nt\n", "thinking")),
        ({"thinking": " <think>t"}, ("t", "thinking")),
        ({"thinking": "t [/THINK]"}, ("t ", "thinking")),
        ({"thinking": "as <think> t </think> says"}, ("as <think> t </think> says", "thinking")),
        ({"reasoning": "<think></think>", "thinking": "t"}, ("t", "thinking")),
        ({"full_completion": 5}, (None, None)),
        ({}, (None, None)),
    ],
)
def test_the_completion_is_asked_last(fields: dict[str, Any], expected: tuple[str | None, str | None]) -> None:
    assert reasoning_of(fields) == expected


@pytest.mark.parametrize(
    ("code", "completion", "expected"),
    [
        ("own", BLOCK, ("own", "triton_code")),
        (None, BLOCK, (CODE, "completion <triton>")),
        (" \n", FENCE, (CODE, "completion fence")),
        ("...", BLOCK, ("...", "triton_code")),
        (None, "words", ("", None)),
        (None, None, ("", None)),
    ],
)
def test_code_of_the_completion_never_takes_the_labels_of_other_code(
    code: str | None, completion: str | None, expected: tuple[str, str | None]
) -> None:
    assert kernel_of(Attempt(code, "triton_code", Labels(), {"full_completion": completion})) == expected


MARKERS = ("<think>", "</think>", "<triton>", "</triton>", "```python\n", "```", "analysis", "assistantfinal", "...")
PIECES = (*MARKERS, "<|channel|>final<|message|>", "def triton_kernel_wrapper(x): pass\n", "words ", "\n")


@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_any_completion_is_taken_apart_and_nothing_is_empty(parts: list[str]) -> None:
    found = read_completion("".join(parts))
    for text, where in ((found.reasoning, found.marker), (found.code, found.how)):
        assert (text is None) == (where is None) and (text is None or text.strip())


def test_what_is_written_for_training_is_read_back_as_the_evaluation_reads_it() -> None:
    text = assistant_message("Why.", CODE)
    found, answer = read_completion(text), parse_answer(text)
    assert (found.reasoning, found.code) == (answer.reasoning, answer.code) == ("Why.", CODE)
