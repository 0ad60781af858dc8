"""The pipeline in processes of its own: what a shell, CI or the web server starts."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from triton_sft_pipeline.config import load_config
from triton_sft_pipeline.definitions import build_definitions
from triton_sft_pipeline.resources import StoreResource
from triton_sft_pipeline.storage import ArtifactStore
from triton_sft_pipeline_tests.pipeline.harness import sample_traces

CHECKOUT = Path(__file__).resolve().parents[2]

SETTINGS = """
filter: {min_traces: 3}
evaluation: {judge_trials: 1}
"""
"""Few traces and one trial each, because every process that judges pays for it."""


def good_traces(count: int) -> list[dict[str, Any]]:
    """The first correct sample traces."""
    return [t for t in sample_traces() if t.get("result") and t["result"]["correctness"]][:count]


class Workplace:
    """A directory with traces, storage and a Dagster home, and the processes that work on them."""

    def __init__(self, root: Path, count: int = 4) -> None:
        self.root = root
        self.traces = root / "traces.json"
        self.store = ArtifactStore(root / "storage")
        self.home = root / "dagster_home"
        self.home.mkdir()
        (self.home / "dagster.yaml").write_bytes((CHECKOUT / "dagster_home" / "dagster.yaml").read_bytes())
        (root / "settings.yaml").write_text(SETTINGS)
        self.write(good_traces(count))

    def write(self, traces: list[dict[str, Any]]) -> None:
        self.traces.write_text(json.dumps(traces))

    def environment(self, home: bool = True) -> dict[str, str]:
        """The variables of a user's shell; without `home`, DAGSTER_HOME is not among them."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_SFT_", "DAGSTER_"))}
        return {
            **inherited,
            "TRITON_SFT_HOME": str(self.store.root),
            "TRITON_SFT_TRACES": str(self.traces),
            "TRITON_SFT_CONFIG": str(self.root / "settings.yaml"),
            **({"DAGSTER_HOME": str(self.home)} if home else {}),
        }

    @contextmanager
    def instance(self) -> Iterator[dg.DagsterInstance]:
        """What the processes recorded under the Dagster home."""
        with dg.DagsterInstance.from_config(str(self.home)) as instance:
            yield instance

    def make_here(self, key: str, instance: dg.DagsterInstance | None = None) -> None:
        """Materialise an asset in this process: what a process of its own does, in a tenth of the time."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_SFT_TRACES", str(self.traces))
            patch.delenv("TRITON_SFT_PRESET", raising=False)
            definitions = build_definitions(load_config(file=self.root / "settings.yaml"))
            assets: list[Any] = [*(definitions.assets or [])]
            resources = {**(definitions.resources or {}), "store": StoreResource(root=str(self.store.root))}
            assert dg.materialize(assets, selection=[key], instance=instance, resources=resources).success

    def start(self, *arguments: str, home: bool = True, output: Path | None = None) -> subprocess.Popen[str]:
        """Start a Python module with `arguments` as the leader of a process group.

        Args:
            output: file for what it says; without one, `finish` reads it.
        """
        with ExitStack() as opened:
            said = opened.enter_context(output.open("w")) if output else subprocess.PIPE
            return subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=self.root,
                env=self.environment(home),
                start_new_session=True,
            )

    def start_materialising(self, selection: str, *options: str, home: bool = True) -> subprocess.Popen[str]:
        """The command of the README."""
        module = ("-m", "triton_sft_pipeline.definitions")
        return self.start("dagster", "asset", "materialize", *module, "--select", selection, *options, home=home)

    def materialise(self, selection: str, *options: str, home: bool = True) -> tuple[int, str]:
        """Exit code and output of the command of the README."""
        return finish(self.start_materialising(selection, *options, home=home))


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a process; returns its exit code and what it said. None of its children is left behind."""
    try:
        said, _ = process.communicate(timeout=180)
    finally:
        kill_group(process)
    return process.returncode, said


def kill_group(process: subprocess.Popen[str]) -> None:
    """`kill -9` of a process and everything that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
