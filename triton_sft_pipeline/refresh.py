"""Materialise only what is stale, in waves, without a daemon or a server: what CI runs.

Staleness in Dagster is one hop: a child becomes stale when its parent has a new data version. So a refresh observes the
source, materialises what is stale and has nothing stale above it, looks again, and stops when nothing is left. A parent
that comes out the same leaves its children alone. What failed is not tried again in the same refresh, and everything
below it is held back.

Two things are asked about each asset: what Dagster's event log says, and what the current artifact says of itself. The
second catches what the log cannot
know: artifacts that are gone, a trial made with other settings, a log that was thrown away.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

from triton_sft_pipeline.assets.common import HOST_TAG, PROCESS_TAG, SOURCE, observe_traces
from triton_sft_pipeline.config import TRACES_SETTING, Config, code_versions, traces_location
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import atomic_write_bytes
from triton_sft_pipeline.processes import process_is_alive
from triton_sft_pipeline.storage import Artifact, ArtifactStore
from triton_sft_pipeline.traces import hash_location

PARENTS: Mapping[str, tuple[str, ...]] = {
    "filtered_traces": (SOURCE,),
    "chat_dataset": ("filtered_traces",),
    "lora_adapter": ("chat_dataset",),
    "evaluation_report": ("lora_adapter", "chat_dataset"),
}
"""The assets in order, with what each is made from. A test holds it against the definitions."""

OPTIONAL: Mapping[str, tuple[str, ...]] = {"merged_model": ("lora_adapter",)}
"""Those that a configuration may add, likewise. Nothing is made from them."""

_ALL = {**PARENTS, **OPTIONAL}

SHIPPED_HOME = Path(__file__).resolve().parent.parent / "dagster_home"
"""The Dagster home of a checkout."""

DATA_VERSION_TAG = "dagster/data_version"

Say = Callable[[str], None]


@dataclass
class Outcome:
    """What a refresh did.

    Attributes:
        ran: asset keys that were materialised, in order.
        failed: asset key -> why it failed.
        held_back: asset keys that were not run because something above them failed.
    """

    ran: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    held_back: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0: refreshed, or nothing to do. 1: a step failed or a gate held something back."""
        return 1 if self.failed or self.held_back else 0


def refresh(
    instance: dg.DagsterInstance,
    definitions: dg.Definitions,
    config: Config,
    store: ArtifactStore,
    *,
    say: Say = print,
    dry_run: bool = False,
    resources: Mapping[str, Any] | None = None,
) -> Outcome:
    """Observe the source, then materialise what is stale until nothing is.

    Args:
        dry_run: say what the first wave would be and why; run nothing.
        resources: take the place of the definitions' resources.

    Raises:
        PipelineError: the traces cannot be read.
    """
    version, metadata = observe_traces()
    if dry_run:
        return _plan(instance, definitions, config, store, say)
    with _alone(store.root, say):
        release_dead_runs(instance, say)
        runner = _Runner(instance, definitions, dict(resources or {}))
        # An event without a run: what the "Observe" button records, without the seconds that a run takes.
        observation = dg.AssetObservation(SOURCE, tags={DATA_VERSION_TAG: version}, metadata=metadata)
        instance.report_runless_asset_event(observation)
        return _waves(runner, config, store, say)


def stale_assets(
    instance: dg.DagsterInstance, definitions: dg.Definitions, config: Config, store: ArtifactStore
) -> dict[str, str]:
    """Asset key -> why it is stale, in order; fresh ones are left out. Neither observes nor runs anything."""
    versions = code_versions(config)
    wanted = _wanted(config)
    logged = _stale_by_log(instance, definitions, wanted)
    reasons = {}
    for key in wanted:
        reason = _stale_by_artifact(store, key, versions[key]) or logged.get(key)
        if reason:
            reasons[key] = reason
    return reasons


def _waves(runner: _Runner, config: Config, store: ArtifactStore, say: Say) -> Outcome:
    outcome = Outcome()
    while True:
        stale = stale_assets(runner.instance, runner.definitions, config, store)
        wave = _ready(stale, outcome)
        if not wave:
            break
        for key in wave:
            say(f"{key}: {stale[key]}")
            started = time.monotonic()
            failure = runner.materialise(key)
            seconds = time.monotonic() - started
            if failure is None:
                outcome.ran.append(key)
                say(f"{key}: done in {seconds:.0f} s")
            else:
                outcome.failed[key] = failure
                say(f"{key}: FAILED after {seconds:.0f} s\n  {failure}")
    outcome.held_back = [key for key in _wanted(config) if key in _below(outcome.failed)]
    return outcome


