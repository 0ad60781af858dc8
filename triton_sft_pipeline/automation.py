"""The same rule as `triton-sft refresh`, for people who run the Dagster daemon: two sensors, both off until a person turns them on.

What it starts spends GPU hours, so nothing here runs by itself. `watch_traces` observes the source when its content changes;
`refresh_when_stale` then materialises one wave after another.
"""

from __future__ import annotations

import dagster as dg

from triton_sft_pipeline.assets.common import SOURCE
from triton_sft_pipeline.config import traces_location
from triton_sft_pipeline.traces import hash_location


def when_stale() -> dg.AutomationCondition:
    """Materialise when newly missing, when the code version changed, or when a dependency has new data.

    Stricter than `AutomationCondition.eager()`, which launches the whole chain at once, runs again on an identical version, and runs past a failed check:
    here a step waits until nothing above it is running or missing and every gate above it has passed.
    """
    condition = dg.AutomationCondition
    changed = (
        condition.newly_missing() | condition.code_version_changed() | condition.any_deps_match(condition.data_version_changed())
    )
    handled = condition.newly_requested() | condition.newly_updated()
    return (
        changed.since(handled)
        & ~condition.in_progress()
        & ~condition.any_deps_in_progress()
        & ~condition.any_deps_missing()
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
        version = hash_location(traces_location())
        if version == context.cursor:
            return dg.SkipReason("the traces are what they were")
        observation = dg.AssetObservation(SOURCE, tags={"dagster/data_version": version})
        return dg.SensorResult(asset_events=[observation], cursor=version)

    refresh = dg.AutomationConditionSensorDefinition(
        "refresh_when_stale",
        target=dg.AssetSelection.all(),
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Materialises what is stale, wave by wave, held back behind failed gates. Off by default: it spends GPU time.",
    )
    return [watch_traces, refresh]
