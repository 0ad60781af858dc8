"""The same rule as `triton-sft refresh`, for people who run the Dagster daemon: two sensors,
both off until a person turns them on.

What it starts spends GPU hours, so nothing here runs by itself. `watch_traces` observes the source when its content
changes; `refresh_when_stale` then materialises one wave after another. It acts on what changes from then on: what was
stale before is left to a `triton-sft refresh`.
"""

from __future__ import annotations

import dagster as dg

from triton_sft_pipeline.assets.common import SOURCE, observe_traces
from triton_sft_pipeline.errors import PipelineError


def when_stale() -> dg.AutomationCondition:
    """Materialise when newly missing, when the code version changed, or when a dependency has new data.

    Stricter than `AutomationCondition.eager()`, which launches the whole chain at once, runs again on an identical
    version, and runs past a failed check: here a step waits while anything right above it is missing, about to run or
    running, and until every gate right above it has passed; a step that failed or was cancelled leaves its gates open.
    So each wave sees whether the one before changed anything.
    """
    condition = dg.AutomationCondition
    new_input = condition.any_deps_match(condition.data_version_changed())
    changed = condition.newly_missing() | condition.code_version_changed() | new_input
    handled = condition.newly_requested() | condition.newly_updated()
    # Dagster's own any_deps_missing() lets a parent pass that is requested in the same tick, and the child with it.
    unfinished = condition.missing() | condition.will_be_requested() | condition.in_progress()
    return (
        changed.since(handled)
        & ~condition.in_progress()
        & ~condition.any_deps_match(unfinished)
        & condition.all_deps_blocking_checks_passed()
    ).with_label("when_stale")


def build_sensors() -> list[dg.SensorDefinition]:
    """The two sensors, stopped."""

    @dg.sensor(
        name="watch_traces",
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Observes reasoning_traces when the content of what TRITON_SFT_TRACES names has changed.",
    )
    def watch_traces(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        try:
            version, metadata = observe_traces()
        except PipelineError as error:
            # A file that is being replaced is not there for a moment; the next tick looks again.
            return dg.SkipReason(str(error))
        if version == context.cursor:
            return dg.SkipReason("the traces are what they were")
        observation = dg.AssetObservation(SOURCE, metadata=metadata, tags={"dagster/data_version": version})
        return dg.SensorResult(asset_events=[observation], cursor=version)

    refresh = dg.AutomationConditionSensorDefinition(
        "refresh_when_stale",
        target=dg.AssetSelection.all(),
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Materialises what became stale, wave by wave, held back behind failed gates. Off by default: it "
        "spends GPU time.",
    )
    return [watch_traces, refresh]
