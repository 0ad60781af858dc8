"""Counting tokens as the trainer does, and refusing tokenizers whose template would spoil the training."""

from __future__ import annotations

from pathlib import Path

import pytest

from triton_sft_pipeline.chat.dataset import messages_of
from triton_sft_pipeline.chat.tokens import load_tokenizer, token_counter
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline_tests.evaluation.models import TEMPLATE, byte_tokenizer

PROMPT, COMPLETION = messages_of("x = 1", "because é", "y = 2")
DROPS_REASONING = TEMPLATE.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
OTHER_GENERATION_PROMPT = TEMPLATE.replace("<think>\n{% endif %}", "<answer>\n{% endif %}")


def test_tokens_are_those_of_the_template_generation_prompt_included() -> None:
    count = token_counter(byte_tokenizer())
    head, whole = count(PROMPT, COMPLETION)
    # One token a byte, and one for each of the special tokens; the template ends the last turn in a newline.
    user = len("user\n") + len(PROMPT[0]["content"].encode()) + len("\n") + 2
    assert head == user + len("assistant\n<think>\n") + 1
    assert whole == user + len("assistant\n") + len(COMPLETION[0]["content"].encode()) + len("\n") + 2


def test_a_template_that_adds_no_think_tag_is_counted_too() -> None:
    count = token_counter(byte_tokenizer(TEMPLATE.replace("<think>\n{% endif %}", "{% endif %}")))
    assert count(PROMPT, COMPLETION)[0] == token_counter(byte_tokenizer())(PROMPT, COMPLETION)[0] - len("<think>\n")


def test_a_template_that_drops_the_reasoning_is_refused() -> None:
    template = DROPS_REASONING.replace("<think>\n{% endif %}", "{% endif %}")
    with pytest.raises(PipelineError, match="the chat template drops part of the answer"):
        token_counter(byte_tokenizer(template))(PROMPT, COMPLETION)


def test_a_template_that_does_not_continue_its_generation_prompt_is_refused() -> None:
    for template in (OTHER_GENERATION_PROMPT, DROPS_REASONING):
        with pytest.raises(PipelineError, match="does not continue its own generation prompt"):
            token_counter(byte_tokenizer(template))(PROMPT, COMPLETION)


def test_a_saved_tokenizer_is_loaded_from_its_directory(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert token_counter(loaded)(PROMPT, COMPLETION) == token_counter(byte_tokenizer())(PROMPT, COMPLETION)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    byte_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(PipelineError, match="the tokenizer has no chat template"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["nobody/nothing", "empty"])
def test_a_model_that_is_not_on_disk_when_offline_is_an_error_for_a_person(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    place = str(tmp_path / "empty") if name == "empty" else name
    with pytest.raises(
        PipelineError, match=r"its tokenizer cannot be loaded .* Name a directory in model\.base_model"
    ) as caught:
        load_tokenizer(place)
    assert "\n" not in str(caught.value) and place in str(caught.value)
