"""What Dagster is told: keys, dependencies, versions and checks that users' jobs and dashboards hold on to."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from triton_sft_pipeline.config import code_versions, load_config
from triton_sft_pipeline.definitions import build_definitions
from triton_sft_pipeline_tests.pipeline.processes import CHECKOUT

GRAPH = {
    "reasoning_traces": set(),
    "filtered_traces": {"reasoning_traces"},
    "chat_dataset": {"filtered_traces"},
    "lora_adapter": {"chat_dataset"},
    "evaluation_report": {"lora_adapter", "chat_dataset"},
}

GATES = {
    "filtered_traces": {"accounting", "correctness", "fast_0", "min_traces", "no_overlap"},
    "chat_dataset": {"format", "token_budget", "no_overlap"},
    "lora_adapter": {"loss_finite", "adapter_reloads"},
}

WARNINGS = {
    "filtered_traces": {
        "share_kept",
        "whole_files",
        "label_noise",
        "duplicates",
        "length_drift",
        "no_dominance",
        "labels_reproduce",
    },
    "lora_adapter": {"eval_loss_improved"},
    "evaluation_report": {"tuned_not_worse"},
}

MADE = [key for key in GRAPH if key != "reasoning_traces"]


@pytest.fixture(scope="module")
def definitions() -> dg.Definitions:
    return build_definitions(load_config())


@pytest.fixture(scope="module")
def repository(definitions: dg.Definitions) -> dg.RepositoryDefinition:
    return definitions.get_repository_def()


def node(repository: dg.RepositoryDefinition, key: str) -> Any:
    return repository.asset_graph.get(dg.AssetKey(key))


def test_the_definitions_are_loadable(definitions: dg.Definitions) -> None:
    dg.Definitions.validate_loadable(definitions)


def test_the_keys_and_what_each_is_made_from(repository: dg.RepositoryDefinition) -> None:
    graph = repository.asset_graph
    found = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
    }
    assert found == GRAPH


def test_only_the_traces_are_observed_and_everything_else_is_made(repository: dg.RepositoryDefinition) -> None:
    graph = repository.asset_graph
    assert {key.to_user_string() for key in graph.observable_asset_keys} == {"reasoning_traces"}
    assert {key.to_user_string() for key in graph.materializable_asset_keys} == set(MADE)


def test_all_assets_are_in_one_group_so_that_the_lineage_page_shows_them_at_once(
    repository: dg.RepositoryDefinition,
) -> None:
    assert {node(repository, key).group_name for key in GRAPH} == {"triton_sft"}


@pytest.mark.parametrize("key", MADE)
def test_an_asset_says_what_it_is_and_starts_only_when_it_should(repository: dg.RepositoryDefinition, key: str) -> None:
    asset = node(repository, key)
    assert asset.description
    assert asset.kinds
    assert asset.tags["domain"]
    assert asset.automation_condition.get_label() == "when_stale"


def test_code_versions_are_those_of_the_configuration(repository: dg.RepositoryDefinition) -> None:
    found = {key: node(repository, key).code_version for key in MADE}
    assert found == code_versions(load_config())
    assert len(set(found.values())) == len(MADE)


def test_training_and_evaluation_share_the_gpu_and_nothing_else_waits_for_it(
    repository: dg.RepositoryDefinition,
) -> None:
    assert {key: node(repository, key).pools for key in MADE} == {
        "filtered_traces": set(),
        "chat_dataset": set(),
        "lora_adapter": {"gpu"},
        "evaluation_report": {"gpu"},
    }


def test_gates_block_and_warnings_do_not(repository: dg.RepositoryDefinition) -> None:
    graph = repository.asset_graph
    blocking: dict[str, set[str]] = {}
    warning: dict[str, set[str]] = {}
    for check in graph.asset_check_keys:
        spec = graph.get_check_spec(check)
        assert spec.description
        (blocking if spec.blocking else warning).setdefault(check.asset_key.to_user_string(), set()).add(check.name)
    assert blocking == GATES
    assert warning == WARNINGS


def test_sensors_are_off_until_a_person_turns_them_on(repository: dg.RepositoryDefinition) -> None:
    status = {sensor.name: sensor.default_status for sensor in repository.sensor_defs}
    assert status == {
        "watch_traces": dg.DefaultSensorStatus.STOPPED,
        "refresh_when_stale": dg.DefaultSensorStatus.STOPPED,
    }


def test_the_jobs_of_a_user(repository: dg.RepositoryDefinition) -> None:
    pipeline, retrain = repository.get_job("pipeline"), repository.get_job("retrain")
    assert {key.to_user_string() for key in pipeline.asset_layer.selected_asset_keys} == set(MADE)
    assert {key.to_user_string() for key in retrain.asset_layer.selected_asset_keys} == {
        "lora_adapter",
        "evaluation_report",
    }
    assert pipeline.description
    assert retrain.description


def test_every_knob_of_a_resource_is_described(definitions: dg.Definitions) -> None:
    resources = definitions.resources or {}
    assert set(resources) == {"gpu", "judge", "store"}
    fields = {
        (name, field): info
        for name, resource in resources.items()
        for field, info in type(resource).model_fields.items()
    }
    assert fields
    assert [place for place, info in fields.items() if not info.description] == []


def test_another_preset_or_setting_changes_the_versions_of_what_depends_on_it_alone() -> None:
    plain, changed = code_versions(load_config()), code_versions(load_config(overrides={"lora.r": 4}))
    assert {key for key in plain if plain[key] != changed[key]} == {"lora_adapter"}


def test_loading_the_definitions_imports_no_heavy_library() -> None:
    lint = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    heavy = lint["flake8-tidy-imports"]["banned-module-level-imports"]
    assert "torch" in heavy
    code = f"import sys, triton_sft_pipeline.definitions; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["workspace.yaml", "pyproject.toml"])
def test_the_checkout_loads_by_its_own_files_without_naming_a_module(target: str, tmp_path: Path) -> None:
    # Each file alone in a directory: nothing but it can say what is to be loaded.
    (tmp_path / target).write_text((CHECKOUT / target).read_text())
    command = [sys.executable, "-m", "dagster", "definitions", "validate"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "successful for code location triton_sft_pipeline.definitions" in found.stdout + found.stderr
