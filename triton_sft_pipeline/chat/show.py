"""What the model learns from, drawn for a person: the exact text, and which of it the loss is on.

Knows nothing of how text becomes tokens, nor of terminals: it is given both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

OPEN, CLOSE = "{+", "+}"
"""Around what is learned where there is no colour, as `git diff --word-diff` marks what was added."""

_VISIBLE = str.maketrans({" ": "\u00b7", "\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d"})


def runs(input_ids: Sequence[int], learned: Sequence[bool], tokenizer: Any) -> list[tuple[str, bool]]:
    """The text in stretches, each with whether the loss is on it."""
    pairs = list(zip(input_ids, learned, strict=True))
    return [(_text([i for i, _ in group], tokenizer), on) for on, group in groupby(pairs, key=lambda pair: pair[1])]


def marked(stretches: Iterable[tuple[str, bool]]) -> str:
    """The text with `{+` and `+}` around what is learned."""
    return "".join(f"{OPEN}{text}{CLOSE}" if on else text for text, on in stretches)


def painted(stretches: Iterable[tuple[str, bool]], paint: Callable[[str, bool], str]) -> str:
    """The text, each line of each stretch painted alone: a pager that starts in the middle still shows its colour."""
    return "".join("\n".join(paint(line, on) if line else "" for line in text.split("\n")) for text, on in stretches)


def token_lines(input_ids: Sequence[int], learned: Sequence[bool], tokenizer: Any, width: int = 80) -> list[str]:
    """Token by token, with the mask under it: `^` under what the loss is on, `.` under the rest.

    Tokens stand between bars; a space is shown as a middle dot, a line break as a return arrow. A token that is part of
    a character is shown as the tokenizer spells it.
    """
    lines: list[str] = []
    above = below = "|"
    for token, on in zip(input_ids, learned, strict=True):
        shown = _visible(token, tokenizer)
        if len(above) > 1 and len(above) + len(shown) + 1 > width:
            lines += [above, below]
            above = below = "|"
        above += f"{shown}|"
        below += ("^" if on else ".") * len(shown) + "|"
    return [*lines, above, below]


def _visible(token: int, tokenizer: Any) -> str:
    text = _text([token], tokenizer)
    if not text or "\ufffd" in text:
        text = str(tokenizer.convert_ids_to_tokens(token))
    return text.translate(_VISIBLE)


def _text(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
