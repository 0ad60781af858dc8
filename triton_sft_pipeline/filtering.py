"""The filter for a person at a terminal, as the command line and `main` run it: with bars, the funnel printed, and the
token budget where a preset is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from triton_sft_pipeline.config import Config, held_out_problems
from triton_sft_pipeline.progress import progress_bar
from triton_sft_pipeline.traces import Filtered, Trace, describe, filter_location


def filter_with_progress(
    config: Config,
    location: str | Path | Sequence[str | Path],
    *,
    token_budget: bool = False,
    workplace: Path | None = None,
    origin: str | None = None,
) -> Filtered:
    """The filter as `filtered_traces` runs it, with bars on a terminal; prints the funnel.

    Args:
        token_budget: drop what is over the configuration's training.max_length, too, as its tokenizer counts.
        workplace, origin: see `filter_location`.
    """
    with progress_bar("reading", unit="B") as read, progress_bar("comparing kernels") as compared:
        filtered = filter_location(
            location,
            config.filter,
            held_out_problems(config),
            extra_steps=[_budget_step(config)] if token_budget else [],
            workplace=workplace,
            origin=origin,
            on_bytes=read,
            on_compared=compared,
        )
    print(describe(filtered))
    return filtered


def _budget_step(config: Config) -> tuple[str, Callable[[Trace], str | None]]:
    """The step that refuses what would not fit a training sample."""
    from triton_sft_pipeline.chat.dataset import messages_of
    from triton_sft_pipeline.chat.tokens import load_tokenizer, token_counter

    count = token_counter(load_tokenizer(config.model.base_model, config.model.revision))
    budget = config.training.max_length

    def over_budget(trace: Trace) -> str | None:
        _, tokens = count(*messages_of(trace.pytorch_code, trace.reasoning or "", trace.triton_code))
        if tokens <= budget:
            return None
        return f"{tokens:,} tokens, {tokens - budget:,} over the budget of {budget:,} ({config.preset})"

    return "over_budget", over_budget
