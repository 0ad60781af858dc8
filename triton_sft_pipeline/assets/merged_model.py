"""`merged_model`: base model and adapter as one checkpoint, for those who serve it. There while `merge.enabled` is."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from triton_sft_pipeline.assets.common import GROUP, sign_run
from triton_sft_pipeline.assets.gates import Gate, enforce, gate_specs, told_plainly, warning
from triton_sft_pipeline.assets.plots import table_markdown
from triton_sft_pipeline.automation import when_stale
from triton_sft_pipeline.config import Config, base_model_version, code_versions, recorded_config
from triton_sft_pipeline.resources import StoreResource
from triton_sft_pipeline.storage import Artifact

if TYPE_CHECKING:
    from triton_sft_pipeline.training.merge import MergePlan, MergeReport

KEY = "merged_model"
PARENT = "lora_adapter"

GATES = {"same_base": "The base model is what it was when the adapter was trained on it."}


def build_merged_asset(active: Config) -> Any:
    """The merged model under this configuration."""

    @dg.asset(
        key=KEY,
        deps=[PARENT],
        group_name=GROUP,
        kinds={"pytorch", "huggingface"},
        tags={"domain": "training"},
        code_version=code_versions(active)[KEY],
        automation_condition=when_stale(),
        check_specs=[
            *gate_specs(KEY, GATES),
            dg.AssetCheckSpec(
                "weights_moved",
                asset=KEY,
                description="Warns when an update left a weight bit for bit what it was: it was zero, or lost in "
                "rounding.",
            ),
        ],
        description="The unquantised base model with the adapter folded in: a checkpoint in the layout that vLLM, "
        "SGLang and transformers load, as large as the base. Only there while `merge.enabled` is true.",
    )
    def merged_model(context: dg.AssetExecutionContext, store: StoreResource) -> Iterator[Any]:
        from triton_sft_pipeline.training.merge import plan_merge, write_merged

        sign_run(context)
        with told_plainly():
            opened = store.open()
            adapter = opened.require(PARENT)
            held = yield from enforce(KEY, [same_base(adapter)])
            plan = plan_merge(_base_directory(adapter), adapter.path)
            with opened.building(KEY) as draft:
                report = write_merged(plan, draft.path)
                artifact = draft.promote(
                    report.version,
                    code_versions(active)[KEY],
                    inputs={PARENT: adapter.data_version},
                    record={"base": adapter.record["depends_on"]["base"], "adapter": adapter.path.name},
                )
        yield dg.MaterializeResult(
            data_version=dg.DataVersion(artifact.data_version),
            check_results=[*held, warning(KEY, weights_moved(report))],
            metadata=_metadata(plan, report, artifact.path, opened.current_link(KEY)),
        )

    return merged_model


def same_base(adapter: Artifact) -> Gate:
    """Whether the adapter's base model is still the one that it was trained on."""
    trained_with = recorded_config(adapter).model
    then = adapter.record["depends_on"]["base"]
    now = base_model_version(trained_with.base_model, trained_with.revision)
    told = f"{trained_with.base_model} is what the adapter was trained on."
    if now != then:
        told = (
            f"{trained_with.base_model} changed since the adapter was trained on it: train again, or put the old base "
            "back."
        )
    return Gate("same_base", now == then, told)


def weights_moved(report: "MergeReport") -> Gate:
    """Whether every update changed the weight that it was added to."""
    moved = report.updated - report.unmoved
    return Gate("weights_moved", not report.unmoved, f"{moved} of {report.updated} updated tensors have new numbers.")


def _base_directory(adapter: Artifact) -> Path:
    from triton_sft_pipeline.training.merge import hub_directory

    trained_with = recorded_config(adapter).model
    directory = Path(trained_with.base_model)
    return directory if directory.is_dir() else hub_directory(trained_with.base_model, trained_with.revision)


def _metadata(plan: "MergePlan", report: "MergeReport", path: Path, link: Path) -> dict[str, Any]:
    from triton_sft_pipeline.training.updates import kinds

    rows = [[name, count] for name, count in sorted(kinds(plan.updates).items())]
    return {
        "base_model": str(plan.base),
        "tensors": report.tensors,
        "updated_tensors": report.updated,
        "bytes": report.size,
        "updated": dg.MetadataValue.md(table_markdown(["tensor", "updated"], rows)),
        "serve_with": f"vllm serve {link}",
        "path": dg.MetadataValue.path(str(path)),
    }
