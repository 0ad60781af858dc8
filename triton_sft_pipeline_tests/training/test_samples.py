"""The loss covers the completion and nothing else, and nothing is cut."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.training.samples import IGNORED, tokenize_rows


@pytest.fixture(scope="module")
def tokenizer(afmoe_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(afmoe_dir)


def test_the_loss_mask_covers_exactly_the_completion(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    for row, sample in zip(rows, tokenize_rows(rows, tokenizer, None, "train"), strict=True):
        trained = [token for token, label in zip(sample.input_ids, sample.labels, strict=True) if label != IGNORED]
        # The prompt ends in "<think>\n", so the completion begins after it and ends with the end of the turn.
        expected = row["completion"][0]["content"].removeprefix("<think>\n") + "<|im_end|>\n"
        assert tokenizer.decode(trained) == expected
        assert [label for label in sample.labels if label != IGNORED] == trained
        first = sample.labels.index(trained[0])
        assert all(label == IGNORED for label in sample.labels[:first])
        assert all(label != IGNORED for label in sample.labels[first:])
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        assert sample.input_ids[:first] == prompt


def test_a_row_is_one_document(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    assert {sample.documents for sample in tokenize_rows(rows, tokenizer, None, "train")} == {()}


def test_the_labels_that_reach_the_model_are_those(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    samples = tokenize_rows(rows, tokenizer, None, "train")
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(
        [{"input_ids": sample.input_ids, "labels": sample.labels} for sample in samples]
    )
    for labels, sample in zip(batch["labels"].tolist(), samples, strict=True):
        assert labels[: len(sample.labels)] == sample.labels
        assert set(labels[len(sample.labels) :]) <= {IGNORED}


def test_a_sample_that_is_too_long_is_refused_by_name_and_not_cut(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    lengths = [len(sample.input_ids) for sample in tokenize_rows(rows, tokenizer, None, "train")]
    longest = rows[lengths.index(max(lengths))]["sample_key"]
    assert [len(s.input_ids) for s in tokenize_rows(rows, tokenizer, max(lengths), "train")] == lengths
    with pytest.raises(
        PipelineError,
        match=rf"train sample {longest} has {max(lengths)} tokens, .*training.max_length \({max(lengths) - 1}\)",
    ):
        tokenize_rows(rows, tokenizer, max(lengths) - 1, "train")


def test_a_template_that_drops_the_reasoning_is_refused(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    stripping = copy.deepcopy(tokenizer)
    stripping.chat_template = tokenizer.chat_template.replace("not loop.last and ", "")
    with pytest.raises(PipelineError, match="renders the prompt differently"):
        tokenize_rows(rows, stripping, None, "train")


def test_an_answer_that_does_not_begin_as_the_prompt_ends_is_refused(
    tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    answer = {"role": "assistant", "content": "<triton>\ndef kernel(): no reasoning\n</triton>"}
    with pytest.raises(PipelineError, match="answers that begin with <think>"):
        tokenize_rows([{**rows[0], "completion": [answer]}], tokenizer, None, "train")


@pytest.mark.parametrize("column", ["prompt", "completion"])
@pytest.mark.parametrize("value", [None, [], ""])
def test_a_row_without_prompt_or_completion_is_refused_by_name(
    tokenizer: Any, rows: list[dict[str, Any]], column: str, value: Any
) -> None:
    with pytest.raises(PipelineError, match=f"test sample gelu has no {column}"):
        tokenize_rows([{**rows[4], column: value}], tokenizer, None, "test")


@pytest.mark.parametrize("column", ["prompt", "completion"])
@pytest.mark.parametrize(
    "value",
    [
        "text",
        ["text"],
        {"role": "user", "content": "text"},
        [{"role": "user"}],
        [{"content": "text"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 3}],
    ],
    ids=str,
)
def test_a_malformed_conversation_is_refused_by_name(
    tokenizer: Any, rows: list[dict[str, Any]], column: str, value: Any
) -> None:
    with pytest.raises(PipelineError, match=rf"train sample relu: {column} must be a list of {{role, content}}"):
        tokenize_rows([{**rows[0], column: value}], tokenizer, None, "train")


def test_a_row_without_a_name_is_known_by_its_position(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    nameless = {name: rows[0][name] for name in ("prompt", "completion")}
    assert [sample.key for sample in tokenize_rows([nameless, rows[1]], tokenizer, None, "train")] == [
        "0",
        rows[1]["sample_key"],
    ]
    with pytest.raises(PipelineError, match="train row 1 is a str"):
        tokenize_rows([nameless, "row"], tokenizer, None, "train")  # type: ignore[list-item]
