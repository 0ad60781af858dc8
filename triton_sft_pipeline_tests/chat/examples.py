"""Traces and examples for the tests of this room."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from triton_sft_pipeline.chat.dataset import Messages, build_dataset
from triton_sft_pipeline.chat.examples import ChatDataset, Example
from triton_sft_pipeline.traces.record import RawRecord, Trace, parse_record
from triton_sft_pipeline_tests.traces.records import record


def trace(number: int = 0, **changes: Any) -> Trace:
    """A good trace about problem `number`."""
    parsed = parse_record(RawRecord("t.json", number, 0, record(number), ""))
    assert isinstance(parsed, Trace)
    return replace(parsed, **changes)


def count_characters(prompt: Messages, completion: Messages) -> tuple[int, int]:
    """A token a character: enough for all that does not load a tokenizer."""
    head = len(prompt[0]["content"])
    return head, head + len(completion[0]["content"])


def built(
    traces: list[Trace], max_tokens: int = 100_000, test_size: float = 0.1, over_budget: str = "drop"
) -> ChatDataset:
    """A dataset of traces, tokens being characters."""
    return build_dataset(traces, count_characters, max_tokens=max_tokens, test_size=test_size, over_budget=over_budget)


def example(**changes: Any) -> Example:
    """One good example."""
    return replace(built([trace(0)]).examples[0], **changes)
