"""From chat rows to token ids and labels: what the model reads and which of it it is trained on.

A row is a dict (or a `datasets` row) with `prompt` and `completion`, each a list of {role, content}; other columns are
ignored, `sample_key` names the row in messages. Knows nothing of models or trainers. Nothing is ever cut here: a sample
that does not fit is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that plays no part in the loss (the convention of torch's cross entropy)."""


@dataclass(frozen=True)
class Sample:
    """One row as the model sees it.

    Attributes:
        key: `sample_key` of the row, or its position.
        input_ids: tokens of the whole conversation, as the chat template renders it.
        labels: the same tokens where the completion is, `IGNORED` where the prompt is.
        documents: lengths of the samples that were packed into this one, in order; empty: it is not packed.
    """

    key: str
    input_ids: list[int]
    labels: list[int]
    documents: tuple[int, ...] = ()


def tokenize_rows(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None, split: str
) -> list[Sample]:
    """Tokenise every row of a split.

    Args:
        max_length: most tokens a sample may have; None: any number.
        split: the name of the split, for messages.

    Raises:
        PipelineError: a row is malformed, longer than `max_length`, or changed by the chat template.
    """
    return [_tokenize_row(row, index, tokenizer, max_length, split) for index, row in enumerate(rows)]


def _tokenize_row(
    row: Mapping[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, max_length: int | None, split: str
) -> Sample:
    if not isinstance(row, Mapping):
        raise PipelineError(f"{split} row {index} is a {type(row).__name__}: rows are dicts of prompt and completion.")
    key = str(row.get("sample_key") or index)
    where = f"{split} sample {key}"
    prompt, completion = _messages(row, "prompt", where), _messages(row, "completion", where)
    prompt_ids = _render(tokenizer, prompt, add_generation_prompt=True)
    input_ids = _render(tokenizer, [*prompt, *completion], add_generation_prompt=False)
    if input_ids[: len(prompt_ids)] != prompt_ids:
        raise PipelineError(
            f"{where}: the chat template of {tokenizer.name_or_path} renders the prompt differently once an answer "
            "follows (it may drop the reasoning, or the answer does not begin with what the prompt ends in), so the "
            "model would be trained on another prompt than it is asked with. Use a template that keeps the last answer "
            "whole, and answers that begin with <think> where the template does."
        )
    if max_length is not None and len(input_ids) > max_length:
        raise PipelineError(
            f"{where} has {len(input_ids)} tokens, more than training.max_length ({max_length}); it is not cut, "
            "because it would lose its kernel. Raise max_length, or leave the sample out."
        )
    return Sample(key, input_ids, [IGNORED] * len(prompt_ids) + input_ids[len(prompt_ids) :])


def _messages(row: Mapping[str, Any], column: str, where: str) -> list[dict[str, str]]:
    """The messages in `column`, once they are known to be some: templates fail on others with errors of their own."""
    messages = row.get(column)
    if not messages:
        raise PipelineError(f"{where} has no {column}: rows need prompt and completion, lists of {{role, content}}.")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise PipelineError(f"{where}: {column} must be a list of {{role, content}}, both text.")
    return messages


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool
) -> list[int]:
    rendered: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=True
    )
    return list(rendered["input_ids"])
