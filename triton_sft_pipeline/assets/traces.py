"""`reasoning_traces`, which is observed, and `filtered_traces`, which is made of it."""

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import dagster as dg

from triton_sft_pipeline.assets import trace_gates
from triton_sft_pipeline.assets.common import (
    GROUP,
    SHOWN,
    SOURCE,
    TrialConfig,
    observe_traces,
    settings_for,
    sign_run,
    source_markdown,
)
from triton_sft_pipeline.assets.gates import enforce, gate_specs, told_plainly, warning
from triton_sft_pipeline.assets.plots import funnel_plot, funnel_table
from triton_sft_pipeline.automation import when_stale
from triton_sft_pipeline.config import (
    TRACES_SETTING,
    Config,
    code_versions,
    held_out_fingerprints,
    held_out_problems,
    traces_location,
)
from triton_sft_pipeline.resources import StoreResource
from triton_sft_pipeline.storage import Artifact
from triton_sft_pipeline.traces import Filtered, Trace, describe, filter_location, iterate_kept, write_filtered

KEY = "filtered_traces"


def build_trace_assets(active: Config) -> list[Any]:
    """The source and the filter under this configuration."""

    @dg.observable_source_asset(
        name=SOURCE,
        group_name=GROUP,
        description="Raw reasoning traces: the files, folders, patterns or dataset that `TRITON_SFT_TRACES` names, by "
        "default the shipped sample. Observe it to see a change.",
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
            *gate_specs(KEY, trace_gates.GATES),
            *(dg.AssetCheckSpec(n, asset=KEY, description=text) for n, text in trace_gates.WARNINGS.items()),
        ],
        description="Traces worth training on: labelled correct without a contradiction, with a kernel that launches "
        "and a reasoning, no duplicates, and not about a held-out problem. "
        "Beside them lie `dropped.jsonl` (each with its first reason) and `quarantine.jsonl` (what was no trace).",
    )
    def filtered_traces(context: dg.AssetExecutionContext, config: TrialConfig, store: StoreResource) -> Iterator[Any]:
        sign_run(context)
        settings = settings_for(active, config)
        opened = store.open()
        with told_plainly(), opened.building(KEY) as draft:
            filtered = filter_location(
                traces_location(),
                settings.filter,
                held_out_problems(settings),
                workplace=draft.path,
                cache=opened.root / ".cache" / f"{KEY}.sqlite",
                origin=TRACES_SETTING,
                on_bytes=_logged(context, "bytes read"),
                on_compared=_logged(context, "kernels compared"),
            )
            context.log.info("\n%s", describe(filtered))
            write_filtered(filtered, draft.path)
            filtered.discard()
            held = yield from enforce(
                KEY, trace_gates.gates(filtered, settings.filter, held_out_fingerprints(settings))
            )
            last = opened.current(KEY)
            before = trace_gates.LastTime.of(last.record if last else None)
            artifact = draft.promote(
                filtered.data_version,
                code_versions(settings)[KEY],
                inputs={SOURCE: filtered.source_hash},
                record={
                    "settings": settings.filter.model_dump(mode="json"),
                    "funnel": filtered.funnel,
                    "statistics": trace_gates.statistics(filtered),
                },
            )
        warned = [warning(KEY, gate) for gate in trace_gates.warnings(filtered, settings.filter, before)]
        yield dg.MaterializeResult(
            data_version=dg.DataVersion(artifact.data_version),
            check_results=[*held, *warned],
            metadata=_metadata(filtered, artifact),
        )

    return [reasoning_traces, filtered_traces]


def _logged(context: dg.AssetExecutionContext, what: str) -> Callable[[int, int], None]:
    """Progress in the run's log: a line for each quarter. Small jobs are done before anybody reads."""
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        quarter = 4 * done // max(1, total)
        if total >= _WORTH_TELLING.get(what, 0) and quarter > told:
            told = quarter
            context.log.info("%s: %s of %s", what, f"{done:,}", f"{total:,}")

    return tell


_WORTH_TELLING = {"bytes read": 50_000_000, "kernels compared": 5_000}


def _metadata(filtered: Filtered, artifact: Artifact) -> dict[str, Any]:
    funnel = filtered.funnel
    return {
        "dagster/row_count": filtered.kept_count,
        "read": filtered.read,
        "kept": filtered.kept_count,
        "dropped": sum(funnel["dropped"].values()),
        "quarantined": sum(funnel["quarantined"].values()),
        **_named_for_people(trace_gates.statistics(filtered)),
        # The whole of it is in artifact.json; 64 characters in one piece make the page's table wider than the page.
        "source_hash": filtered.source_hash[:16],
        "funnel": dg.MetadataValue.md(funnel_table(funnel)),
        "funnel_plot": dg.MetadataValue.md(funnel_plot(funnel)),
        "dropped_and_quarantined": dg.MetadataValue.md(trace_gates.samples_of_each_reason(filtered)),
        "path": dg.MetadataValue.path(str(artifact.path)),
        "samples": dg.MetadataValue.md(_samples(artifact)),
    }


_SHARES = {
    "contradictory_labels": "share_contradictory",
    "duplicates": "share_duplicates",
    "largest_problem": "share_largest_problem",
    "largest_family": "share_largest_family",
}
"""Statistics that are shares and could be read as counts."""


def _named_for_people(statistics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        _SHARES.get(name, name): round(value, 4) if isinstance(value, float) else value
        for name, value in statistics.items()
    }


def _samples(artifact: Artifact) -> str:
    """The shortest ones, those first that are faster than PyTorch."""
    shortest = heapq.nsmallest(
        SHOWN,
        iterate_kept(artifact.path),
        key=lambda t: (not t.fast_1, len(t.pytorch_code) + len(t.triton_code), t.version),
    )
    return "\n\n".join(map(_sample, shortest))


def _sample(trace: Trace) -> str:
    title = trace.sample_key if trace.speedup is None else f"{trace.sample_key}, labelled {trace.speedup:.2f}x"
    return source_markdown(title, trace.pytorch_code, trace.reasoning or "", trace.triton_code)
