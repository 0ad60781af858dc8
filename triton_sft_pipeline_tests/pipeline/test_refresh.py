"""Only what is stale runs again: waves on one real instance."""

import socket
import subprocess
import sys
from typing import Any

import dagster as dg
import pytest
from dagster import AssetCheckEvaluation

from triton_sft_pipeline.assets.common import HOST_TAG, PROCESS_TAG
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import read_json
from triton_sft_pipeline.refresh import PARENTS
from triton_sft_pipeline.traces import funnel
from triton_sft_pipeline.traces.funnel import DROPPED_FILE
from triton_sft_pipeline_tests.pipeline.harness import Pipeline, RecordedGPU, sample_traces

EVERYTHING = ["filtered_traces", "chat_dataset", "lora_adapter", "evaluation_report"]


def test_the_parents_that_refresh_knows_are_those_of_the_definitions(pipeline: Pipeline) -> None:
    graph = pipeline.definitions.resolve_asset_graph()
    found = {
        key.to_user_string(): {p.to_user_string() for p in graph.get(key).parent_keys}
        for key in graph.materializable_asset_keys
    }
    assert found == {key: set(parents) for key, parents in PARENTS.items()}


def test_a_first_refresh_runs_everything_in_order_and_a_second_one_nothing(pipeline: Pipeline) -> None:
    assert pipeline.refresh().ran == EVERYTHING
    second = pipeline.refresh()
    assert (second.ran, second.exit_code) == ([], 0)


def test_a_trace_added_that_the_filter_drops_runs_the_filter_alone(refreshed: Pipeline) -> None:
    wrong = next(t for t in sample_traces() if t.get("result") and not t["result"]["correctness"])
    refreshed.write([wrong, *sample_traces()])
    assert refreshed.refresh().ran == ["filtered_traces"]
    assert refreshed.refresh().ran == []


def test_an_edited_trace_runs_everything_below_it(refreshed: Pipeline) -> None:
    traces = sample_traces()
    traces[0]["model_reasoning"] += " One more thought."
    refreshed.write(traces)
    assert refreshed.refresh().ran == EVERYTHING


def test_a_changed_hyper_parameter_runs_training_and_evaluation_alone(refreshed: Pipeline) -> None:
    refreshed.configure(training__learning_rate=1e-4)
    assert refreshed.refresh().ran == ["lora_adapter", "evaluation_report"]


def test_a_changed_evaluation_setting_runs_the_evaluation_alone(refreshed: Pipeline) -> None:
    refreshed.configure(evaluation__judge_trials=2)
    assert refreshed.refresh().ran == ["evaluation_report"]


def test_a_changed_filter_setting_that_keeps_the_same_traces_stops_there(refreshed: Pipeline) -> None:
    refreshed.configure(filter__min_share_kept=0.1)
    assert refreshed.refresh().ran == ["filtered_traces"]


def test_a_failed_gate_promotes_nothing_holds_everything_back_and_shows_in_the_log(refreshed: Pipeline) -> None:
    before = refreshed.current("filtered_traces")
    refreshed.write(sample_traces()[:5])
    outcome = refreshed.refresh()
    assert (outcome.ran, list(outcome.failed), outcome.exit_code) == ([], ["filtered_traces"], 1)
    assert outcome.held_back == EVERYTHING[1:]
    assert "min_traces" in outcome.failed["filtered_traces"]
    assert refreshed.current("filtered_traces") == before
    check = dg.AssetCheckKey(dg.AssetKey("filtered_traces"), "min_traces")
    latest = refreshed.instance.event_log_storage.get_latest_asset_check_execution_by_key([check])[check]
    assert latest.status.value == "FAILED"
    assert "filtered_traces" in refreshed.stale()


def test_after_a_failed_gate_the_mended_traces_run_only_what_differs(refreshed: Pipeline) -> None:
    refreshed.write(sample_traces()[:5])
    refreshed.refresh()
    refreshed.write(sample_traces())
    assert refreshed.refresh().ran in ([], ["filtered_traces"])
    assert refreshed.stale() == {}


