"""Tokens to text as they appear, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_UNFINISHED = "\ufffd"
"""What decoders write for the first bytes of a character whose last are still to come."""


class TextPieces:
    """Hands out the text of growing tokens in pieces that add up to the whole.

    Each piece is the difference of two decodings of the last few tokens, because a tokenizer may decode a token in
    another way at the beginning of a text than inside it (SentencePiece drops the first space).

    Args:
        tokenizer: decodes.
        lead: text that stands before the first token; it is handed out at once.
        show: is given each piece.
    """

    def __init__(self, tokenizer: Any, lead: str, show: Callable[[str], None]) -> None:
        self._tokenizer, self._show = tokenizer, show
        self._shown = ""
        self._context = self._end = 0
        self._write(lead)

    def add(self, tokens: Sequence[int]) -> None:
        """Everything generated so far, one token more than at the last call. The last token is held back: an end token
        is no text."""
        tokens = tokens[:-1]
        known = self._tokenizer.decode(tokens[self._context : self._end])
        longer = self._tokenizer.decode(tokens[self._context :])
        if len(longer) > len(known) and longer.startswith(known) and not longer.endswith(_UNFINISHED):
            self._context, self._end = self._end, len(tokens)
            self._write(longer[len(known) :])

    def close(self, text: str) -> None:
        """Hand out what is missing of the whole text."""
        if text.startswith(self._shown):
            self._write(text[len(self._shown) :])

    def _write(self, piece: str) -> None:
        if piece:
            self._shown += piece
            self._show(piece)
