"""What the host has to know of a batch, looked up before the batch goes to the device.

Asking the device for a number means to wait until it has done everything that it was told to do; meanwhile nobody tells
it anything new, and afterwards it waits in turn. Knows nothing of trainers or models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FACTS = "batch_facts"
"""Under this name a batch carries its facts; no model takes it, so it has to be taken out."""


@dataclass(frozen=True)
class BatchFacts:
    """What is known of a batch.

    Attributes:
        tokens: tokens of the batch without padding.
        padded_behind: whether padding, if any, stands behind each row's tokens.
        labels: the labels [rows, tokens], still on the host; None for a batch without.
    """

    tokens: int
    padded_behind: bool
    labels: torch.Tensor | None = None


def with_facts(collate: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """A collator whose batches are those of `collate` with their `BatchFacts` under `FACTS`."""

    def collate_with_facts(rows: Any) -> dict[str, Any]:
        batch = dict(collate(rows))
        # Behind the tensors: whoever wants to know the size of a batch asks the first entry.
        return {**batch, FACTS: facts_of(batch)}

    return collate_with_facts


def facts_of(batch: dict[str, Any]) -> BatchFacts:
    """The facts of a batch that is still on the host; it has `input_ids` [rows, tokens] and, where rows are padded, an
    `attention_mask` [rows, tokens]."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if mask is None:
        return BatchFacts(int(batch["input_ids"].numel()), True, labels)
    return BatchFacts(int(mask.sum()), padded_behind(mask), labels)


def padded_behind(mask: torch.Tensor) -> bool:
    """Whether a mask [rows, tokens] says no more than how many tokens each row begins with, one at least. Waits for the
    device that the mask is on."""
    real = mask != 0
    return bool(real[:, 0].all() & (real[:, 1:] <= real[:, :-1]).all())
