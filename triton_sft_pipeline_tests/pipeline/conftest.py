"""A pipeline of one's own for every test."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import dagster as dg
import pytest

from triton_sft_pipeline.training.reload import Reloaded
from triton_sft_pipeline_tests.pipeline.harness import Pipeline, answer_nothing


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    monkeypatch.setattr(import_module("triton_sft_pipeline.evaluation.evaluate"), "generate", answer_nothing)
    monkeypatch.setattr(
        "triton_sft_pipeline.training.reload.reload_adapter", lambda directory, settings: Reloaded(1.0, 1.0)
    )
    (tmp_path / "dagster").mkdir()
    overrides = {"telemetry": {"enabled": False}, "concurrency": {"pools": {"default_limit": 1, "granularity": "op"}}}
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster"), overrides=overrides) as instance:
        yield Pipeline(tmp_path, instance, monkeypatch)
