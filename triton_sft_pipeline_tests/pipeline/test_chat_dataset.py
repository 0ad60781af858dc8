"""The chat dataset as an asset: its form, its card, and what a change of either does to those below."""

from pathlib import Path

from triton_sft_pipeline.chat.dataset import read_examples
from triton_sft_pipeline_tests.pipeline.harness import Pipeline


def test_the_card_beside_the_rows_tells_the_funnel_of_the_filter(refreshed: Pipeline, first_refreshed: Path) -> None:
    card = (refreshed.store.require("chat_dataset").path / "README.md").read_text()
    assert "| read |  | 40 |" in card and "| rows |  | 31 |" in card
    assert "| left out here | over the budget of 640 tokens; nothing is cut | 0 |" in card
    assert str(first_refreshed) not in card, "where it was made is nobody's business"


def test_another_form_or_card_of_the_same_rows_trains_nothing_again(refreshed: Pipeline) -> None:
    import pyarrow.parquet as pq

    before = refreshed.store.require("chat_dataset")
    rows = read_examples(before.path, "train")
    refreshed.configure(dataset__form="messages", dataset__multi_turn=True, dataset__license="apache-2.0")
    assert refreshed.refresh().ran == ["chat_dataset"]
    after = refreshed.store.require("chat_dataset")
    assert after.path != before.path and after.data_version == before.data_version
    assert pq.read_schema(after.path / "train.parquet").names[0] == "messages"
    assert read_examples(after.path, "train") == rows
    assert "license: apache-2.0\n" in (after.path / "README.md").read_text()
    assert refreshed.stale() == {}


def test_the_budget_is_a_gate_and_its_policy_may_be_to_fail(refreshed: Pipeline) -> None:
    refreshed.configure(training__max_length=300, dataset__over_budget="fail")
    outcome = refreshed.refresh()
    assert outcome.exit_code == 1 and list(outcome.failed) == ["chat_dataset"]
    assert "over the budget of 300" in outcome.failed["chat_dataset"]
    assert "lora_adapter" in outcome.held_back
