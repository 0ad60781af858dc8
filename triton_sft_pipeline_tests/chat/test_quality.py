"""The gates of a chat dataset: each holds for a good one and names what breaks it."""

from __future__ import annotations

from triton_sft_pipeline.chat.examples import ChatDataset
from triton_sft_pipeline.chat.quality import dataset_faults
from triton_sft_pipeline_tests.chat.examples import built, example, trace


def test_a_good_dataset_has_no_faults() -> None:
    dataset = built([trace(n) for n in range(10)])
    assert dataset_faults(dataset, 100_000, {"other": "01_other"}) == {
        "format": "",
        "token_budget": "",
        "no_overlap": "",
    }


def test_a_fault_of_form_is_told_by_trace_and_counted() -> None:
    bad = example(completion_tokens=0)
    faults = dataset_faults(ChatDataset([bad, bad], []), 100_000, {})
    assert faults["format"] == "sample_0: the completion has no tokens (2 faults in all)."


def test_a_row_over_the_budget_is_told() -> None:
    faults = dataset_faults(ChatDataset([example(tokens=5000)], []), 4096, {})
    assert faults["token_budget"] == "sample_0 has 5,000 tokens, over the budget of 4,096 (1 such rows)."


def test_an_empty_train_split_is_a_fault_that_says_what_to_do() -> None:
    faults = dataset_faults(built([trace(1)], max_tokens=10), 10, {})
    assert faults["token_budget"].startswith(
        "the train split is empty: 1 samples are over the budget of 10 tokens. Raise training.max_length"
    )


def test_a_held_out_problem_among_the_rows_is_told_by_name() -> None:
    row = example()
    faults = dataset_faults(ChatDataset([row], []), 100_000, {row.problem: "03_add"})
    assert faults["no_overlap"] == "train/held_out share 1 problems: sample_0, 03_add."


def test_a_problem_on_both_sides_of_the_split_is_told() -> None:
    rows = [example(), example(split="test", sample_key="twin")]
    faults = dataset_faults(ChatDataset(rows, []), 100_000, {})
    assert faults["no_overlap"] == "train/test share 1 problems: sample_0, twin."