def _ready(stale: Mapping[str, str], outcome: Outcome) -> list[str]:
    """What is stale, was not tried yet, and has nothing stale or failed above it."""
    tried = {*outcome.ran, *outcome.failed}
    blocked = {*(set(stale) - set(outcome.ran)), *outcome.failed, *_below(outcome.failed)}
    return [key for key in stale if key not in tried and not blocked & set(_ancestors(key))]


def _wanted(config: Config) -> list[str]:
    """The assets that this configuration makes, in order."""
    made = code_versions(config)
    return [key for key in _ALL if key in made]


def _ancestors(key: str) -> Iterator[str]:
    for parent in _ALL.get(key, ()):
        yield parent
        yield from _ancestors(parent)


def _below(failed: Mapping[str, str]) -> list[str]:
    return [key for key in _ALL if key not in failed and set(_ancestors(key)) & set(failed)]


def _plan(
    instance: dg.DagsterInstance, definitions: dg.Definitions, config: Config, store: ArtifactStore, say: Say
) -> Outcome:
    stale = stale_assets(instance, definitions, config, store)
    current = store.current("filtered_traces")
    if current and current.inputs.get(SOURCE) != hash_location(traces_location(), TRACES_SETTING):
        stale.setdefault("filtered_traces", "the traces changed since they were filtered")
    if not stale:
        say("Nothing is stale.")
    for key in _wanted(config):
        if key in stale:
            say(f"would run {key}: {stale[key]}")
        elif set(_ancestors(key)) & set(stale):
            say(f"would run {key} if what is above it comes out different")
    return Outcome()


def _stale_by_log(instance: dg.DagsterInstance, definitions: dg.Definitions, wanted: Sequence[str]) -> dict[str, str]:
    """What Dagster's event log says. Its resolver is not public: dagster is pinned, and a test covers every answer that
    is used here.
    """
    from dagster._core.asset_graph_view.asset_graph_view import AssetGraphView, TemporalContext
    from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
    from dagster._time import get_current_datetime

    graph = definitions.resolve_asset_graph()
    now = TemporalContext(effective_dt=get_current_datetime(), last_event_id=None)
    view = AssetGraphView(temporal_context=now, instance=instance, asset_graph=graph)
    resolver = CachingStaleStatusResolver(instance=instance, asset_graph=graph, loading_context=view)
    reasons = {}
    for name in wanted:
        key = dg.AssetKey(name)
        status = resolver.get_status(key)
        if status == StaleStatus.MISSING:
            reasons[name] = "never materialised on this Dagster instance"
        elif status == StaleStatus.STALE:
            causes = [
                f"{cause.reason} ({cause.dependency_asset_key.to_user_string()})"
                if cause.dependency_asset_key
                else cause.reason
                for cause in resolver.get_stale_causes(key)
            ]
            reasons[name] = "; ".join(dict.fromkeys(causes))
    return reasons


def _stale_by_artifact(store: ArtifactStore, key: str, code_version: str) -> str | None:
    """What the current artifact says of itself."""
    artifact = store.current(key)
    if artifact is None:
        return "there is no current artifact"
    if artifact.code_version != code_version:
        return "it was made with another configuration than today's"
    for parent in _ALL[key]:
        source = store.current(parent) if parent != SOURCE else None
        if source and _made_from(artifact, parent) != source.data_version:
            return f"{parent} is another version than the one it was made from"
    return None


def _made_from(artifact: Artifact, parent: str) -> str | None:
    return artifact.inputs.get(parent)


