"""A batch of rows, token by token, with the model library's own cache: a row that has ended leaves the batch.

Knows nothing of prompts as text, of settings, or of what the answers are for. The library's `generate` keeps ended rows
until the last one has ended, hands them out only then, and samples all of them from one stream of random numbers.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from triton_sft_pipeline.evaluation.sampling import Sampler


@dataclass
class Row:
    """One answer in the making.

    Attributes:
        number: what the caller knows it by.
        prompt: tokens of the prompt, at least one.
        room: tokens that may be generated, at least one.
        seed: of its sampling.
        tokens: generated so far, the end token included.
        stopped: empty while it runs, then "stop", "eos" or "length".
        seconds: its share of the wall time: a step counts for the rows that ran in it, in equal parts.
    """

    number: int
    prompt: list[int]
    room: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    stopped: str = ""
    seconds: float = 0.0


def decode(
    model: Any,
    rows: Sequence[Row],
    *,
    temperature: float,
    top_p: float,
    pad: int,
    ends: frozenset[int],
    answered: Callable[[Sequence[int]], bool],
    on_token: Callable[[Row], None] | None = None,
    on_step: Callable[[Sequence[int]], None] | None = None,
    on_end: Callable[[Row], None],
) -> None:
    """Generate every row to its end.

    Args:
        model: a causal language model in evaluation mode; the caller has switched gradients off.
        rows: what is asked, changed in place.
        temperature: 0 is greedy.
        top_p: the nucleus that is sampled from.
        pad: a token to fill up prompts with; it is masked.
        ends: tokens that end a turn.
        answered: whether these generated tokens are a whole answer.
        on_token: called after each token of each row.
        on_step: called after each step with the tokens that every row has which goes on; before `on_end`.
        on_end: called the moment that a row has ended.
    """
    import torch

    device = model.get_input_embeddings().weight.device
    width = max(len(row.prompt) for row in rows)
    # Left padding: every row's last prompt token is in the last column, and positions count from its first token.
    inputs = torch.tensor([[pad] * (width - len(row.prompt)) + row.prompt for row in rows], device=device)
    lengths = torch.tensor([[len(row.prompt)] for row in rows], device=device)
    columns = torch.arange(width, device=device)
    mask = (columns >= width - lengths).long()
    positions = (columns - (width - lengths)).clamp(min=0)
    sampler = Sampler([row.seed for row in rows], max(row.room for row in rows), temperature, top_p, device)
    last_only = _last_logits_only(model)
    running, cache = list(rows), None
    while True:
        began = time.perf_counter()
        output = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **last_only,
        )
        cache, chosen = output.past_key_values, sampler(output.logits[:, -1])
        del output
        written: list[int] = chosen.tolist()
        share = (time.perf_counter() - began) / len(running)
        for row, token in zip(running, written, strict=True):
            _take(row, token, share, ends, answered)
            if on_token:
                on_token(row)
        left = [i for i, row in enumerate(running) if not row.stopped]
        if on_step:
            on_step([len(running[i].tokens) for i in left])
        for row in running:
            if row.stopped:
                on_end(row)
        if not left:
            return
        if len(left) < len(running):
            running = [running[i] for i in left]
            kept = torch.tensor(left, device=device)
            cache.batch_select_indices(kept)
            sampler.keep(kept)
            chosen, mask, positions = chosen[kept], mask[kept], positions[kept]
        inputs, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)


def _take(
    row: Row, token: int, seconds: float, ends: frozenset[int], answered: Callable[[Sequence[int]], bool]
) -> None:
    """One more token for a row, and whether that was its last."""
    row.tokens.append(token)
    row.seconds += seconds
    if token in ends:
        row.stopped = "eos"
    elif answered(row.tokens):
        row.stopped = "stop"
    elif len(row.tokens) >= row.room:
        row.stopped = "length"


def _last_logits_only(model: Any) -> dict[str, Any]:
    """The option that spares the logits of a prompt's every token, which can be gigabytes, where the model has it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}
