"""The two sensors: what the daemon would start, tick by tick, and what it would leave alone.

A tick depends on nothing but what is recorded, so most tests record what a run would have recorded, and run nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from triton_sft_pipeline.automation import build_sensors
from triton_sft_pipeline.config import load_config
from triton_sft_pipeline.definitions import build_definitions
from triton_sft_pipeline.refresh import DATA_VERSION_TAG, PARENTS
from triton_sft_pipeline.traces import hash_location
from triton_sft_pipeline_tests.pipeline.harness import Pipeline, sample_traces


class Daemon:
    """What the automation sensor sees and asks for, one tick after another."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.definitions = build_definitions(load_config())
        self._cursor: Any = None

    def tick(self) -> set[str]:
        """The assets that this tick asks for."""
        result = dg.evaluate_automation_conditions(defs=self.definitions, instance=self.instance, cursor=self._cursor)
        self._cursor = result.cursor
        keys = (dg.AssetKey(name) for name in PARENTS)
        return {key.to_user_string() for key in keys if result.get_num_requested(key)}

    def observed(self, version: str) -> None:
        self.instance.report_runless_asset_event(
            dg.AssetObservation("reasoning_traces", tags={DATA_VERSION_TAG: version})
        )

    def made(self, key: str, version: str, failed_gate: str | None = None) -> None:
        """Record a materialisation with its gates; with a failed gate, the gates alone, as a real step does."""
        graph = self.definitions.get_repository_def().asset_graph
        for check in graph.asset_check_keys:
            if check.asset_key.to_user_string() == key:
                passed = check.name != failed_gate
                event = dg.AssetCheckEvaluation(
                    check_name=check.name, asset_key=check.asset_key, passed=passed, metadata={}
                )
                self.instance.report_runless_asset_event(event)
        if failed_gate is None:
            self.instance.report_runless_asset_event(dg.AssetMaterialization(key, tags={DATA_VERSION_TAG: version}))

    def started(self, key: str) -> dg.DagsterRun:
        """Record a run that works on `key` and has not come to an end."""
        job = self.definitions.resolve_implicit_global_asset_job_def()
        selection = {dg.AssetKey(key)}
        return self.instance.create_run_for_job(job, asset_selection=selection, status=dg.DagsterRunStatus.STARTED)

    def everything_made(self) -> None:
        self.observed("traces 1")
        for key in PARENTS:
            self.made(key, f"{key} 1")


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Daemon(instance)


@pytest.fixture
def settled(daemon: Daemon) -> Daemon:
    """Everything is made, and the sensor has seen it."""
    daemon.everything_made()
    daemon.tick()
    return daemon


def test_nothing_is_asked_for_when_nothing_changed(settled: Daemon) -> None:
    assert settled.tick() == set()


def test_turning_it_on_when_everything_is_made_starts_nothing(daemon: Daemon) -> None:
    daemon.everything_made()
    assert daemon.tick() == set()


def test_what_was_stale_before_it_was_turned_on_is_left_to_a_refresh(daemon: Daemon) -> None:
    daemon.everything_made()
    daemon.observed("traces 2")
    assert daemon.tick() == set()


def test_traces_that_nobody_has_observed_yet_start_nothing(daemon: Daemon) -> None:
    assert daemon.tick() == set()


def test_traces_that_were_observed_for_the_first_time_are_filtered_and_nothing_below_is_started(daemon: Daemon) -> None:
    daemon.observed("traces 1")
    assert daemon.tick() == {"filtered_traces"}


def test_a_chain_that_was_never_made_is_made_one_wave_after_another(daemon: Daemon) -> None:
    daemon.observed("traces 1")
    waves = []
    for _ in PARENTS:
        (key,) = daemon.tick()
        daemon.made(key, "1")
        waves.append(key)
    assert waves == list(PARENTS)
    assert daemon.tick() == set()


def test_a_change_in_the_traces_asks_for_the_filter_once(settled: Daemon) -> None:
    settled.observed("traces 2")
    assert settled.tick() == {"filtered_traces"}
    assert settled.tick() == set()


def test_an_observation_of_the_same_traces_asks_for_nothing(settled: Daemon) -> None:
    settled.observed("traces 1")
    assert settled.tick() == set()


def test_children_are_left_alone_when_the_parent_comes_out_the_same(settled: Daemon) -> None:
    settled.observed("traces 2")
    settled.tick()
    settled.made("filtered_traces", "filtered_traces 1")
    assert settled.tick() == set()


def test_children_follow_when_the_parent_comes_out_different(settled: Daemon) -> None:
    settled.observed("traces 2")
    settled.tick()
    settled.made("filtered_traces", "filtered_traces 2")
    assert settled.tick() == {"chat_dataset"}


def test_nothing_below_a_failed_gate_is_started_and_the_step_is_not_tried_again(settled: Daemon) -> None:
    settled.observed("traces 2")
    settled.tick()
    settled.made("filtered_traces", "filtered_traces 2", failed_gate="correctness")
    assert settled.tick() == set()
    assert settled.tick() == set()


