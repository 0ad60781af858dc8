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


def conversation(row: dict[str, Any], early: str) -> dict[str, Any]:
    """A row of the other form: an early answer and feedback before the row's own answer."""
    repair = [{"role": "assistant", "content": early}, {"role": "user", "content": "Wrong."}]
    return {"sample_key": row["sample_key"], "messages": [*row["prompt"], *repair, *row["completion"]]}


def test_a_row_of_messages_gives_the_same_sample(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    other = [{"sample_key": r["sample_key"], "messages": r["prompt"] + r["completion"]} for r in rows]
    assert tokenize_rows(other, tokenizer, None, "train") == tokenize_rows(rows, tokenizer, None, "train")


def test_each_answer_of_a_conversation_is_learned_behind_what_the_model_is_asked_with(
    tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    row = conversation(rows[0], rows[1]["completion"][0]["content"])
    first, last = tokenize_rows([row], tokenizer, None, "train")
    assert [first.key, last.key] == ["relu/answer_1", "relu"]
    for sample, index in ((first, 1), (last, 3)):
        asked = tokenizer.apply_chat_template(row["messages"][:index], add_generation_prompt=True)["input_ids"]
        assert sample.input_ids[: len(asked)] == asked
        assert sample.labels == [IGNORED] * len(asked) + sample.input_ids[len(asked) :]
        answer = row["messages"][index]["content"].removeprefix("<think>\n") + "<|im_end|>\n"
        assert tokenizer.decode(sample.input_ids[len(asked) :]) == answer


def test_where_the_template_only_appends_one_sample_holds_all_answers(
    tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    keeping = copy.deepcopy(tokenizer)
    keeping.chat_template = tokenizer.chat_template.replace("not loop.last and ", "false and ")
    row = conversation(rows[0], rows[1]["completion"][0]["content"])
    [sample] = tokenize_rows([row], keeping, None, "train")
    trained = keeping.decode([token for token in sample.labels if token != IGNORED])
    answers = [row["messages"][i]["content"].removeprefix("<think>\n") + "<|im_end|>\n" for i in (1, 3)]
    assert trained == "".join(answers)
    assert all(label in (IGNORED, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))


def test_an_early_answer_that_does_not_continue_its_prompt_is_not_learned(
    tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    [sample] = tokenize_rows([conversation(rows[0], "<triton>\ny\n</triton>")], tokenizer, None, "train")
    own = tokenize_rows(rows[:1], tokenizer, None, "train")[0]
    assert [t for t in sample.labels if t != IGNORED] == [t for t in own.labels if t != IGNORED]
    # The last one is what the row is for.
    spoilt = {"messages": [*rows[0]["prompt"], {"role": "assistant", "content": "<triton>\ny\n</triton>"}]}
    with pytest.raises(PipelineError, match=r"train sample 0: .* answers that begin with <think>"):
        tokenize_rows([spoilt], tokenizer, None, "train")


def test_every_sample_of_a_conversation_has_to_fit(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    row = conversation(rows[0], "<think>\n" + "long " * 50 + "\n</think>\n\n<triton>\ny\n</triton>")
    first, last = tokenize_rows([row], tokenizer, None, "train")
    assert len(first.input_ids) > len(last.input_ids)
    with pytest.raises(PipelineError, match=rf"train sample relu/answer_1 has {len(first.input_ids)} tokens"):
        tokenize_rows([row], tokenizer, len(first.input_ids) - 1, "train")


@pytest.mark.parametrize("roles", [["assistant"], ["user"], ["user", "assistant", "user"]], ids="-".join)
def test_messages_that_do_not_end_with_an_answer_to_a_question_are_refused(tokenizer: Any, roles: list[str]) -> None:
    row = {"sample_key": "relu", "messages": [{"role": role, "content": "<think>\nx"} for role in roles]}
    with pytest.raises(PipelineError, match="train sample relu: messages must begin with a question and end with"):
        tokenize_rows([row], tokenizer, None, "train")


@pytest.mark.parametrize("value", [None, [], "text", [{"role": "user"}]], ids=str)
def test_a_row_of_malformed_messages_is_refused_by_name(tokenizer: Any, value: Any) -> None:
    with pytest.raises(PipelineError, match=r"train sample relu.* messages"):
        tokenize_rows([{"sample_key": "relu", "messages": value}], tokenizer, None, "train")
