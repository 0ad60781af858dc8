"""`reasoning_traces`, which is observed, and `filtered_traces`, which is made of it."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from triton_sft_pipeline.assets.common import (
    GROUP,
    SOURCE,
    TrialConfig,
    observe_traces,
    settings_for,
    sign_run,
    source_markdown,
)
from triton_sft_pipeline.assets.gates import Gate, enforce, gate_specs, told_plainly, warning
from triton_sft_pipeline.assets.plots import funnel_plot, funnel_table, table_markdown
from triton_sft_pipeline.automation import when_stale
from triton_sft_pipeline.config import Config, code_versions, held_out_fingerprints, traces_location
from triton_sft_pipeline.resources import StoreResource
from triton_sft_pipeline.storage import Artifact
from triton_sft_pipeline.traces import Filtered, FilterSettings, Trace, describe, filter_location, write_filtered

KEY = "filtered_traces"

GATES = {
    "correctness": "Every kept trace is labelled correct: its kernel's output matched PyTorch.",
    "fast_0": "Every kept trace has fast_0 set: the same bar as correctness, so that a contradiction is caught.",
    "min_traces": "At least `filter.min_traces` traces are kept.",
    "accounting": "Every record that was read was kept, dropped or quarantined: nothing is lost.",
}


def build_trace_assets(active: Config) -> list[Any]:
    """The source and the filter under this configuration."""

    @dg.observable_source_asset(
        name=SOURCE,
        group_name=GROUP,
        description="Raw reasoning traces: the file or folder that `TRITON_SFT_TRACES` names, by default the shipped "
        "sample. Observe it to see a change.",
        # An observed source takes no `kinds`; this tag is how Dagster writes them.
        tags={"domain": "traces", "dagster/kind/json": ""},
    )
    def reasoning_traces() -> dg.ObserveResult:
        with told_plainly():
            version, metadata = observe_traces()
        return dg.ObserveResult(data_version=dg.DataVersion(version), metadata=metadata)

    @dg.asset(
        key=KEY,
        deps=[SOURCE],
        group_name=GROUP,
        kinds={"python", "parquet"},
        tags={"domain": "traces"},
        code_version=code_versions(active)[KEY],
        automation_condition=when_stale(),
        check_specs=[
            *gate_specs(KEY, GATES),
            dg.AssetCheckSpec(
                "share_kept",
                asset=KEY,
                description="Warns when less than `filter.min_share_kept` of the records is kept.",
            ),
            dg.AssetCheckSpec(
                "whole_files",
                asset=KEY,
                description="Warns when a file broke off and only the records before were read.",
            ),
        ],
        description="Traces worth training on: labelled correct, with a reasoning, and not about a held-out problem. "
        "Beside them lie `dropped.jsonl` (each with its first reason) and `quarantine.jsonl` (what was no trace).",
    )
    def filtered_traces(context: dg.AssetExecutionContext, config: TrialConfig, store: StoreResource) -> Iterator[Any]:
        sign_run(context)
        settings = settings_for(active, config)
        with told_plainly(), store.open().building(KEY) as draft:
            filtered = filter_location(traces_location(), settings.filter, held_out_fingerprints(settings))
            context.log.info("\n%s", describe(filtered))
            write_filtered(filtered, draft.path)
            yield from enforce(KEY, gates(filtered, settings.filter))
            artifact = draft.promote(
                filtered.data_version,
                code_versions(settings)[KEY],
                inputs={SOURCE: filtered.source_hash},
                record={"settings": settings.filter.model_dump(mode="json"), "funnel": filtered.funnel},
            )
        yield warning(KEY, _share_kept(filtered, settings.filter))
        yield warning(KEY, _whole_files(filtered))
        yield dg.MaterializeResult(
            data_version=dg.DataVersion(artifact.data_version),
            metadata=_metadata(filtered, artifact),
        )

    return [reasoning_traces, filtered_traces]


def gates(filtered: Filtered, settings: FilterSettings) -> list[Gate]:
    """The conditions under which a filter's result may be promoted."""
    kept = filtered.kept
    sums = filtered.funnel
    accounted = sums["kept"] + sum(sums["dropped"].values()) + sum(sums["quarantined"].values())
    enough = len(kept) >= settings.min_traces
    return [
        _holds_for_all("correctness", kept, [t for t in kept if not t.correctness], "is not labelled correct"),
        _holds_for_all("fast_0", kept, [t for t in kept if not t.fast_0], "does not have fast_0 set"),
        Gate(
            "min_traces",
            enough,
            f"{len(kept)} traces are kept, at least {settings.min_traces} are wanted."
            + ("" if enough else _losses(filtered)),
            {
                "kept": len(kept),
                "min_traces": settings.min_traces,
                "dropped_and_quarantined": dg.MetadataValue.md(_examples_of_each_reason(filtered)),
            },
        ),
        Gate("accounting", accounted == filtered.read, f"{filtered.read} records read, {accounted} accounted for."),
    ]


