"""From kept traces to a dataset directory in one call: what the command line and a training without Dagster share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from triton_sft_pipeline.chat.card import about
from triton_sft_pipeline.chat.dataset import build_dataset, write_dataset
from triton_sft_pipeline.chat.examples import ChatDataset
from triton_sft_pipeline.chat.quality import dataset_faults
from triton_sft_pipeline.chat.settings import DatasetSettings
from triton_sft_pipeline.chat.tokens import load_tokenizer, token_counter
from triton_sft_pipeline.errors import GateError, PipelineError
from triton_sft_pipeline.traces.record import Trace


def make_dataset(
    kept: Iterable[Trace],
    directory: Path,
    settings: DatasetSettings,
    *,
    base_model: str,
    revision: str | None,
    max_length: int,
    held_out: Mapping[str, str],
    filtered: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ChatDataset:
    """Build the chat dataset of kept traces into `directory`, under the same gates as the asset.

    Args:
        base_model, revision: whose tokenizer and chat template count.
        max_length: most tokens a row may have.
        held_out: fingerprint -> name of the held-out problems.
        filtered: the filter's output directory, whose funnel the card tells; None: it tells none.
        progress: called with (traces done, traces in all).

    Raises:
        PipelineError: there are no traces, or one is over the budget and that is to fail.
        GateError: a gate does not hold; nothing is written.
    """
    kept = list(kept)
    if not kept:
        raise PipelineError("there are no filtered traces to build a dataset of; `triton-sft filter` says why.")
    dataset = build_dataset(
        kept,
        token_counter(load_tokenizer(base_model, revision)),
        max_tokens=max_length,
        test_size=settings.test_size,
        over_budget=settings.over_budget,
        multi_turn=settings.multi_turn,
        progress=progress,
    )
    faults = dataset_faults(dataset, max_length, held_out)
    failed = {name: fault for name, fault in faults.items() if fault}
    if failed:
        raise GateError(" ".join(f"{name}: {fault}" for name, fault in failed.items()), next(iter(failed)))
    write_dataset(dataset, directory, settings.form, about(base_model, max_length, settings.license, filtered))
    return dataset
