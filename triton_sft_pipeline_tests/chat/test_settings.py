"""What the chat dataset may be told."""

from __future__ import annotations

import pytest

from triton_sft_pipeline.config import load_config
from triton_sft_pipeline.errors import PipelineError


def test_by_default_a_row_is_a_prompt_and_its_completion() -> None:
    settings = load_config().dataset
    assert (settings.form, settings.multi_turn, settings.over_budget) == ("prompt_completion", False, "drop")


def test_several_answers_need_the_form_that_has_room_for_them() -> None:
    with pytest.raises(PipelineError, match="dataset: multi_turn needs form: messages"):
        load_config(overrides={"dataset.multi_turn": True})
    assert load_config(overrides={"dataset.multi_turn": True, "dataset.form": "messages"}).dataset.multi_turn


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"dataset\.form: input should be 'prompt_completion' or 'messages'"):
        load_config(overrides={"dataset.form": "sharegpt"})
