"""Where an answer ends: at its own `</triton>`. Knows nothing of models and batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STOP = "</triton>"
REASONING_START, REASONING_END = "<think>", "</think>"
_TAIL_TOKENS = 32
"""Tokens that are decoded to look for `STOP`: it is 9 bytes long, so 9 tokens would do for any tokenizer; the rest is
margin.
"""


def is_answered(text: str, thinking: bool) -> bool:
    """Whether what was generated holds its whole kernel.

    A `</triton>` inside the reasoning is a draft: an answer that reasons is whole at the first one that follows
    `</think>`. One that never closes its reasoning never is.

    Args:
        text: everything generated so far.
        thinking: whether the prompt ends inside the reasoning, as Trinity's does.
    """
    if thinking or REASONING_START in text:
        _, _, text = text.partition(REASONING_END)
    return STOP in text


class StopAtTriton:
    """Tells after each token whether a row is answered, as `is_answered` means it.

    Only a token that holds a ">" is looked at, a look-up in a set, so the usual step decodes nothing. transformers'
    `stop_strings` compares every row with an embedding of the vocabulary at every step and cannot tell a draft from an
    answer.

    Args:
        tokenizer: decodes the rows.
        thinking: see `is_answered`.
    """

    def __init__(self, tokenizer: Any, thinking: bool) -> None:
        self._tokenizer = tokenizer
        self._thinking = thinking
        # Byte-level and SentencePiece vocabularies both write ">" as itself.
        self._closing = frozenset(token for text, token in tokenizer.get_vocab().items() if ">" in text)

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the last of these generated tokens completed the answer."""
        if not tokens or tokens[-1] not in self._closing:
            return False
        if STOP not in self._tokenizer.decode(tokens[-_TAIL_TOKENS:]):
            return False
        return is_answered(self._tokenizer.decode(tokens), self._thinking)
