"""What the asset modules share: the group, the launchpad's trial settings, and how a trace is shown."""

from __future__ import annotations

import os
import socket
from typing import Any

import dagster as dg
from pydantic import Field

from triton_sft_pipeline.config import TRACES_SETTING, Config, load_config, traces_location
from triton_sft_pipeline.processes import process_stamp
from triton_sft_pipeline.traces import hash_location
from triton_sft_pipeline.traces.sources import resolve

GROUP = "triton_sft"
"""One group for all: the lineage page shows the nodes of one group at once and folds several."""


SHOWN = 3
"""Samples on the page of an asset. So many are too long to be shown in place: the UI opens them in a dialog, which is
wide enough for code.
"""

SOURCE = "reasoning_traces"
"""Key of the observed source: whatever `TRITON_SFT_TRACES` names."""


def observe_traces() -> tuple[str, dict[str, Any]]:
    """The content hash of what `TRITON_SFT_TRACES` names, and what the UI shows of it.

    Raises:
        PipelineError: nothing can be read there.
    """
    location = traces_location()
    files = resolve(location, TRACES_SETTING)
    metadata = {
        "location": dg.MetadataValue.path(str(location)),
        "files": len(files),
        "bytes": sum(file.path.stat().st_size for file in files),
    }
    return hash_location(location, TRACES_SETTING), metadata


class TrialConfig(dg.Config):
    """Settings for this run alone, from the launchpad."""

    overrides: dict[str, Any] = Field(
        default={},
        description='Settings by dotted name, such as {"filter.min_speedup": 1.2}. They are recorded with '
        "the artifact, and `triton-sft refresh` counts an artifact made with them as stale.",
    )


def settings_for(active: Config, trial: TrialConfig) -> Config:
    """The active configuration, or a trial's variation of it."""
    return load_config(preset=active.preset, overrides=trial.overrides) if trial.overrides else active


def source_markdown(title: str, pytorch_code: str, reasoning: str, triton_code: str) -> str:
    """A trace as a person reads it: the module, the reasoning, the kernel."""
    quoted = "\n".join(f"> {line}" for line in reasoning.strip().splitlines())
    return (
        f"#### {title}\n\n```python\n{pytorch_code.strip()}\n```\n\n{quoted}\n\n```python\n{triton_code.strip()}\n```"
    )


HOST_TAG, PROCESS_TAG = "triton_sft/host", "triton_sft/process"


def sign_run(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext) -> None:
    """Write on the run which process works on it, so that a killed one can be told from a slow one."""
    tags = {HOST_TAG: socket.gethostname(), PROCESS_TAG: process_stamp(os.getpid())}
    context.instance.add_run_tags(context.run.run_id, tags)
