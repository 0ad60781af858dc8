"""Traces become examples: the split, the token budget, the form, and the files."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_sft_pipeline.chat.conversation import Messages
from triton_sft_pipeline.chat.dataset import (
    ChatDataset,
    NotContinued,
    build_dataset,
    format_faults,
    overlaps,
    read_examples,
    split_problems,
    write_dataset,
)
from triton_sft_pipeline.chat.prompt import assistant_message, user_message
from triton_sft_pipeline.chat.settings import Form
from triton_sft_pipeline.chat.tokens import load_tokenizer, token_counter
from triton_sft_pipeline.config import data_dir
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.traces.record import RawRecord, Trace, parse_record
from triton_sft_pipeline_tests.chat.conversations import repaired
from triton_sft_pipeline_tests.chat.examples import built, count_characters, example, trace


@given(st.lists(st.text(min_size=1), max_size=40), st.floats(0, 0.99), st.randoms(use_true_random=False))
def test_the_split_is_the_same_in_any_order_and_counts_every_problem_once(
    problems: list[str], size: float, order: random.Random
) -> None:
    test = split_problems(problems, size)
    shuffled = problems + problems[:3]
    order.shuffle(shuffled)
    assert split_problems(shuffled, size) == test <= set(problems)


@pytest.mark.parametrize(
    ("problems", "size", "expected"),
    [
        (0, 0.1, 0),
        (1, 0.5, 0),
        (2, 0.1, 1),
        (2, 0.99, 1),
        (10, 0.1, 1),
        (15, 0.1, 2),
        (40, 0.1, 4),
        (40, 0.0, 0),
        (3, 0.99, 2),
    ],
)
def test_the_test_split_has_its_share_of_the_problems_and_leaves_some_to_train_on(
    problems: int, size: float, expected: int
) -> None:
    assert len(split_problems([f"p{i}" for i in range(problems)], size)) == expected


def test_a_new_problem_moves_at_most_the_boundary() -> None:
    before = split_problems([f"p{i}" for i in range(100)], 0.1)
    after = split_problems([f"p{i}" for i in range(101)], 0.1)
    assert len(before ^ after) <= 2


def test_all_traces_of_a_problem_are_on_one_side() -> None:
    traces = [
        trace(number, sample_key=f"{number}_{copy}", triton_code=f"# {copy}")
        for number in range(12)
        for copy in range(3)
    ]
    dataset = built(traces, test_size=0.25)
    assert len(dataset.examples) == 36 and len(dataset.split("test")) == 9
    assert {e.problem for e in dataset.split("train")}.isdisjoint(e.problem for e in dataset.split("test"))


def test_the_dataset_is_the_same_in_any_order() -> None:
    traces = [trace(number, sample_key="same") for number in range(12)]
    shuffled = random.Random(1).sample(traces, len(traces))
    assert built(shuffled) == built(traces)
    assert built(shuffled).data_version == built(traces).data_version


def test_two_copies_of_a_trace_keep_their_order_whatever_the_input_s() -> None:
    copies = [trace(1, file=name, position=at) for name, at in (("b.json", 0), ("a.json", 7), ("a.json", 2))]
    assert [e.file for e in built(copies).examples] == ["a.json", "a.json", "b.json"]
    assert built(copies[::-1]) == built(copies)


def test_the_shipped_sample_keeps_its_rows_and_its_version() -> None:
    """Whatever is trained on it is stale the moment this number changes."""
    path = data_dir() / "reasoning_traces.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    parsed = [parse_record(RawRecord(str(path), n, 0, value, "")) for n, value in enumerate(records)]
    correct = [t for t in parsed if isinstance(t, Trace) and t.correctness and t.reasoning]
    count = token_counter(load_tokenizer(str(data_dir() / "tiny_base")))
    dataset = build_dataset(correct, count, max_tokens=640, test_size=0.1, over_budget="drop")
    assert [len(dataset.split(s)) for s in ("train", "test")] == [28, 3]
    assert sum(e.tokens for e in dataset.examples) == 11703
    assert dataset.data_version == "66761776d9197aef174ba658103051b9a827a448f989372ca509a4d17fb8636e"


def test_the_version_follows_the_rows_and_not_the_name_of_the_file() -> None:
    traces = [trace(number) for number in range(4)]
    version = built(traces).data_version
    assert built([replace(t, file="moved.json") for t in traces]).data_version == version
    assert built([*traces[:3], replace(traces[3], reasoning="Otherwise.")]).data_version != version
    assert built(traces[:3]).data_version != version


def test_an_example_says_what_was_asked_and_where_it_came_from() -> None:
    found = trace(7)
    [made] = built([found]).examples
    assert made.prompt == [{"role": "user", "content": user_message(found.pytorch_code)}]
    assert made.completion == [
        {"role": "assistant", "content": assistant_message(found.reasoning or "", found.triton_code)}
    ]
    assert (made.sample_key, made.source, made.problem, made.trace) == (
        "sample_7",
        "kernelbook",
        found.problem,
        found.version,
    )
    assert (made.split, made.speedup, made.file) == ("train", 1.5, "t.json")
    assert (
        made.tokens
        == made.prompt_tokens + made.completion_tokens
        == sum(len(m[0]["content"]) for m in (made.prompt, made.completion))
    )


def test_a_sample_over_the_budget_is_left_out_with_its_reason_and_never_cut() -> None:
    long = trace(1, reasoning="word " * 400)
    budget = built([trace(2)]).examples[0].tokens
    dataset = built([long, trace(2)], max_tokens=budget)
    assert [e.sample_key for e in dataset.examples] == ["sample_2"]
    [left_out] = dataset.over_budget
    assert (left_out.sample_key, left_out.file, left_out.position, left_out.budget) == ("sample_1", "t.json", 1, budget)
    assert left_out.detail == f"{left_out.tokens:,} tokens, {left_out.tokens - budget:,} over the budget of {budget:,}"


def test_a_sample_over_the_budget_fails_the_run_when_that_is_asked_for() -> None:
    long = [trace(n, reasoning="word " * 400) for n in (1, 2)]
    with pytest.raises(
        PipelineError, match=r"t\.json: record 1 \(sample_1\) has [\d,]+ tokens, .* and 1 more .* training\.max_length"
    ):
        built([trace(3), *long], max_tokens=1500, over_budget="fail")


def test_the_split_is_made_of_what_is_left() -> None:
    long = [trace(n, reasoning="word " * 400) for n in range(18)]
    dataset = built([*long, trace(20), trace(21)], max_tokens=1500)
    assert [len(dataset.split(s)) for s in ("train", "test")] == [1, 1]


def test_progress_counts_every_trace() -> None:
    seen: list[tuple[int, int]] = []
    build_dataset(
        [trace(1), trace(2)],
        count_characters,
        max_tokens=1,
        test_size=0.1,
        over_budget="drop",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_a_good_example_has_no_faults() -> None:
    assert format_faults(example()) == []
    assert (
        format_faults(example(completion=answer(assistant_message("a <triton> and </think>", "a = '<triton>'")))) == []
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<triton>\ncode\n</triton>", "does not begin with a <think> block"),
        ("<think>\n\n</think>\n\n<triton>\ncode\n</triton>", "does not begin with a <think> block"),
        ("<think>\nr\n</think>\n\n```python\ndef f(): ...\n```", "does not end in a <triton> block"),
        ("<think>\nr\n</think>\n\n<triton>\ncode", "does not end in a <triton> block"),
        ("<think>\nr\n</think>\n\n<triton>\n</triton>", "does not end in a <triton> block"),
        (assistant_message("r", "a = 1\n</triton>\nb = 2"), "cannot be read back"),
        (assistant_message("r", "a = 1\n# </think>\nb = 2"), "a <triton> block"),
        (assistant_message("r", "```python\ncode\n```"), "cannot be read back"),
    ],
)
def test_an_answer_of_another_form_is_a_fault(text: str, fault: str) -> None:
    faults = format_faults(example(completion=answer(text)))
    assert any(fault in found for found in faults), faults


def test_a_conversation_out_of_turn_is_a_fault() -> None:
    question, reply = example().prompt, example().completion
    assert format_faults(example(prompt=[*question, *reply, *question])) == []
    for prompt in ([*question, *question], [*question, *reply], [*question, *reply, *reply, *question]):
        assert format_faults(example(prompt=prompt)) == ["expected user and assistant in turns"]
    assert format_faults(example(prompt=[{"role": "user", "content": " "}])) == ["a turn is empty"]


def test_roles_and_empty_completions_are_faults() -> None:
    swapped = example(prompt=example().completion, completion=example().prompt)
    assert format_faults(swapped) == ["expected one user turn and one assistant turn"]
    assert format_faults(example(prompt=[])) == ["expected one user turn and one assistant turn"]
    assert format_faults(example(completion_tokens=0)) == ["the completion has no tokens"]


def test_problems_on_two_sides_are_found() -> None:
    rows = [
        example(problem="a"),
        example(problem="a", split="test"),
        example(problem="b", split="test"),
        example(problem="c"),
    ]
    assert overlaps(rows, ["b", "c", "d"]) == {"train/test": {"a"}, "train/held_out": {"c"}, "test/held_out": {"b"}}
    assert not any(overlaps(rows[2:], ["d"]).values())


def test_examples_survive_parquet_to_the_letter(tmp_path: Path) -> None:
    odd = trace(1, reasoning="ünï \U0001f600 \u2028 \x00 end", source=None, speedup=None)
    dataset = built([odd, *(trace(n) for n in range(2, 12))], max_tokens=5000)
    write_dataset(dataset, tmp_path / "level=1")
    for split in ("train", "test"):
        assert read_examples(tmp_path / "level=1", split) == dataset.split(split)


def test_an_empty_split_is_written_and_read(tmp_path: Path) -> None:
    write_dataset(built([trace(1)]), tmp_path)
    assert read_examples(tmp_path, "test") == []


def test_what_was_left_out_is_written_with_its_reason(tmp_path: Path) -> None:
    write_dataset(built([trace(1), trace(2)], max_tokens=5), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert [(r["reason"], r["sample_key"], r["budget"]) for r in rows] == [
        ("over_budget", "sample_1", 5),
        ("over_budget", "sample_2", 5),
    ]


@pytest.mark.parametrize("content", [None, b"no parquet"])
def test_a_directory_without_a_dataset_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(PipelineError, match=r"train\.parquet: not readable as a chat dataset"):
        read_examples(tmp_path, "train")


def test_a_parquet_file_of_something_else_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "train.parquet")
    with pytest.raises(PipelineError, match="not readable as a chat dataset"):
        read_examples(tmp_path, "train")


def test_the_files_load_as_a_hugging_face_dataset(tmp_path: Path) -> None:
    from datasets import load_dataset

    dataset = built([trace(n) for n in range(10)])
    write_dataset(dataset, tmp_path)
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    loaded = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 9, "test": 1}
    assert loaded["test"][0]["prompt"] == dataset.split("test")[0].prompt
    assert loaded["test"][0]["completion"] == dataset.split("test")[0].completion


EARLY = "<think>\nShort.\n</think>\n\n<triton>\ny = x\n</triton>"


def by_turn(traces: list[Trace], max_tokens: int = 100_000) -> ChatDataset:
    """The dataset of whole conversations, tokens being characters."""

    def count(prompt: Messages, completion: Messages) -> tuple[int, int]:
        if not completion[0]["content"].startswith("<think>"):
            raise NotContinued("the prompt ends in <think>")
        head = sum(len(m["content"]) for m in prompt)
        return head, head + len(completion[0]["content"])

    return build_dataset(traces, count, max_tokens=max_tokens, test_size=0.1, over_budget="drop", multi_turn=True)


def test_a_conversation_is_one_row_and_counts_every_answer_that_is_learned() -> None:
    [row] = by_turn([repaired("<triton>\ny = x\n</triton>", EARLY, "last")]).examples
    assert [m["role"] for m in row.messages] == ["user", "assistant"] * 3
    assert row.completion_tokens == len(EARLY) + len(row.completion[0]["content"])
    assert row.prompt_tokens == sum(len(m["content"]) for m in row.prompt)
    assert row.tokens == sum(len(m["content"]) for m in row.messages)


def test_without_the_option_only_the_best_answer_of_a_conversation_is_a_row() -> None:
    found = repaired(EARLY, "last")
    [row] = built([found]).examples
    assert [m["role"] for m in row.messages] == ["user", "assistant"] and row.trace == found.version


def test_a_single_turn_trace_is_the_same_row_with_the_option() -> None:
    assert by_turn([trace(1), trace(2)]).data_version == built([trace(1), trace(2)]).data_version


def test_a_conversation_over_the_budget_is_left_out_whole() -> None:
    traces = [repaired(EARLY, "last", number=1), repaired("last", number=2)]
    most = max(e.tokens for e in by_turn(traces[1:]).examples)
    dataset = by_turn(traces, max_tokens=most)
    assert [e.sample_key for e in dataset.examples] == ["sample_2"]
    assert [o.sample_key for o in dataset.over_budget] == ["sample_1"]


def test_rows_come_back_the_same_from_either_form(tmp_path: Path) -> None:
    dataset = built([trace(n) for n in range(10)])
    for form in ("prompt_completion", "messages"):
        write_dataset(dataset, tmp_path / form, form)  # type: ignore[arg-type]
        assert read_examples(tmp_path / form, "train") == dataset.split("train")
    several = by_turn([repaired(EARLY, "last", number=n) for n in range(3)])
    write_dataset(several, tmp_path / "several", "messages")
    assert read_examples(tmp_path / "several", "train") == several.split("train")


def test_several_answers_are_not_written_where_there_is_room_for_one(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"sample_0 holds several answers, .* dataset\.form to messages"):
        write_dataset(by_turn([repaired(EARLY, "last")]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("form", "columns"), [("prompt_completion", ["prompt", "completion"]), ("messages", ["messages"])]
)
def test_every_column_of_the_files_says_what_it_is(tmp_path: Path, form: Form, columns: list[str]) -> None:
    import pyarrow.parquet as pq

    write_dataset(built([trace(1)]), tmp_path, form)
    schema = pq.read_schema(tmp_path / "train.parquet")
    lineage = ["sample_key", "source", "problem", "trace", "speedup", "file"]
    assert schema.names == [*columns, "split", *lineage, "prompt_tokens", "completion_tokens", "tokens"]
    assert all(field.metadata[b"doc"] for field in schema)


def test_the_hub_s_loader_takes_the_directory_as_its_card_says(tmp_path: Path) -> None:
    from datasets import load_dataset

    dataset = by_turn([repaired(EARLY, "last", number=n) for n in range(10)])
    write_dataset(dataset, tmp_path / "data", "messages")
    loaded = load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 9, "test": 1}
    assert loaded["test"][0]["messages"] == dataset.split("test")[0].messages
    assert "prompt" not in loaded["test"].column_names
