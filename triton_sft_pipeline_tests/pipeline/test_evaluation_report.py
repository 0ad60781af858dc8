"""The report as an asset: what it says of its origin, what it asks apart, what the UI shows, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from triton_sft_pipeline.assets.evaluation import repeat_command, traces_hash
from triton_sft_pipeline.assets.evaluation_metadata import numbers, score_table, tuned_not_worse
from triton_sft_pipeline.chat.prompt import user_message
from triton_sft_pipeline.config import held_out_problems, load_config
from triton_sft_pipeline.evaluation.run import problems_of_dataset
from triton_sft_pipeline.files import read_json
from triton_sft_pipeline.storage import CURRENT
from triton_sft_pipeline.traces import hash_location
from triton_sft_pipeline.verification import JUDGE_VERSION
from triton_sft_pipeline_tests.evaluation.reports import answer, made_report, problem
from triton_sft_pipeline_tests.pipeline.conftest import a_pipeline
from triton_sft_pipeline_tests.pipeline.harness import Pipeline, sample_traces

KEY = "evaluation_report"


KERNEL = "<think>\nok\n</think>\n<triton>\nkernel\n</triton>"


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A pipeline whose models answered everything with a kernel. What a test does with it is a trial that leaves the
    adapter alone.
    """
    with pytest.MonkeyPatch.context() as patches, a_pipeline(tmp_path_factory.mktemp("answered"), patches) as made:
        made.asker.text = KERNEL
        assert made.refresh().exit_code == 0
        yield made


def report_of(pipeline: Pipeline) -> dict[str, Any]:
    return read_json(pipeline.store.require(KEY).path / "report.json")


def work_of(pipeline: Pipeline) -> list[Path]:
    """What runs that broke off left."""
    return [path for path in (pipeline.store.root / KEY / ".work").glob("*") if path.is_dir()]


def materialise(pipeline: Pipeline, key: str, **overrides: Any) -> None:
    """One asset alone, with settings of this run alone."""
    assets = list(pipeline.definitions.assets or [])
    resources = {**(pipeline.definitions.resources or {}), **pipeline.resources}
    config = {"ops": {key: {"config": {"overrides": overrides}}}}
    with pytest.MonkeyPatch.context() as patches:
        # The pipeline outlives the environment of the test that made it.
        patches.setenv("TRITON_SFT_HOME", str(pipeline.store.root))
        patches.setenv("TRITON_SFT_TRACES", str(pipeline.traces))
        made = dg.materialize(
            assets, selection=[key], instance=pipeline.instance, resources=resources, run_config=config
        )
    assert made.success


# Where it comes from


def test_the_report_names_everything_that_it_comes_from(answered: Pipeline) -> None:
    about, store = report_of(answered)["provenance"], answered.store
    assert about["traces_hash"] == hash_location(answered.traces)
    assert about["filtered_traces_version"] == store.require("filtered_traces").data_version
    assert about["dataset_version"] == store.require("chat_dataset").data_version
    assert about["adapter_version"] == store.require("lora_adapter").data_version
    config = answered.config
    assert (about["preset"], about["evaluation_preset"]) == ("tiny", "tiny")
    assert (about["training_seed"], about["sampling_seed"]) == (config.training.seed, config.evaluation.seed)
    assert about["judge_version"] == JUDGE_VERSION
    assert about["judge_settings"]["trials"] == config.evaluation.judge_trials
    assert {"torch", "transformers", "peft"} <= about["versions"].keys()
    assert about["device"] and about["python"]
    assert about["asker"] == {"asked": "by a recording"}


def test_the_trace_hash_is_that_of_the_files_the_adapter_was_made_from_and_not_of_newer_ones(
    answered: Pipeline,
) -> None:
    trained, version = hash_location(answered.traces), answered.store.require("filtered_traces").data_version
    traces = sample_traces()
    traces[0]["model_reasoning"] += " One more thought."
    answered.write(traces)
    try:
        materialise(answered, "filtered_traces")
        newer = answered.store.require("filtered_traces").data_version
        assert newer != version
        assert traces_hash(answered.store, version) == trained
        assert traces_hash(answered.store, newer) == hash_location(answered.traces) != trained
    finally:
        answered.write(sample_traces())
        materialise(answered, "filtered_traces")
    assert traces_hash(answered.store, "a version that is gone") is None


