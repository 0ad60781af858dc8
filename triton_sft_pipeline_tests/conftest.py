"""What every test stands on: its own storage, no settings of the user who runs it, no network."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

from triton_sft_pipeline_tests.commands import Outcome, Run

# Libraries read these when they are imported, so a fixture would be too late.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
# The suite is about the CPU, where results are the same to the bit; what only a GPU can show is marked and run apart.
if not os.environ.get("TRITON_SFT_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# It holds on to the loader that is there when it is imported, which must not be one that a test has put in its place.
importlib.import_module("triton_sft_pipeline.training.run")

# A shell that starts the suite in the background has it ignore SIGINT, and every process below inherits that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("house", deadline=None, derandomize=True, database=None)
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of slow tests first, those that run whole pipelines before all: at the end they would run alone."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    # A stable sort: tests of a file stay together, in their order.
    items.sort(key=lambda item: ("pipeline" not in item.path.parts, -slow[item.path]))


@pytest.fixture(autouse=True)
def own_storage(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Artifacts and Dagster's own files go to a directory of the test; settings in the environment are gone.

    Returns:
        The storage root, which is not made yet.
    """
    for name in os.environ:
        if name.startswith("TRITON_SFT_") and name not in ("TRITON_SFT_REAL_TRACES", "TRITON_SFT_TEST_GPU"):
            monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    (home / "dagster").mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(home / "dagster"))
    monkeypatch.setenv("TRITON_SFT_HOME", str(home / "storage"))
    return home / "storage"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """The entry point inside this process, working in an empty directory."""
    from triton_sft_pipeline import cli

    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["triton-sft", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call
