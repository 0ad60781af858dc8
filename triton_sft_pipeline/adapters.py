"""Which configuration an adapter is loaded with: what it records, or what its base model suggests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from triton_sft_pipeline.config import Config, load_config, preset_names, recorded_config, storage_root
from triton_sft_pipeline.storage import MANIFEST, ArtifactStore

KEY = "lora_adapter"
_SAMPLES, _TEMPERATURE = "evaluation.samples", "evaluation.temperature"


def adapter_settings(adapter: Path | None, overrides: Mapping[str, Any] | None = None) -> tuple[Config, Path]:
    """The configuration to load an adapter with, and its directory.

    A version of `lora_adapter` records the configuration that it was trained with. Any other adapter records its base
    model alone: the active preset is used when that is its base model too, else the first preset that has it, else the
    active one with that base model.

    Args:
        adapter: a directory; None: the current `lora_adapter`.
        overrides: dotted names to values, which win over what is recorded. With several samples among them a recorded
            temperature of 0 counts as none.

    Raises:
        PipelineError: there is no such adapter, or an override is no setting.
    """
    from triton_sft_pipeline.training.adapter_fit import recorded_base

    if adapter is None:
        artifact = ArtifactStore(storage_root()).require(KEY)
        return _overridden(recorded_config(artifact), overrides), artifact.path
    base = recorded_base(adapter)
    if not (adapter / MANIFEST).is_file():
        return _settings_for_base(base, overrides or {}), adapter
    version = adapter.resolve()
    artifact = ArtifactStore(version.parent.parent).version(version.parent.name, version.name)
    return _overridden(recorded_config(artifact), overrides), version


def _settings_for_base(base: str, overrides: Mapping[str, Any]) -> Config:
    from triton_sft_pipeline.training.adapter_fit import same_model

    suited = (p for p in (None, *preset_names()) if same_model(load_config(preset=p).model.base_model, base))
    # Not the preset's own base: of two directories of one name the adapter knows which.
    return load_config(preset=next(suited, None), overrides={"model.base_model": base, **overrides})


def _overridden(recorded: Config, overrides: Mapping[str, Any] | None) -> Config:
    """A recorded configuration with other values on top, under the same checks as any."""
    if not overrides:
        return recorded
    values: dict[str, Any] = {}
    for name, value in recorded.model_dump(mode="json", exclude={"preset"}).items():
        values |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    samples = overrides.get(_SAMPLES)
    if values.get(_TEMPERATURE) == 0.0 and isinstance(samples, int) and samples > 1:
        # Earlier versions wrote the 0 of a single answer down; nobody chose it for several.
        values[_TEMPERATURE] = None
    preset = recorded.preset if recorded.preset in preset_names() else None
    return load_config(preset=preset, overrides=values | dict(overrides))
