"""Which configuration an adapter is loaded with: what it records, else a preset with its base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.api import adapter_settings
from triton_sft_pipeline.config import data_dir, load_config
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.storage import ArtifactStore


def adapter_of(directory: Path, base: str) -> Path:
    """What is read of an adapter here: the base model that it names."""
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return directory


@pytest.fixture
def recorded(own_storage: Path) -> Path:
    """The current lora_adapter, trained with other settings than any preset's."""
    config = load_config("trinity-mini", overrides={"model.attn_implementation": "eager", "note": "A trial."})
    with ArtifactStore(own_storage).building("lora_adapter") as draft:
        adapter_of(draft.path, config.model.base_model)
        return draft.promote("v", "c", record={"configuration": config.model_dump(mode="json")}).path


def test_an_adapter_that_is_not_there_is_an_error_for_a_person(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no adapter there"):
        adapter_settings(tmp_path)
    with pytest.raises(PipelineError, match="there is no current lora_adapter"):
        adapter_settings(None)


def test_an_adapter_brings_its_own_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    config, path = adapter_settings(tmp_path)
    assert config.model.base_model == "somebody/else" and path == tmp_path


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_adapter_is_an_error_for_a_person(tmp_path: Path, content: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(PipelineError, match=r"adapter_config\.json: not an adapter's configuration"):
        adapter_settings(tmp_path)


def test_the_current_adapter_brings_what_it_was_trained_with(recorded: Path) -> None:
    config, path = adapter_settings(None)
    assert path == recorded and (config.preset, config.note) == ("trinity-mini", "A trial.")
    assert config.model.attn_implementation == "eager"


def test_a_version_of_the_adapter_named_by_its_directory_brings_the_same(recorded: Path) -> None:
    assert adapter_settings(recorded) == adapter_settings(recorded.parent / "current") == adapter_settings(None)


def test_overrides_win_over_what_is_recorded_and_leave_the_rest(recorded: Path) -> None:
    config, _ = adapter_settings(recorded, {"evaluation.samples": 4, "evaluation.temperature": 0.3})
    assert (config.evaluation.samples, config.evaluation.temperature) == (4, 0.3)
    assert (config.preset, config.note, config.model.attn_implementation) == ("trinity-mini", "A trial.", "eager")
    assert config.lora == load_config("trinity-mini").lora and config.held_out == load_config("trinity-mini").held_out
    with pytest.raises(PipelineError, match=r"evaluation\.sample: unknown field; did you mean samples"):
        adapter_settings(recorded, {"evaluation.sample": 4})


def test_a_recorded_temperature_of_0_counts_as_none_when_several_samples_are_asked_for(own_storage: Path) -> None:
    config = load_config("trinity-mini", overrides={"evaluation.temperature": 0.0})
    with ArtifactStore(own_storage).building("lora_adapter") as draft:
        adapter_of(draft.path, config.model.base_model)
        draft.promote("v", "c", record={"configuration": config.model_dump(mode="json")})
    found = adapter_settings(None, {"evaluation.samples": 8})[0].evaluation
    assert (found.samples, found.temperature, found.resolved_temperature) == (8, None, 0.7)
    assert adapter_settings(None, {"evaluation.samples": 1})[0].evaluation.temperature == 0.0
    with pytest.raises(PipelineError, match="several samples at temperature 0"):
        adapter_settings(None, {"evaluation.samples": 8, "evaluation.temperature": 0.0})


@pytest.mark.parametrize(
    ("base", "preset"),
    [("arcee-ai/Trinity-Mini", "trinity-mini"), ("/models/Trinity-Mini", "trinity-mini"), ("a/b", "tiny")],
)
def test_an_adapter_that_records_no_configuration_takes_the_preset_of_its_base(
    tmp_path: Path, base: str, preset: str
) -> None:
    config, path = adapter_settings(adapter_of(tmp_path, base))
    assert (config.preset, config.model.base_model, path) == (preset, base, tmp_path)
    over: dict[str, Any] = {"model.base_model": "c/d", "evaluation.seed": 3}
    config, _ = adapter_settings(tmp_path, over)
    assert (config.preset, config.model.base_model, config.evaluation.seed) == (preset, "c/d", 3)


def test_of_several_presets_with_one_base_the_active_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_SFT_PRESET", "trinity-mini-24gb")
    assert adapter_settings(adapter_of(tmp_path, "arcee-ai/Trinity-Mini"))[0].preset == "trinity-mini-24gb"
    tiny = adapter_of(tmp_path, str(data_dir() / "tiny_base"))
    assert adapter_settings(tiny)[0].model.compute_dtype == "float32"
