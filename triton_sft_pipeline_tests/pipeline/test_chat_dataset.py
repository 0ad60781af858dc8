"""The chat dataset as an asset: its form, its card, and what a change of either does to those below."""

import pytest

from triton_sft_pipeline.chat.dataset import read_examples
from triton_sft_pipeline_tests.pipeline.harness import Pipeline


@pytest.fixture
def settled(pipeline: Pipeline) -> Pipeline:
    assert pipeline.refresh().exit_code == 0
    return pipeline


def test_the_card_beside_the_rows_tells_the_funnel_of_the_filter(settled: Pipeline) -> None:
    card = (settled.store.require("chat_dataset").path / "README.md").read_text()
    assert "| read |  | 40 |" in card and "| rows |  | 31 |" in card
    assert "| left out here | over the budget of 640 tokens; nothing is cut | 0 |" in card
    assert str(settled.store.root.parent) not in card


def test_another_form_or_card_of_the_same_rows_trains_nothing_again(settled: Pipeline) -> None:
    import pyarrow.parquet as pq

    before = settled.store.require("chat_dataset")
    rows = read_examples(before.path, "train")
    settled.configure(dataset__form="messages", dataset__multi_turn=True, dataset__license="apache-2.0")
    assert settled.refresh().ran == ["chat_dataset"]
    after = settled.store.require("chat_dataset")
    assert after.path != before.path and after.data_version == before.data_version
    assert pq.read_schema(after.path / "train.parquet").names[0] == "messages"
    assert read_examples(after.path, "train") == rows
    assert "license: apache-2.0\n" in (after.path / "README.md").read_text()
    assert settled.stale() == {}


def test_the_budget_is_a_gate_and_its_policy_may_be_to_fail(settled: Pipeline) -> None:
    settled.configure(training__max_length=300, dataset__over_budget="fail")
    outcome = settled.refresh()
    assert outcome.exit_code == 1 and list(outcome.failed) == ["chat_dataset"]
    assert "over the budget of 300" in outcome.failed["chat_dataset"]
    assert "lora_adapter" in outcome.held_back