def test_traces_of_which_none_is_correct_fail_the_correctness_gate(pipeline: Pipeline) -> None:
    traces = [t for t in sample_traces() if t.get("result")]
    for trace in traces:
        trace["result"]["correctness"] = False
    pipeline.write(traces)
    outcome = pipeline.refresh()
    assert "correctness: " in outcome.failed["filtered_traces"]
    assert pipeline.store.current("filtered_traces") is None


def test_a_kept_trace_without_fast_0_fails_its_gate_and_is_named(pipeline: Pipeline) -> None:
    traces = sample_traces()
    traces[0]["result"]["fast_0"] = False
    pipeline.write(traces)
    pipeline.configure(filter__require_fast_0=False, filter__check_labels=False)
    failure = pipeline.refresh().failed["filtered_traces"]
    assert "fast_0: 1 of" in failure
    assert traces[0]["sample_key"] in failure


def test_a_diverged_training_is_not_promoted_and_not_evaluated(pipeline: Pipeline) -> None:
    pipeline.resources["gpu"] = RecordedGPU(loss=float("nan"))
    outcome = pipeline.refresh()
    assert list(outcome.failed) == ["lora_adapter"]
    assert outcome.held_back == ["evaluation_report"]
    assert pipeline.store.current("lora_adapter") is None


def test_a_promoted_adapter_holds_no_checkpoints(refreshed: Pipeline) -> None:
    names = {p.name for p in refreshed.store.require("lora_adapter").path.iterdir()}
    assert "adapter_model.safetensors" in names
    assert not [n for n in names if n.startswith("checkpoint")]


def test_an_adapter_of_a_trial_counts_as_stale(refreshed: Pipeline) -> None:
    trial = {"resources": {"gpu": {"config": {"overrides": {"training.epochs": 1}}}}}
    assets, resources = (
        refreshed.definitions.assets or [],
        {**(refreshed.definitions.resources or {}), **refreshed.resources},
    )
    result = dg.materialize(
        list(assets), selection=["lora_adapter"], instance=refreshed.instance, resources=resources, run_config=trial
    )
    assert result.success
    assert refreshed.store.require("lora_adapter").record["configuration"]["training"]["epochs"] == 1
    assert "another configuration" in refreshed.stale()["lora_adapter"]
    assert refreshed.refresh().ran == ["lora_adapter"]


def test_an_artifact_that_is_gone_is_made_again(refreshed: Pipeline) -> None:
    (refreshed.store.root / "chat_dataset" / "current").unlink()
    assert refreshed.refresh().ran == ["chat_dataset"]


def test_traces_that_are_not_there_are_bad_input_and_nothing_is_recorded(pipeline: Pipeline) -> None:
    pipeline.traces.unlink()
    with pytest.raises(PipelineError, match=r"traces\.json: no such file"):
        pipeline.refresh()
    assert pipeline.instance.get_latest_data_version_record(dg.AssetKey("reasoning_traces")) is None


def test_a_dry_run_says_what_would_run_and_runs_nothing(pipeline: Pipeline) -> None:
    pipeline.refresh(dry_run=True)
    assert pipeline.store.current("filtered_traces") is None
    assert any(line.startswith("would run filtered_traces") for line in pipeline.said)


def test_the_run_of_a_killed_process_is_marked_failed_and_gives_its_place_back(refreshed: Pipeline) -> None:
    refreshed.instance.event_log_storage.initialize_concurrency_limit_to_default("gpu")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    tags = {HOST_TAG: socket.gethostname(), PROCESS_TAG: f"{process.pid}:1"}
    run = refreshed.instance.create_run_for_job(
        refreshed.definitions.resolve_implicit_global_asset_job_def(), status=dg.DagsterRunStatus.STARTED, tags=tags
    )
    refreshed.instance.event_log_storage.claim_concurrency_slot("gpu", run.run_id, "lora_adapter")
    refreshed.refresh()
    assert refreshed.instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE
    assert refreshed.instance.event_log_storage.get_concurrency_info("gpu").active_run_ids == set()