def test_the_command_that_repeats_it_carries_what_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_SFT_HOME", "/a place/storage")
    monkeypatch.delenv("TRITON_SFT_CONFIG", raising=False)
    plain = repeat_command(load_config(), {})
    assert plain.startswith("TRITON_SFT_HOME='/a place/storage' TRITON_SFT_PRESET=tiny dagster asset materialize ")
    assert plain.endswith("--select evaluation_report")
    trial = repeat_command(load_config(), {"evaluation.samples": 4})
    _, _, given = trial.partition("--config-json ")
    assert json.loads(given.strip("'")) == {"ops": {KEY: {"config": {"overrides": {"evaluation.samples": 4}}}}}


# What is asked apart


def test_a_held_out_problem_that_was_trained_on_is_asked_apart_with_the_trace_that_it_touches(
    answered: Pipeline, tmp_path: Path
) -> None:
    known = problems_of_dataset(answered.store.require("chat_dataset").path)["seen"][0]
    (tmp_path / "leaked.py").write_text(known.pytorch_code)
    (tmp_path / "fresh.py").write_text(held_out_problems(answered.config)[0].pytorch_code)
    materialise(answered, KEY, held_out=str(tmp_path))
    report = report_of(answered)
    asked = {row["key"]: row for row in report["problems"] if row["split"] in ("held_out", "touched")}
    assert {key: row["split"] for key, row in asked.items()} == {"fresh": "held_out", "leaked": "touched"}
    assert known.key in asked["leaked"]["touched"] and asked["fresh"]["touched"] is None
    assert (report["tuned"]["held_out"]["n"], report["tuned"]["touched"]["n"]) == (1, 1)


def test_a_held_out_file_that_is_no_problem_is_named_in_the_report_and_the_rest_is_asked(
    refreshed: Pipeline, tmp_path: Path
) -> None:
    folder = tmp_path / "problems"
    folder.mkdir()
    for found in held_out_problems(refreshed.config)[:2]:
        (folder / f"{found.key}.py").write_text(found.pytorch_code)
    (folder / "broken.py").write_text("class Model(:\n")
    refreshed.configure(held_out=str(folder))
    assert refreshed.refresh().exit_code == 0
    report = report_of(refreshed)
    assert [item["key"] for item in report["unusable"]] == ["broken"]
    assert report["base"]["held_out"]["n"] == 2


# Going on


@pytest.mark.slow
def test_an_evaluation_that_broke_off_goes_on_with_the_answers_that_it_has_and_with_no_others(
    refreshed: Pipeline,
) -> None:
    (refreshed.store.root / KEY / CURRENT).unlink()
    asker = refreshed.asker
    asker.dies_after = 5
    assert list(refreshed.refresh().failed) == [KEY]
    assert refreshed.store.current(KEY) is None and len(work_of(refreshed)) == 1
    first = list(asker.asked)
    assert len(first) == 5

    asker.dies_after = None
    asker.asked.clear()
    refreshed.configure(evaluation__seed=8)
    assert refreshed.refresh().ran == [KEY]
    everything = len(asker.asked)
    assert everything == 2 * len(report_of(refreshed)["problems"]), "answers under another seed are not its own"
    assert len(work_of(refreshed)) == 1, "they wait for the evaluation that they belong to"

    asker.asked.clear()
    refreshed.configure()
    assert refreshed.refresh().ran == [KEY]
    assert len(asker.asked) == everything - 5 and not set(first) & set(asker.asked)
    assert work_of(refreshed) == []
    generations = (refreshed.store.require(KEY).path / "generations.jsonl").read_text().splitlines()
    assert len(generations) == everything


