"""A pipeline of one's own for every test."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest

from triton_sft_pipeline.refresh import PARENTS
from triton_sft_pipeline.training.reload import Reloaded
from triton_sft_pipeline_tests.pipeline.harness import Pipeline, RecordedGPU


@contextmanager
def a_pipeline(directory: Path, monkeypatch: pytest.MonkeyPatch, begun: Path | None = None) -> Iterator[Pipeline]:
    """A pipeline in `directory`, with an instance of its own; it goes on from a copy of `begun`, if that is given."""
    monkeypatch.setattr(
        "triton_sft_pipeline.training.reload.reload_adapter", lambda directory, settings: Reloaded(1.0, 1.0)
    )
    if begun is None:
        (directory / "dagster").mkdir()
    else:
        # The pointer to what is current is a relative link: copied as one, it points into the copy.
        shutil.copytree(begun, directory, symlinks=True, dirs_exist_ok=True)
    overrides = {"telemetry": {"enabled": False}, "concurrency": {"pools": {"default_limit": 1, "granularity": "op"}}}
    with dg.DagsterInstance.local_temp(str(directory / "dagster"), overrides=overrides) as instance:
        yield Pipeline(directory, instance, monkeypatch)


def first_refresh(directory: Path, gpu: RecordedGPU) -> Path:
    """Refresh a new pipeline in `directory` and leave it, for tests to go on from copies of it."""
    with pytest.MonkeyPatch.context() as patches, a_pipeline(directory, patches) as made:
        made.resources["gpu"] = gpu
        assert made.refresh().ran == list(PARENTS)
    return directory


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    """Nothing is made yet."""
    with a_pipeline(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture(scope="session")
def first_refreshed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a first refresh left. It takes seconds, a copy of it none: change nothing in it."""
    return first_refresh(tmp_path_factory.mktemp("first_refreshed"), RecordedGPU())


@pytest.fixture
def refreshed(first_refreshed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    """Everything was made by one refresh, as a process before this one left it."""
    with a_pipeline(tmp_path, monkeypatch, begun=first_refreshed) as made:
        yield made