def test_what_was_dropped_lies_beside_what_was_kept_with_its_reason(refreshed: Pipeline) -> None:
    artifact = refreshed.store.require("filtered_traces")
    assert (artifact.path / DROPPED_FILE).read_text().count("\n") == sum(artifact.record["funnel"]["dropped"].values())


def test_the_report_counts_seen_and_held_out_apart(refreshed: Pipeline) -> None:
    report = read_json(refreshed.store.current_link("evaluation_report") / "report.json")
    for model in ("base", "tuned"):
        for split in ("seen", "held_out"):
            assert report[model][split]["fast_0"]["count"] == 0
            assert report[model][split]["n"] > 0


def test_the_live_loss_curve_is_observed_on_the_adapter(refreshed: Pipeline) -> None:
    records = refreshed.instance.fetch_observations(dg.AssetKey("lora_adapter"), limit=10).records
    losses = [r.asset_observation.metadata["loss"].value for r in records]
    assert losses == [0.5, 2.0]


def wrong_traces(count: int) -> list[dict[str, Any]]:
    """Traces that the filter drops, each with a name of its own."""
    wrong = next(t for t in sample_traces() if t.get("result") and not t["result"]["correctness"])
    return [{**wrong, "sample_key": f"wrong_{n}"} for n in range(count)]


def test_of_a_file_that_grew_only_the_new_traces_are_worked_on(
    refreshed: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked: list[str] = []
    first_refusal = funnel.first_refusal
    monkeypatch.setattr(funnel, "first_refusal", lambda t, s: worked.append(t.sample_key) or first_refusal(t, s))
    refreshed.write([*sample_traces(), *wrong_traces(10)])
    assert refreshed.refresh().ran == ["filtered_traces"], "the same traces are kept"
    assert worked == [f"wrong_{n}" for n in range(10)]
    assert refreshed.store.require("filtered_traces").record["funnel"]["read"] == len(sample_traces()) + 10


def check_of(pipeline: Pipeline, name: str) -> AssetCheckEvaluation:
    key = dg.AssetCheckKey(dg.AssetKey("filtered_traces"), name)
    found = pipeline.instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
    assert found.event and found.event.dagster_event
    evaluation = found.event.dagster_event.event_specific_data
    assert isinstance(evaluation, AssetCheckEvaluation)
    return evaluation


def test_a_share_kept_that_fell_against_last_time_warns_and_holds_nothing_back(refreshed: Pipeline) -> None:
    assert check_of(refreshed, "share_kept").passed
    refreshed.write([*sample_traces(), *wrong_traces(20)])
    assert refreshed.refresh().ran == ["filtered_traces"]
    fallen = check_of(refreshed, "share_kept")
    assert not fallen.passed and fallen.severity == dg.AssetCheckSeverity.WARN
    assert fallen.description and fallen.description.endswith("Last time it was 78%.")


def test_the_page_of_the_filter_shows_the_funnel_with_records_of_each_reason(refreshed: Pipeline) -> None:
    refreshed.write([*sample_traces(), *wrong_traces(10)])
    refreshed.refresh()
    event = refreshed.instance.get_latest_materialization_event(dg.AssetKey("filtered_traces"))
    assert event and event.asset_materialization
    shown = event.asset_materialization.metadata
    assert "| dropped: correctness | 16 |" in str(shown["funnel"].value)
    assert str(shown["funnel_plot"].value).startswith("![plot](data:image/png;base64,")
    assert str(shown["dropped_and_quarantined"].value).count("| correctness |") == 5
    assert shown["share_kept"].value == pytest.approx(31 / 50) and shown["share_largest_family"].value < 0.2
