"""The prompt to the letter, and answers read back leniently."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_sft_pipeline.chat.prompt import Answer, assistant_message, parse_answer, pytorch_code_of, user_message

CODE = "import triton\n\n\ndef triton_kernel_wrapper(x):\n    return x"


def test_the_user_turn_is_that_of_the_original_to_the_letter() -> None:
    assert user_message("import torch\nx = 1\n") == (
        "Convert the following PyTorch code to an optimized Triton kernel:\n"
        "\n"
        "```python\n"
        "import torch\n"
        "x = 1\n"
        "```\n"
        "\n"
        "Generate a complete Triton implementation that produces the same output as the PyTorch code."
    )


def test_the_assistant_turn_is_that_of_the_original_to_the_letter() -> None:
    assert (
        assistant_message(" because\n", f"\n{CODE}\n") == f"<think>\nbecause\n</think>\n\n<triton>\n{CODE}\n</triton>"
    )


@given(st.text().filter(str.strip))
def test_the_pytorch_code_comes_back_out_of_a_user_turn(code: str) -> None:
    assert pytorch_code_of(user_message(code)) == code.strip()


@pytest.mark.parametrize("turn", ["", "x = 1", user_message("x")[:-1], " " + user_message("x")])
def test_another_text_is_no_user_turn(turn: str) -> None:
    with pytest.raises(ValueError, match="not a user turn of this project"):
        pytorch_code_of(turn)


plain = st.text().map(str.strip).filter(bool)


@given(
    plain,
    plain.filter(lambda code: not any(mark in code for mark in ("</think>", "</triton>", "```"))),
)
def test_what_is_written_is_read_back(reasoning: str, code: str) -> None:
    assert parse_answer(assistant_message(reasoning, code)) == Answer(reasoning, code, "triton")


pieces = st.sampled_from(["<think>", "</think>", "<triton>", "</triton>", "```", "```python\n", "def f", "\n", "x"])


@given(st.text() | st.lists(pieces).map("".join))
def test_any_text_can_be_read(text: str) -> None:
    answer = parse_answer(text)
    assert answer.how in ("triton", "fence", "none")
    assert (answer.code is None) == (answer.how == "none")
    assert answer.code != "" and answer.reasoning != ""


def test_the_opening_tag_may_have_been_part_of_the_prompt() -> None:
    assert parse_answer(f"because\n</think>\n\n<triton>\n{CODE}\n</triton>") == Answer("because", CODE, "triton")


def test_a_kernel_without_any_reasoning_is_read() -> None:
    assert parse_answer(f"<triton>\n{CODE}\n</triton>") == Answer(None, CODE, "triton")
    assert parse_answer(f"<think>\n\n</think>\n<triton>{CODE}</triton>") == Answer(None, CODE, "triton")


def test_a_kernel_that_the_length_limit_cut_off_is_still_read() -> None:
    assert parse_answer(f"<think>\nr\n</think>\n\n<triton>\n{CODE}") == Answer("r", CODE, "triton")


def test_a_reasoning_that_the_length_limit_cut_off_holds_no_kernel() -> None:
    assert parse_answer(f"<think>\nI would write ```python\n{CODE}\n``` or so, but") == Answer(
        f"I would write ```python\n{CODE}\n``` or so, but", None, "none"
    )


def test_a_draft_inside_the_reasoning_is_not_the_answer() -> None:
    draft = "<triton>\ndraft\n</triton>"
    assert parse_answer(f"<think>\ntry {draft}\n</think>\n\n<triton>\n{CODE}\n</triton>").code == CODE
    assert parse_answer(f"<think>\ntry {draft}\n</think>\n\nI give up.") == Answer(f"try {draft}", None, "none")


def test_the_last_of_several_blocks_counts() -> None:
    assert parse_answer(f"<triton>\nfirst\n</triton> no, better:\n<triton>\n{CODE}\n</triton>").code == CODE
    assert parse_answer(f"```python\ndef first(): ...\n```\nno, better:\n```python\n{CODE}\n```").code == CODE


@pytest.mark.parametrize("tag", ["python", "py", "triton", "", "python  "])
def test_a_fence_inside_the_tags_is_taken_off(tag: str) -> None:
    assert parse_answer(f"<triton>\n```{tag}\n{CODE}\n```\n</triton>") == Answer(None, CODE, "triton")


@pytest.mark.parametrize("tag", ["python", "py", "triton", ""])
def test_without_tags_the_last_fence_that_defines_something_counts(tag: str) -> None:
    text = (
        f"<think>r</think>\nHere it is:\n```{tag}\n{CODE}\n```\nCall it so:\n```python\ntriton_kernel_wrapper(x)\n```\n"
    )
    assert parse_answer(text) == Answer("r", CODE, "fence")


def test_tags_come_before_fences() -> None:
    assert parse_answer(f"<triton>\n{CODE}\n</triton>\n```python\ndef usage(): ...\n```").how == "triton"


@pytest.mark.parametrize(
    "text", ["", " \n", "I cannot do that.", "<triton></triton>", "<triton>\n \n</triton>", "```python\nx = 1\n```"]
)
def test_an_answer_without_a_kernel_has_none(text: str) -> None:
    assert parse_answer(text) == Answer(None, None, "none")
