"""`merged_model` is made when it is asked for, from the current adapter, and only when that changed."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from triton_sft_pipeline.assets.merged_model import KEY, weights_moved
from triton_sft_pipeline.config import Config, code_versions, data_dir, load_config
from triton_sft_pipeline.definitions import build_definitions
from triton_sft_pipeline.files import sha256_file
from triton_sft_pipeline.refresh import OPTIONAL, PARENTS
from triton_sft_pipeline.training.merge import MergeReport
from triton_sft_pipeline.training.trainer import TrainingRun
from triton_sft_pipeline_tests.pipeline.harness import Pipeline, RecordedGPU
from triton_sft_pipeline_tests.test_cli_training import save_adapter

ON = {"merge.enabled": True}


class AdapterGPU(RecordedGPU):
    """Writes a real adapter of the tiny base, as large as the learning rate."""

    def train(self, config: Config, dataset: Path, output: Path, on_log: Any) -> TrainingRun:
        run = super().train(config, dataset, output, on_log)
        save_adapter(output, config.training.learning_rate * 10)
        return run


@pytest.fixture
def merging(pipeline: Pipeline) -> Pipeline:
    pipeline.resources["gpu"] = AdapterGPU()
    pipeline.configure(merge__enabled=True)
    return pipeline


def graph_of(definitions: dg.Definitions) -> dict[str, set[str]]:
    graph = definitions.resolve_asset_graph()
    return {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.materializable_asset_keys
    }


def test_it_is_there_only_when_the_configuration_asks_for_it() -> None:
    plain, asked = load_config(), load_config(overrides=ON)
    assert KEY not in graph_of(build_definitions(plain))
    assert KEY not in code_versions(plain)
    assert graph_of(build_definitions(asked)) == {k: set(p) for k, p in {**PARENTS, **OPTIONAL}.items()}
    assert code_versions(asked) == code_versions(plain) | {KEY: code_versions(asked)[KEY]}


def test_it_is_described_and_waits_for_the_gates_above_it_but_not_for_the_gpu() -> None:
    graph = build_definitions(load_config(overrides=ON)).get_repository_def().asset_graph
    asset = graph.get(dg.AssetKey(KEY))
    assert asset.description and asset.kinds and asset.tags["domain"]
    assert asset.group_name == "triton_sft"
    assert asset.automation_condition is not None and asset.automation_condition.get_label() == "when_stale"
    assert asset.pools == set()
    assert asset.code_version == code_versions(load_config(overrides=ON))[KEY]
    checks = [check for check in graph.asset_check_keys if check.asset_key == dg.AssetKey(KEY)]
    blocking = {check.name: graph.get_check_spec(check).blocking for check in checks}
    assert blocking == {"same_base": True, "weights_moved": False}


def test_a_refresh_makes_it_from_the_adapter_and_again_only_when_that_changed(merging: Pipeline) -> None:
    assert merging.refresh().ran == [*PARENTS, KEY]
    first = merging.store.require(KEY)
    adapter = merging.store.require("lora_adapter")
    assert first.inputs == {"lora_adapter": adapter.data_version}
    assert first.record["adapter"] == adapter.path.name
    base = data_dir() / "tiny_base"
    assert (first.path / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert sha256_file(first.path / "model.safetensors") != sha256_file(base / "model.safetensors")
    assert merging.refresh().ran == []
    merging.configure(merge__enabled=True, training__learning_rate=0.03)
    assert merging.refresh().ran == ["lora_adapter", "evaluation_report", KEY]
    assert merging.store.require(KEY).data_version != first.data_version


def test_turning_it_on_makes_it_alone_and_turning_it_off_forgets_it(merging: Pipeline) -> None:
    merging.configure()
    assert merging.refresh().ran == list(PARENTS)
    assert merging.store.current(KEY) is None
    merging.configure(merge__enabled=True)
    merging.said.clear()
    merging.refresh(dry_run=True)
    assert merging.said == [f"would run {KEY}: there is no current artifact"]
    assert merging.refresh().ran == [KEY]
    merging.configure()
    assert merging.refresh().ran == []


def test_a_base_that_changed_since_holds_it_back(merging: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_sft_pipeline.assets.merged_model.base_model_version", lambda *name: "another")
    outcome = merging.refresh()
    assert list(outcome.failed) == [KEY]
    assert "same_base" in outcome.failed[KEY]
    assert "changed since the adapter was trained on it" in outcome.failed[KEY]
    assert merging.store.current(KEY) is None


def test_an_adapter_that_does_not_fit_fails_in_a_sentence_and_promotes_nothing(merging: Pipeline) -> None:
    merging.resources["gpu"] = RecordedGPU()
    outcome = merging.refresh()
    assert list(outcome.failed) == [KEY]
    assert "adapter_model.safetensors: damaged or cut short" in outcome.failed[KEY]
    assert merging.store.current(KEY) is None


def test_it_is_held_back_behind_a_failed_adapter(merging: Pipeline) -> None:
    merging.resources["gpu"] = AdapterGPU(loss=float("nan"))
    outcome = merging.refresh()
    assert list(outcome.failed) == ["lora_adapter"]
    assert outcome.held_back == ["evaluation_report", KEY]


def test_updates_that_moved_nothing_are_a_warning() -> None:
    def report(unmoved: int) -> MergeReport:
        return MergeReport(files={}, tensors=9, updated=5, unmoved=unmoved, size=1)

    assert weights_moved(report(0)).passed
    gate = weights_moved(report(2))
    assert (gate.passed, gate.detail) == (False, "3 of 5 updated tensors have new numbers.")
