"""`merged_model` is made when it is asked for, from the current adapter, and only when that changed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from triton_sft_pipeline.assets.merged_model import KEY, weights_moved
from triton_sft_pipeline.config import Config, code_versions, data_dir, load_config
from triton_sft_pipeline.definitions import build_definitions
from triton_sft_pipeline.files import sha256_file
from triton_sft_pipeline.refresh import OPTIONAL, PARENTS
from triton_sft_pipeline.storage import ArtifactStore
from triton_sft_pipeline.training.merge import MergeReport
from triton_sft_pipeline.training.trainer import TrainingRun
from triton_sft_pipeline_tests.pipeline.conftest import a_pipeline, first_refresh
from triton_sft_pipeline_tests.pipeline.harness import Pipeline, RecordedGPU
from triton_sft_pipeline_tests.test_cli_training import save_adapter

ON = {"merge.enabled": True}


class AdapterGPU(RecordedGPU):
    """Writes a real adapter of the tiny base, as large as the learning rate."""

    def train(self, config: Config, dataset: Path, output: Path, on_log: Any) -> TrainingRun:
        run = super().train(config, dataset, output, on_log)
        save_adapter(output, config.training.learning_rate * 10)
        return run


@pytest.fixture(scope="module")
def first_merging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a first refresh left that trained a real adapter, with nothing merged yet."""
    directory = first_refresh(tmp_path_factory.mktemp("first_merging"), AdapterGPU())
    assert ArtifactStore(directory / "storage").current(KEY) is None
    return directory


@pytest.fixture
def merging(first_merging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    """The adapter is made, and merging it was turned on since."""
    with a_pipeline(tmp_path, monkeypatch, begun=first_merging) as pipeline:
        pipeline.resources["gpu"] = AdapterGPU()
        pipeline.configure(merge__enabled=True)
        yield pipeline


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


def test_a_refresh_makes_it_from_the_adapter_and_again_only_when_that_changed(pipeline: Pipeline) -> None:
    pipeline.resources["gpu"] = AdapterGPU()
    pipeline.configure(merge__enabled=True)
    assert pipeline.refresh().ran == [*PARENTS, KEY]
    first = pipeline.store.require(KEY)
    adapter = pipeline.store.require("lora_adapter")
    assert first.inputs == {"lora_adapter": adapter.data_version}
    assert first.record["adapter"] == adapter.path.name
    base = data_dir() / "tiny_base"
    assert (first.path / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert sha256_file(first.path / "model.safetensors") != sha256_file(base / "model.safetensors")
    assert pipeline.refresh().ran == []
    pipeline.configure(merge__enabled=True, training__learning_rate=0.03)
    assert pipeline.refresh().ran == ["lora_adapter", "evaluation_report", KEY]
    assert pipeline.store.require(KEY).data_version != first.data_version


def test_turning_it_on_makes_it_alone_and_turning_it_off_forgets_it(merging: Pipeline) -> None:
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


def test_an_adapter_that_does_not_fit_fails_in_a_sentence_and_promotes_nothing(refreshed: Pipeline) -> None:
    refreshed.configure(merge__enabled=True)
    outcome = refreshed.refresh()
    assert list(outcome.failed) == [KEY]
    assert "adapter_model.safetensors: damaged or cut short" in outcome.failed[KEY]
    assert refreshed.store.current(KEY) is None


def test_it_is_held_back_behind_a_failed_adapter(merging: Pipeline) -> None:
    merging.resources["gpu"] = AdapterGPU(loss=float("nan"))
    merging.configure(merge__enabled=True, training__learning_rate=0.03)
    outcome = merging.refresh()
    assert list(outcome.failed) == ["lora_adapter"]
    assert outcome.held_back == ["evaluation_report", KEY]


def test_updates_that_moved_nothing_are_a_warning() -> None:
    def report(unmoved: int) -> MergeReport:
        return MergeReport(files={}, tensors=9, updated=5, unmoved=unmoved, size=1)

    assert weights_moved(report(0)).passed
    gate = weights_moved(report(2))
    assert (gate.passed, gate.detail) == (False, "3 of 5 updated tensors have new numbers.")
