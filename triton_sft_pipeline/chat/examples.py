"""What a chat dataset is while it is in memory: examples in a fixed order, and what was left out.

Knows nothing of how they are made, or of the files that they lie in.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from triton_sft_pipeline.chat.conversation import Messages
from triton_sft_pipeline.files import hash_json


@dataclass(frozen=True)
class Example:
    """One row of the chat dataset.

    Attributes:
        prompt, completion: one user turn, one assistant turn, each {"role", "content"}; the prompt of a repair
            conversation ends in its last feedback.
        problem: fingerprint of the PyTorch module.
        trace: version of the trace that it was made from.
        prompt_tokens: tokens before the last answer, as the preset's chat template and tokenizer count them.
        completion_tokens: tokens that the loss is on. Of a conversation those of every answer that is learned.
        tokens: most tokens that are read at once: the budget is for these. Of a single turn the sum of the two.
    """

    prompt: Messages
    completion: Messages
    split: str
    sample_key: str
    source: str | None
    problem: str
    trace: str
    speedup: float | None
    file: str
    prompt_tokens: int
    completion_tokens: int
    tokens: int

    @property
    def messages(self) -> Messages:
        """The whole conversation."""
        return self.prompt + self.completion

    @property
    def version(self) -> str:
        """Hash of the row. The file's name is lineage, not content: renaming it makes nothing stale. Nor is it content
        which columns hold the conversation, because the same is learned.
        """
        content = asdict(self)
        del content["file"]
        return hash_json(content)


@dataclass(frozen=True)
class OverBudget:
    """A trace that would not fit the model's context: never cut, so left out."""

    sample_key: str
    file: str
    position: int
    tokens: int
    budget: int

    @property
    def detail(self) -> str:
        return f"{self.tokens:,} tokens, {self.tokens - self.budget:,} over the budget of {self.budget:,}"


@dataclass(frozen=True)
class ChatDataset:
    """Examples in a fixed order, and what was left out."""

    examples: list[Example]
    over_budget: list[OverBudget]

    def split(self, name: str) -> list[Example]:
        return [e for e in self.examples if e.split == name]

    @property
    def data_version(self) -> str:
        return hash_json([e.version for e in self.examples])
