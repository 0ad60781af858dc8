"""`chat_dataset`: the kept traces as conversations, split by problem, within the token budget."""

import heapq
from collections.abc import Iterator
from typing import Any

import dagster as dg

from triton_sft_pipeline.assets.common import GROUP, SHOWN, TrialConfig, settings_for, sign_run, source_markdown
from triton_sft_pipeline.assets.gates import Gate, enforce, gate_specs, told_plainly
from triton_sft_pipeline.assets.plots import histogram_markdown, table_markdown
from triton_sft_pipeline.automation import when_stale
from triton_sft_pipeline.chat.card import CARD_FILE, about
from triton_sft_pipeline.chat.dataset import build_dataset, write_dataset
from triton_sft_pipeline.chat.examples import ChatDataset, Example
from triton_sft_pipeline.chat.prompt import parse_answer, pytorch_code_of
from triton_sft_pipeline.chat.quality import dataset_faults
from triton_sft_pipeline.chat.tokens import load_tokenizer, token_counter
from triton_sft_pipeline.config import Config, code_versions, held_out_fingerprints
from triton_sft_pipeline.resources import StoreResource
from triton_sft_pipeline.storage import Artifact
from triton_sft_pipeline.traces import read_kept

KEY = "chat_dataset"
PARENT = "filtered_traces"

GATES = {
    "format": "Every row is one user turn and one assistant turn (of a repair conversation several, in turns), and the "
    "last holds a reasoning and a kernel in their tags.",
    "token_budget": "No row is over `training.max_length` tokens, and the train split is not empty. "
    "Nothing is ever cut.",
    "no_overlap": "No problem stands in two of train, test and the held-out problems.",
}


def build_dataset_asset(active: Config) -> Any:
    """The chat dataset under this configuration."""

    @dg.asset(
        key=KEY,
        deps=[PARENT],
        group_name=GROUP,
        kinds={"python", "parquet"},
        tags={"domain": "chat"},
        code_version=code_versions(active)[KEY],
        automation_condition=when_stale(),
        check_specs=gate_specs(KEY, GATES),
        description="train.parquet and test.parquet in the field's conversational form (prompt, completion; messages "
        "where `dataset.form` says so), with lineage, token counts and a dataset card. All traces of one problem are "
        "on one side of the split.",
    )
    def chat_dataset(context: dg.AssetExecutionContext, config: TrialConfig, store: StoreResource) -> Iterator[Any]:
        sign_run(context)
        settings = settings_for(active, config)
        with told_plainly():
            parent = store.open().require(PARENT)
            tokenizer = load_tokenizer(settings.model.base_model, settings.model.revision)
            budget = settings.training.max_length
            dataset = build_dataset(
                read_kept(parent.path),
                token_counter(tokenizer),
                max_tokens=budget,
                test_size=settings.dataset.test_size,
                over_budget=settings.dataset.over_budget,
                multi_turn=settings.dataset.multi_turn,
            )
            for left_out in dataset.over_budget:
                context.log.warning(
                    "%s, record %d (%s): %s", left_out.file, left_out.position, left_out.sample_key, left_out.detail
                )
            with store.open().building(KEY) as draft:
                told = about(settings.model.base_model, budget, settings.dataset.license, parent.path)
                write_dataset(dataset, draft.path, settings.dataset.form, told)
                held = yield from enforce(KEY, gates(dataset, budget, held_out_fingerprints(settings)))
                artifact = draft.promote(
                    dataset.data_version,
                    code_versions(settings)[KEY],
                    inputs={PARENT: parent.data_version},
                    record={
                        "settings": settings.dataset.model_dump(mode="json"),
                        "max_length": budget,
                        "counts": counts(dataset),
                    },
                )
        yield dg.MaterializeResult(
            data_version=dg.DataVersion(artifact.data_version),
            check_results=held,
            metadata=_metadata(dataset, settings.dataset.form, budget, artifact),
        )

    return chat_dataset


def counts(dataset: ChatDataset) -> dict[str, int]:
    """Rows by split, and what was left out."""
    train, test = dataset.split("train"), dataset.split("test")
    return {"train": len(train), "test": len(test), "over_budget": len(dataset.over_budget)}


def gates(dataset: ChatDataset, budget: int, held_out: dict[str, str]) -> list[Gate]:
    """The conditions under which a dataset may be trained on."""
    faults = dataset_faults(dataset, budget, held_out)
    holds = {
        "format": f"All {len(dataset.examples)} rows hold.",
        "token_budget": f"No row is over {budget:,} tokens; {len(dataset.over_budget)} samples were left out for it.",
        "no_overlap": "No problem stands on two sides.",
    }
    left_out = {"left_out": [f"{o.sample_key}: {o.detail}" for o in dataset.over_budget[:20]]}
    return [
        Gate(name, not faults[name], faults[name] or holds[name], left_out if name == "token_budget" else {})
        for name in GATES
    ]


def _metadata(dataset: ChatDataset, form: str, budget: int, artifact: Artifact) -> dict[str, Any]:
    tokens = {name: [e.tokens for e in dataset.split(name)] for name in ("train", "test")}
    every = sorted(tokens["train"] + tokens["test"])
    split = table_markdown(
        ["split", "rows", "problems"],
        [[n, len(dataset.split(n)), len({e.problem for e in dataset.split(n)})] for n in ("train", "test")],
    )
    return {
        "dagster/row_count": len(dataset.examples),
        **counts(dataset),
        "form": form,
        "tokens_median": every[len(every) // 2],
        "tokens_max": every[-1],
        "tokens_total": sum(every),
        "splits": dg.MetadataValue.md(split),
        "token_lengths": dg.MetadataValue.md(histogram_markdown(tokens, "tokens a row", budget)),
        "path": dg.MetadataValue.path(str(artifact.path)),
        "card": dg.MetadataValue.path(str(artifact.path / CARD_FILE)),
        "samples": dg.MetadataValue.md(_samples(dataset)),
    }


def _samples(dataset: ChatDataset) -> str:
    """The shortest ones, those first that are faster than PyTorch."""
    shortest = heapq.nsmallest(SHOWN, dataset.examples, key=lambda e: ((e.speedup or 0) <= 1, e.tokens))
    return "\n\n".join(map(_sample, shortest))


def _sample(example: Example) -> str:
    answer = parse_answer(example.completion[0]["content"])
    pytorch_code = pytorch_code_of(example.prompt[0]["content"])
    title = f"{example.sample_key}, {example.tokens:,} tokens"
    return source_markdown(title, pytorch_code, answer.reasoning or "", answer.code or "")