def test_a_child_that_is_due_waits_until_the_gate_above_it_passes_again(settled: Daemon) -> None:
    settled.made("filtered_traces", "filtered_traces 2")
    settled.made("filtered_traces", "filtered_traces 2", failed_gate="fast_0")
    assert settled.tick() == set()
    settled.made("filtered_traces", "filtered_traces 2")
    assert settled.tick() == {"chat_dataset"}


def test_a_failed_warning_holds_nothing_back(settled: Daemon) -> None:
    settled.made("filtered_traces", "filtered_traces 2")
    settled.made("filtered_traces", "filtered_traces 2", failed_gate="share_kept")
    assert settled.tick() == {"chat_dataset"}


def test_nothing_is_started_below_a_step_that_is_running(settled: Daemon) -> None:
    settled.made("filtered_traces", "filtered_traces 2")
    run = settled.started("filtered_traces")
    assert settled.tick() == set()
    settled.instance.report_run_canceled(run)
    assert settled.tick() == set(), "the gates of a step that was cancelled are open questions"
    settled.made("filtered_traces", "filtered_traces 2")
    assert settled.tick() == {"chat_dataset"}


def test_nothing_is_started_below_a_step_that_failed_for_whatever_reason(settled: Daemon) -> None:
    settled.made("chat_dataset", "chat_dataset 2")
    assert settled.tick() == {"lora_adapter"}
    settled.instance.report_run_failed(settled.started("lora_adapter"), "out of memory")
    assert settled.tick() == set()
    settled.instance.report_run_canceled(settled.started("lora_adapter"))
    settled.made("lora_adapter", "lora_adapter 2")
    assert settled.tick() == {"evaluation_report"}


def test_the_evaluation_waits_for_the_training_on_a_new_dataset(settled: Daemon) -> None:
    settled.made("chat_dataset", "chat_dataset 2")
    assert settled.tick() == {"lora_adapter"}
    settled.made("lora_adapter", "lora_adapter 2")
    assert settled.tick() == {"evaluation_report"}


def test_what_a_refresh_made_between_two_ticks_is_not_made_again(settled: Daemon) -> None:
    settled.observed("traces 2")
    for key in PARENTS:
        settled.made(key, f"{key} 2")
    assert settled.tick() == set()
    assert settled.tick() == set()


def test_a_changed_setting_asks_for_the_step_that_depends_on_it(settled: Daemon) -> None:
    settled.definitions = build_definitions(load_config(overrides={"training.learning_rate": 1e-4}))
    assert settled.tick() == {"lora_adapter"}


def test_a_real_failed_gate_holds_the_dataset_back(pipeline: Pipeline) -> None:
    daemon = Daemon(pipeline.instance)
    daemon.everything_made()
    daemon.tick()
    pipeline.write(sample_traces()[:5])
    daemon.observed("traces 2")
    assert daemon.tick() == {"filtered_traces"}
    assets = [*(pipeline.definitions.assets or []), *(pipeline.definitions.asset_checks or [])]
    resources = {**(pipeline.definitions.resources or {}), **pipeline.resources}
    result = dg.materialize(
        assets, selection=["filtered_traces"], instance=pipeline.instance, resources=resources, raise_on_error=False
    )
    assert not result.success
    assert daemon.tick() == set()


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "traces.json"
    path.write_text("[]")
    monkeypatch.setenv("TRITON_SFT_TRACES", str(path))
    return path


def watch(cursor: str | None = None) -> Any:
    sensor, _ = build_sensors()
    return sensor(dg.build_sensor_context(cursor=cursor))


def test_the_watch_observes_the_traces_once_with_their_hash_and_size(traces: Path) -> None:
    result = watch()
    (observation,) = result.asset_events
    assert observation.asset_key == dg.AssetKey("reasoning_traces")
    assert observation.tags == {DATA_VERSION_TAG: hash_location(traces)}
    assert observation.metadata["bytes"].value == 2
    assert result.cursor == hash_location(traces)


def test_the_watch_records_what_the_observe_button_records(traces: Path) -> None:
    job = build_definitions(load_config()).resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.ephemeral() as instance:
        assert job.execute_in_process(asset_selection=[dg.AssetKey("reasoning_traces")], instance=instance).success
        record = instance.get_latest_data_version_record(dg.AssetKey("reasoning_traces"))
    (observation,) = watch().asset_events
    assert record.asset_observation.tags[DATA_VERSION_TAG] == observation.tags[DATA_VERSION_TAG]
    assert record.asset_observation.metadata == observation.metadata


def test_the_watch_skips_traces_that_it_has_seen(traces: Path) -> None:
    assert isinstance(watch(watch().cursor), dg.SkipReason)


def test_the_watch_sees_an_edit(traces: Path) -> None:
    cursor = watch().cursor
    traces.write_text("[{}]")
    assert watch(cursor).cursor not in (None, cursor)


def test_the_watch_says_in_a_sentence_that_the_file_is_gone(traces: Path) -> None:
    traces.unlink()
    result = watch("seen before")
    assert isinstance(result, dg.SkipReason)
    assert f"{traces}: no such file or folder" in result.skip_message