def test_every_model_is_asked_every_problem_with_the_prompt_of_the_chat_dataset(answered: Pipeline) -> None:
    held_out = {user_message(p.pytorch_code) for p in held_out_problems(answered.config)}
    for model in ("base", "tuned"):
        assert held_out <= {prompt for name, prompt, _ in answered.asker.asked if name == model}


# What the UI shows


def test_the_page_of_the_report_shows_scores_differences_plots_and_numbers_for_trends(answered: Pipeline) -> None:
    events = answered.instance.fetch_materializations(dg.AssetKey(KEY), limit=1, ascending=True).records
    made = events[0].asset_materialization
    assert made
    shown: dict[str, Any] = {name: value.value for name, value in made.metadata.items()}
    assert shown["headline"].startswith("verified kernels: base ")
    assert "| held-out | tuned | 100 % [72, 100], 10/10 |" in shown["scores"]
    assert "| held-out | 0 points [" in shown["tuned_against_base"]
    assert shown["scores_plot"].startswith("![plot](data:image/png;base64,")
    assert "fast_p_plot" not in shown, "nothing was timed"
    assert shown["held_out_base_fast_0"] == shown["held_out_tuned_fast_0"] == 1.0
    assert shown["tuned_tokens_per_second"] == 30.0
    assert "held_out_tuned_fast_1" not in shown and "touched_tuned_fast_0" not in shown


def split_of(split: str, base: list[str], tuned: list[str], **fields: Any) -> list[dict[str, Any]]:
    """A problem for each pair of verdicts."""
    return [
        problem(f"{split}_{i}", split, i, base=[answer(b, **fields)], tuned=[answer(t, **fields)])
        for i, (b, t) in enumerate(zip(base, tuned, strict=True))
    ]


def test_numbers_for_trends_hold_rates_and_mean_speedup_by_split_and_model() -> None:
    rows = split_of("held_out", ["verified"] + ["unparsed"] * 3, ["verified"] * 2 + ["unparsed"] * 2, speedup=1.5)
    found = numbers(made_report(rows))
    assert (found["held_out_base_fast_0"], found["held_out_tuned_fast_0"]) == (0.25, 0.5)
    assert (found["held_out_base_fast_1"], found["held_out_tuned_fast_2"]) == (0.25, 0.0)
    assert found["held_out_tuned_speedup"] == pytest.approx(1.5)
    assert not [name for name in found if name.startswith(("seen", "test", "touched"))]


def test_a_tuned_model_that_is_worse_on_one_split_is_warned_of_with_the_paired_difference() -> None:
    rows = split_of("seen", ["unparsed"] * 2, ["verified"] * 2)
    rows += split_of("held_out", ["verified"] * 3 + ["unparsed"], ["verified"] + ["unparsed"] * 3)
    gate = tuned_not_worse(made_report(rows, timed=False))
    assert not gate.passed
    assert gate.detail.startswith("Worse on held-out problems. Held-out problems: fast_0 75 % -> 25 %, difference −50")
    assert ", n = 4." in gate.detail and "Seen" not in gate.detail


def test_a_tuned_model_that_is_as_good_is_not_warned_of_and_empty_splits_are_no_reason() -> None:
    gate = tuned_not_worse(made_report(split_of("held_out", ["verified", "unparsed"], ["unparsed", "verified"])))
    assert gate.passed
    assert gate.detail.startswith("Held-out problems: fast_0 50 % -> 50 %, difference 0 points")
    assert "Test split" not in gate.detail


def test_one_answer_more_of_many_counts() -> None:
    rows = [
        problem("a", "held_out", base=[answer("unparsed")] * 8, tuned=[answer("verified")] + [answer("unparsed")] * 7)
    ]
    assert tuned_not_worse(made_report(rows, timed=False)).passed
    swapped = [{**row, "base": row["tuned"], "tuned": row["base"]} for row in rows]
    assert not tuned_not_worse(made_report(swapped, timed=False)).passed


def test_the_score_table_says_that_speed_was_not_measured() -> None:
    table = score_table(made_report(split_of("test", ["verified"], ["verified"]), timed=False))
    assert table.endswith("not measured: fast_1, fast_2")
    assert "| test | base | 100 % [" in table
