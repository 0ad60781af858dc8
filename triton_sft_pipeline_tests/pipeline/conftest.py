"""A pipeline of one's own for every test."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest

from triton_sft_pipeline.training.reload import Reloaded
from triton_sft_pipeline_tests.pipeline.harness import Pipeline


@contextmanager
def a_pipeline(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    """A pipeline in `directory`, with an instance of its own."""
    monkeypatch.setattr(
        "triton_sft_pipeline.training.reload.reload_adapter", lambda directory, settings: Reloaded(1.0, 1.0)
    )
    (directory / "dagster").mkdir()
    overrides = {"telemetry": {"enabled": False}, "concurrency": {"pools": {"default_limit": 1, "granularity": "op"}}}
    with dg.DagsterInstance.local_temp(str(directory / "dagster"), overrides=overrides) as instance:
        yield Pipeline(directory, instance, monkeypatch)


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    with a_pipeline(tmp_path, monkeypatch) as made:
        yield made
