"""Counting tokens as the trainer does: through the tokenizer's own chat template, generation prompt included."""

from __future__ import annotations

from typing import Any

from triton_sft_pipeline.chat.conversation import Messages
from triton_sft_pipeline.chat.dataset import CountTokens, NotContinued
from triton_sft_pipeline.errors import PipelineError


def load_tokenizer(base_model: str, revision: str | None = None) -> Any:
    """The tokenizer of a base model, from its directory or the hub's cache.

    Raises:
        PipelineError: it cannot be had, or has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base_model, revision=revision)
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"{base_model}: its tokenizer cannot be loaded ({str(error).splitlines()[0]}). "
            "Name a directory in model.base_model, or download the model once with network access."
        ) from error
    if not tokenizer.chat_template:
        raise PipelineError(
            f"{base_model}: the tokenizer has no chat template, so the prompt's form is unknown. Use a chat model."
        )
    return tokenizer


def token_counter(tokenizer: Any) -> CountTokens:
    """A function that counts the tokens of (prompt, completion) under this tokenizer's template.

    Raises (when called):
        NotContinued: the prompt is no prefix of the whole, so that a loss mask would be wrong.
        PipelineError: the template drops the reasoning.
    """

    def count(prompt: Messages, completion: Messages) -> tuple[int, int]:
        head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
        if not whole.startswith(head):
            raise NotContinued(
                "the chat template does not continue its own generation prompt; completion-only loss would be wrong."
            )
        answer = completion[0]["content"]
        if answer.removeprefix("<think>\n") not in whole:
            raise PipelineError(
                "the chat template drops part of the answer (its <think> block?): the model would not learn it."
            )
        ids = tokenizer([head, whole], add_special_tokens=False, verbose=False)["input_ids"]
        return len(ids[0]), len(ids[1])

    return count
