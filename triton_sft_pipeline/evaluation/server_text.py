"""An answer while it arrives from a server: its text as the same model would have written it here, and where it ends.

Pure text: knows nothing of connections. Servers differ in what they send of the reasoning: vLLM and SGLang with a
reasoning parser send it apart and drop its tags; without one, what the chat template itself wrote (an open `<think>`)
is part of the prompt, so the text begins in the middle of the reasoning.
"""

from __future__ import annotations

from triton_sft_pipeline.evaluation.stopping import REASONING_END, REASONING_START, STOP


class StreamedAnswer:
    """The pieces of one answer, put together.

    Args:
        opening: the beginning of the answer that the chat template writes: "<think>" and a newline, or "" where it
            writes none; None where nobody knows. Then an answer that closes a reasoning that it never opened was
            opened by the template, and what precedes a `</think>` that may still come is not taken for the answer.
    """

    def __init__(self, opening: str | None) -> None:
        self._opening = opening
        self._reasoning = ""
        self._content = ""

    def add(self, reasoning: str, content: str) -> bool:
        """Append what arrived; whether the answer is complete, so that the connection may be closed."""
        self._reasoning += reasoning
        self._content += content
        # Only a piece that closes a tag can complete the answer: the long text is not searched for every token.
        return ">" in content and self._end(final=False) is not None

    def finish(self) -> tuple[str, bool]:
        """The whole text, cut behind the `</triton>` that ends it, and whether there is such a `</triton>`."""
        end = self._end(final=True)
        return self._text(self._content if end is None else self._content[:end]), end is not None

    def _end(self, final: bool) -> int | None:
        """Where in the content the answer ends: behind the first `</triton>` that is no draft in the reasoning."""
        start = 0
        if not self._reasoning and (self._opening != "" or REASONING_START in self._content):
            closed = self._content.find(REASONING_END)
            if closed >= 0:
                start = closed + len(REASONING_END)
            elif not (final and self._opening is None and REASONING_START not in self._content):
                return None
        stop = self._content.find(STOP, start)
        return None if stop < 0 else stop + len(STOP)

    def _text(self, content: str) -> str:
        if self._reasoning:
            return self._joined(content)
        if content.lstrip().startswith(REASONING_START):
            return content
        if self._opening is None:
            return f"{REASONING_START}\n{content}" if REASONING_END in content else content
        return self._opening + content

    def _joined(self, content: str) -> str:
        """Reasoning and content with the tags that the server's parser took away."""
        text = self._reasoning
        if not text.lstrip().startswith(REASONING_START):
            text = f"{REASONING_START}\n" + text.removeprefix("\n")
        if not content or content.lstrip().startswith(REASONING_END):
            return text + content
        text += "" if text.endswith("\n") else "\n"
        return f"{text}{REASONING_END}" + (content if content.startswith("\n") else f"\n\n{content}")
