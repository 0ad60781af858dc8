"""What a model would learn to write: is there a reasoning, is it one, and can the kernel be read back from the answer.

Knows the answer's form (`<think>`, `<triton>`) and the chat format's control tokens, but no tokenizer.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter

from triton_sft_pipeline.traces.reasoning import THINK_CLOSE, TRITON_CLOSE
from triton_sft_pipeline.traces.record import Trace

CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
"""Text that a tokenizer turns into the end of a turn or of the text, wherever it stands."""

_APOSTROPHE = "['\u2019]"
_CANNOT = (
    rf"(?:can{_APOSTROPHE}t|cannot|can not|won{_APOSTROPHE}t|will not|(?:am|{_APOSTROPHE}m) (?:unable|not able) to)"
)
_REFUSALS = (
    # Only at the very beginning: a reasoning may well say later that a kernel cannot do something.
    re.compile(
        rf"\s*(?:i{_APOSTROPHE}m|i am|we{_APOSTROPHE}re|we are)?\s*(?:so |very )?sorry\b[^.\n]{{0,40}}?\b{_CANNOT}",
        re.I,
    ),
    re.compile(rf"\s*i apologi[sz]e\b[^.\n]{{0,60}}?\b{_CANNOT}", re.I),
    re.compile(rf"\s*i {_CANNOT} (?:help|assist|comply|fulfil|do that|provide|complete|continue)", re.I),
    re.compile(r"\s*as an ai\b", re.I),
    re.compile(r"\s*(?:error:\s*)?(?:generation failed|request timed out|rate limit|internal server error)\b", re.I),
)
# How gpt-oss ends a reasoning that declines.
_DECLINES = re.compile(
    r"\b(?:must|should|will|need to) (?:refuse|decline)(?: to (?:help|comply|answer))?\s*[.!]?\s*\Z", re.I
)

_LEAST_LOOP = 500
_MOST_READ = 200_000
_SUSPICIOUS = 0.35
_GRAM = 8
_TIMES = 4
_LOOP_SHARE = 0.5
# Letters of scripts that are written without spaces stand alone, and an endless word is many words.
_TOKEN = re.compile(r"[\u3040-\u9fff]|\w{1,16}|[^\w\s]")
_DIGITS = re.compile(r"\d+")


def refusal(reasoning: str) -> str | None:
    """How a reasoning declines the task or reports that there is none, or None."""
    for pattern in _REFUSALS:
        if found := pattern.match(reasoning):
            return f"the reasoning begins with {_shown(found.group())}"
    if found := _DECLINES.search(reasoning[-200:]):
        return f"the reasoning ends with {_shown(found.group())}"
    return None


def loop(reasoning: str) -> str | None:
    """How much of a reasoning repeats itself, when that is more than half; None for any other.

    A passage counts as repeated when its 8 words (numbers are all alike, as a loop may count) occur 4 times or more: a
    draft of the code, its correction and the final version are no loop. Of a very long text only the end is read.
    """
    if len(reasoning) < _LEAST_LOOP:
        return None
    # A loop, once entered, goes on to the end; and memory must not follow the length of a text.
    reasoning = reasoning[-_MOST_READ:]
    data = reasoning.encode("utf-8", "replace")
    # Text that is half repetition compresses below this share; most texts are settled here, at 100 MB/s.
    if len(zlib.compress(data, 1)) > _SUSPICIOUS * len(data):
        return None
    tokens = _TOKEN.findall(_DIGITS.sub("0", reasoning))
    grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
    counts = Counter(grams)
    covered = bytearray(len(tokens))
    for index, gram in enumerate(grams):
        if counts[gram] >= _TIMES:
            covered[index : index + _GRAM] = b"\x01" * _GRAM
    share = sum(covered) / len(tokens) if tokens else 0.0
    if share <= _LOOP_SHARE:
        return None
    gram, times = counts.most_common(1)[0]
    return f"{share:.0%} of the reasoning repeats itself; {_shown(' '.join(gram))} stands there {times} times"


def unreadable(trace: Trace) -> str | None:
    """Why the answer made of this trace could not be read back as it was written, or None."""
    code, reasoning = trace.triton_code, trace.reasoning or ""
    for tag in (TRITON_CLOSE, THINK_CLOSE):
        if tag in code:
            return f"the code holds {tag}, where a reader takes it to end"
    if code.strip().startswith("```"):
        return "the code is a Markdown fence, which a reader takes off"
    if THINK_CLOSE in reasoning:
        return f"the reasoning holds {THINK_CLOSE}, where a reader takes it to end"
    for name, text in (("code", code), ("reasoning", reasoning), ("PyTorch code", trace.pytorch_code)):
        token = next((t for t in CONTROL_TOKENS if t in text), None)
        if token:
            return f"the {name} holds {token}, which ends a message"
    return None


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