def _holds_for_all(name: str, kept: list[Trace], bad: list[Trace], fault: str) -> Gate:
    if not kept:
        return Gate(name, False, "No trace is kept, so there is nothing that it could hold for.")
    if not bad:
        return Gate(name, True, f"It holds for all {len(kept)} kept traces.")
    first = bad[0]
    place = f"{first.file}, record {first.position} ({first.sample_key})"
    detail = f"{len(bad)} of {len(kept)} kept traces fail it; the first: {place} {fault}."
    return Gate(name, False, detail, {"failing": [t.sample_key for t in bad[:20]]})


def _share_kept(filtered: Filtered, settings: FilterSettings) -> Gate:
    share = len(filtered.kept) / filtered.read if filtered.read else 0.0
    detail = f"{share:.0%} of {filtered.read} records are kept; the bar is {settings.min_share_kept:.0%}."
    return Gate("share_kept", share >= settings.min_share_kept, detail, {"share_kept": share})


def _whole_files(filtered: Filtered) -> Gate:
    detail = "Every file was read to its end." if not filtered.breaks else " ".join(f"{b}." for b in filtered.breaks)
    return Gate("whole_files", not filtered.breaks, detail)


def _metadata(filtered: Filtered, artifact: Artifact) -> dict[str, Any]:
    funnel = filtered.funnel
    return {
        "dagster/row_count": len(filtered.kept),
        "read": filtered.read,
        "dropped": sum(funnel["dropped"].values()),
        "quarantined": sum(funnel["quarantined"].values()),
        "share_kept": len(filtered.kept) / filtered.read if filtered.read else 0.0,
        "problems": len({t.problem for t in filtered.kept}),
        # The whole of it is in artifact.json; 64 characters in one piece make the page's table wider than the page.
        "source_hash": filtered.source_hash[:16],
        "funnel": dg.MetadataValue.md(funnel_table(funnel)),
        "funnel_plot": dg.MetadataValue.md(funnel_plot(funnel)),
        "dropped_and_quarantined": dg.MetadataValue.md(_examples_of_each_reason(filtered)),
        "path": dg.MetadataValue.path(str(artifact.path)),
        "sample_trace": dg.MetadataValue.md(_sample(filtered.kept)),
    }


def _examples_of_each_reason(filtered: Filtered, per_reason: int = 5) -> str:
    refused = [(d.reason, d.trace.sample_key, d.trace.file, d.trace.position, d.detail) for d in filtered.dropped]
    refused += [(m.reason, "(malformed)", m.file, m.position, m.detail) for m in filtered.quarantined]
    seen: dict[str, int] = {}
    rows = []
    for reason, key, file, position, detail in refused:
        seen[reason] = seen.get(reason, 0) + 1
        if seen[reason] <= per_reason:
            rows.append([reason, key, f"{file.rsplit('/', 1)[-1]} #{position}", detail])
    return table_markdown(["reason", "trace", "where", "why"], rows) if rows else "Nothing was dropped."


def _sample(kept: list[Trace]) -> str:
    """The shortest of those that are faster than PyTorch, if any is."""
    trace = min([t for t in kept if t.fast_1] or kept, key=lambda t: len(t.pytorch_code) + len(t.triton_code))
    return source_markdown(trace.sample_key, trace.pytorch_code, trace.reasoning or "", trace.triton_code)


def _losses(filtered: Filtered) -> str:
    dropped, quarantined = _counts(filtered.funnel["dropped"]), _counts(filtered.funnel["quarantined"])
    return f" Of {filtered.read} read, dropped: {dropped}; quarantined: {quarantined}."


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"
