"""A trace becomes messages: of a repair conversation everything up to its best answer, in this project's words."""

from __future__ import annotations

import pytest

from triton_sft_pipeline.chat.conversation import conversation_of, messages_of
from triton_sft_pipeline.chat.prompt import assistant_message, user_message
from triton_sft_pipeline_tests.chat.conversations import FEEDBACK, repaired
from triton_sft_pipeline_tests.chat.examples import trace

CODE = "def triton_kernel_wrapper(x):\n    return x"
THOUGHT = f"<think>\nTry tanh.\n</think>\n\n<triton>\n{CODE}\n</triton>"


def test_a_single_turn_trace_is_one_question_and_one_answer() -> None:
    found = trace(3)
    assert conversation_of(found) == messages_of(found.pytorch_code, found.reasoning or "", found.triton_code)


def test_a_conversation_is_asked_as_the_model_will_be_and_ends_with_the_best_answer() -> None:
    found = repaired(THOUGHT, THOUGHT, "as it was written")
    prompt, completion = conversation_of(found)
    assert [m["role"] for m in prompt] == ["user", "assistant", "user", "assistant", "user"]
    assert prompt[0]["content"] == user_message(found.pytorch_code)
    assert [prompt[2]["content"], prompt[4]["content"]] == FEEDBACK
    assert completion[0]["content"] == assistant_message(found.reasoning or "", found.triton_code)


PROSE = "The grid has four dimensions and Triton allows three, so I fold the last two of them into one program axis."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (THOUGHT, THOUGHT),
        (f"Try tanh.\n</think>\nHere:\n<triton>\n```python\n{CODE}\n```\n</triton> Done.", THOUGHT),
        (f"analysisTry tanh.assistantfinalHere:\n```python\n{CODE}\n```", THOUGHT),
        (f"{PROSE}\n<triton>\n{CODE}\n</triton>", f"<think>\n{PROSE}\n</think>\n\n<triton>\n{CODE}\n</triton>"),
        (f"<triton>\n{CODE}\n</triton>", f"<triton>\n{CODE}\n</triton>"),
        (f"Here:\n```python\n{CODE}\n```\nDone.", f"<triton>\n{CODE}\n</triton>"),
        ("<think>\nHm.\n</think>\nI cannot.", "I cannot."),
        ("<think>\nHm.\n</think>", "Hm."),
        ("<think>\nHm, wait", "Hm, wait"),
    ],
    ids=["tags", "lone end", "channels", "prose", "no reasoning", "a fence", "no kernel", "only a thought", "cut off"],
)
def test_an_early_answer_is_written_as_the_last_one_is(text: str, expected: str) -> None:
    prompt, _ = conversation_of(repaired(text, "as it was written"))
    assert prompt[1] == {"role": "assistant", "content": expected}