class _Runner:
    """Runs one asset at a time in this process, recorded on the instance like any other run."""

    def __init__(self, instance: dg.DagsterInstance, definitions: dg.Definitions, resources: dict[str, Any]) -> None:
        self.instance = instance
        self.definitions = definitions
        self._resources = {**(definitions.resources or {}), **resources}

    def materialise(self, key: str) -> str | None:
        """Run one asset with its checks; returns why it failed, or None."""
        everything: list[Any] = [*(self.definitions.assets or []), *(self.definitions.asset_checks or [])]
        result = dg.materialize(
            everything,
            selection=dg.AssetSelection.assets(key),
            instance=self.instance,
            resources=self._resources,
            run_config=_quiet(),
            raise_on_error=False,
            tags={"triton_sft/refresh": "true"},
        )
        return None if result.success else _failure_of(result)


def _quiet() -> dict[str, Any]:
    """Dagster's console is silent: the refresh says in its own words what it does, and the event log keeps the rest."""
    return {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def _failure_of(result: Any) -> str:
    """Why a run failed, in one sentence.

    Raises:
        KeyboardInterrupt: it was interrupted; whatever is below it was not meant to run either.
    """
    for event in result.all_events:
        if event.is_step_failure:
            data = event.event_specific_data
            if data.user_failure_data and data.user_failure_data.description:
                return data.user_failure_data.description
            return _cause(data.error)
    return "the run failed before its step began; see the Dagster event log"


def _cause(error: Any) -> str:
    """The first cause of an error that Dagster recorded. Its traceback is in the event log; TRITON_SFT_DEBUG shows it
    here.
    """
    while error and error.cause:
        error = error.cause
    if error is None:
        return "the step failed without saying why"
    if error.cls_name in ("DagsterExecutionInterruptedError", "KeyboardInterrupt"):
        raise KeyboardInterrupt
    shown = error.to_string() if os.environ.get("TRITON_SFT_DEBUG") else f"unexpected {error.message}"
    return shown.strip()


@contextmanager
def _alone(root: Path, say: Say) -> Iterator[None]:
    """One refresh at a time on these artifacts; a second one waits, then finds little or nothing left to do."""
    with _locked(
        root / ".refresh.lock", lambda: say("Another refresh is at work on the same storage; waiting for it.")
    ):
        yield


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def release_dead_runs(instance: dg.DagsterInstance, say: Say) -> None:
    """Mark runs of this machine whose process is gone as failed and give back what they held of the GPU pool.

    A `kill -9` leaves a run "in progress" for ever, with its slot of the pool: everything after it would wait without a
    word.
    """
    active: Sequence[dg.DagsterRunStatus] = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
    for run in instance.get_runs(dg.RunsFilter(statuses=list(active), tags={HOST_TAG: socket.gethostname()})):
        if process_is_alive(run.tags.get(PROCESS_TAG, "")):
            continue
        instance.report_run_failed(run, "The process of this run is gone; marked as failed by `triton-sft refresh`.")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        say(f"run {run.run_id[:8]} was killed earlier: marked as failed, its place in the GPU pool given back")


def open_instance() -> dg.DagsterInstance:
    """The Dagster instance that remembers what was materialised: DAGSTER_HOME, else `dagster_home` of the checkout.

    What steps print goes to this terminal and nowhere else. Dagster's copy of it would need two processes a step, which
    answer Ctrl-C with tracebacks.

    Raises:
        PipelineError: neither is there.
    """
    from dagster._core.instance.ref import InstanceRef

    home = os.environ.get("DAGSTER_HOME")
    directory = Path(home).expanduser().absolute() if home else SHIPPED_HOME
    if home:
        directory.mkdir(parents=True, exist_ok=True)
    elif not (directory / "dagster.yaml").is_file():
        raise PipelineError(
            "DAGSTER_HOME is not set. Point it at a directory that remembers what was materialised, such as ~/.dagster."
        )
    os.environ["DAGSTER_HOME"] = str(directory)
    _configure_once(directory)
    quiet = {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager"}
    # Two processes that create Dagster's databases at once leave them unusable.
    with _locked(directory / ".open.lock", lambda: None):
        return dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(directory), overrides={"compute_logs": quiet}))


def _configure_once(directory: Path) -> None:
    """Give a new Dagster home the shipped settings: one place in the GPU pool, no telemetry."""
    shipped, own = SHIPPED_HOME / "dagster.yaml", directory / "dagster.yaml"
    if shipped.is_file() and not own.exists():
        atomic_write_bytes(own, shipped.read_bytes())
