"""From chat rows to token ids and labels: what the model reads and which of it it is trained on.

A row is a dict (or a `datasets` row) with `prompt` and `completion`, each a list of {role, content}, or with
`messages`, a whole conversation; other columns are ignored, `sample_key` names the row in errors. Knows nothing of
models or trainers. Nothing is ever cut here: a sample that does not fit is refused.

Of a conversation every answer is learned, and nothing else. Where an answer stands, the template says: asked for with
the conversation so far it renders a prompt, and with the answer added a text that must begin with that prompt; what
follows the prompt is the answer. So each answer is learned behind exactly the text that the model is asked with. Most
templates only ever append, and then the text after the last answer holds all of them: one sample. Templates of
reasoning models take the reasoning out of every answer but the last, so the text in which an early answer was asked for
is no beginning of the whole: such an answer gets a sample of its own, which ends with it. An early answer that does not
continue its prompt at all (the template opens `<think>`, and it has no reasoning) is read and not learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that plays no part in the loss (the convention of torch's cross entropy)."""


@dataclass(frozen=True)
class Sample:
    """One row, or one answer of a conversation, as the model sees it.

    Attributes:
        key: `sample_key` of the row, or its position; "KEY/answer_2" when it ends with an early answer.
        input_ids: tokens of the whole conversation, as the chat template renders it.
        labels: the same tokens where an answer is that is to be learned, `IGNORED` elsewhere.
        documents: lengths of the samples that were packed into this one, in order; empty: it is not packed.
    """

    key: str
    input_ids: list[int]
    labels: list[int]
    documents: tuple[int, ...] = ()


def tokenize_rows(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None, split: str
) -> list[Sample]:
    """Tokenise every row of a split: a sample a row, or several where a conversation needs them.

    Args:
        max_length: most tokens a sample may have; None: any number.
        split: the name of the split, for messages.

    Raises:
        PipelineError: a row is malformed, longer than `max_length`, or changed by the chat template.
    """
    return [
        sample for index, row in enumerate(rows) for sample in _tokenize_row(row, index, tokenizer, max_length, split)
    ]


def _tokenize_row(
    row: Mapping[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, max_length: int | None, split: str
) -> list[Sample]:
    if not isinstance(row, Mapping):
        raise PipelineError(f"{split} row {index} is a {type(row).__name__}: rows are dicts of prompt and completion.")
    key = str(row.get("sample_key") or index)
    where = f"{split} sample {key}"
    if "messages" in row and not (row.get("prompt") or row.get("completion")):
        samples = _conversation(_messages(row, "messages", where), tokenizer, key, where)
    else:
        prompt, completion = _messages(row, "prompt", where), _messages(row, "completion", where)
        samples = [_learned(key, *_rendered(prompt, completion, tokenizer), tokenizer, where)]
    for sample in samples:
        if max_length is not None and len(sample.input_ids) > max_length:
            raise PipelineError(
                f"{split} sample {sample.key} has {len(sample.input_ids)} tokens, more than training.max_length "
                f"({max_length}); it is not cut, because it would lose its kernel. Raise max_length, or leave the "
                "sample out."
            )
    return samples


def _conversation(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, key: str, where: str
) -> list[Sample]:
    """The samples of a conversation, each as long as the template only appends; see the top of this module."""
    if messages[0]["role"] == "assistant" or messages[-1]["role"] != "assistant":
        raise PipelineError(f"{where}: messages must begin with a question and end with the assistant's answer.")
    samples: list[Sample] = []
    last = len(messages) - 1
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = _rendered(messages[:index], [message], tokenizer)
        if index < last and answered[: len(asked)] != asked:
            continue
        turn = sum(m["role"] == "assistant" for m in messages[: index + 1])
        name = key if index == last else f"{key}/answer_{turn}"
        begun = samples[-1].input_ids if samples else []
        continues = bool(begun) and asked[: len(begun)] == begun
        earlier = samples.pop().labels if continues else []
        samples.append(_learned(name, asked, answered, tokenizer, where, earlier))
    return samples


def _learned(
    key: str,
    asked: list[int],
    answered: list[int],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    earlier: Sequence[int] = (),
) -> Sample:
    """The sample whose loss is on what follows `asked`, and on what `earlier`, labels of its beginning, say.

    Raises:
        PipelineError: the text with the answer does not begin with the one that asks for it.
    """
    if answered[: len(asked)] != asked:
        raise PipelineError(
            f"{where}: the chat template of {tokenizer.name_or_path} renders the prompt differently once an answer "
            "follows (it may drop the reasoning, or the answer does not begin with what the prompt ends in), so the "
            "model would be trained on another prompt than it is asked with. Use a template that keeps the last answer "
            "whole, and answers that begin with <think> where the template does."
        )
    unlearned = [IGNORED] * (len(asked) - len(earlier))
    return Sample(key, answered, [*earlier, *unlearned, *answered[len(asked) :]])


def _rendered(
    prompt: list[dict[str, str]], completion: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokens of what the model is asked with, and of the same with the answer."""
    asked = _render(tokenizer, prompt, add_generation_prompt=True)
    return asked, _render(tokenizer, [*prompt, *completion], add_generation_prompt=False)


def _messages(row: Mapping[str, Any], column: str, where: str) -> list[dict[str, str]]:
    """The messages in `column`, once they are known to be some: templates fail on others with errors of their own."""
    messages = row.get(column)
    if not messages:
        raise PipelineError(
            f"{where} has no {column}: rows need prompt and completion, or messages, lists of {{role, content}}."
        )
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
