"""`evaluation_report`: base against tuned, on seen, test and held-out problems, as the judge decides."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from triton_sft_pipeline.assets.common import GROUP, TrialConfig, settings_for, sign_run
from triton_sft_pipeline.assets.gates import Gate, told_plainly, warning
from triton_sft_pipeline.assets.plots import png_markdown, table_markdown
from triton_sft_pipeline.automation import when_stale
from triton_sft_pipeline.config import Config, code_versions, held_out_problems, recorded_config
from triton_sft_pipeline.resources import GPUResource, JudgeResource, StoreResource
from triton_sft_pipeline.storage import Artifact

KEY = "evaluation_report"
ADAPTER, DATASET = "lora_adapter", "chat_dataset"
SPLITS = ("seen", "test", "held_out")


def build_evaluation_asset(active: Config) -> Any:
    """The report under this configuration."""

    @dg.asset(
        key=KEY,
        deps=[ADAPTER, DATASET],
        group_name=GROUP,
        kinds={"pytorch", "html"},
        tags={"domain": "evaluation"},
        pool="gpu",
        code_version=code_versions(active)[KEY],
        automation_condition=when_stale(),
        check_specs=[
            dg.AssetCheckSpec(
                "tuned_not_worse",
                asset=KEY,
                description="Warns when the tuned model has fewer verified kernels than the base on any split.",
            )
        ],
        description="report.html, report.md and report.json with the generations and verdicts behind them. Seen "
        "problems are a memorisation check and are never added up with held-out ones.",
    )
    def evaluation_report(
        context: dg.AssetExecutionContext,
        config: TrialConfig,
        gpu: GPUResource,
        judge: JudgeResource,
        store: StoreResource,
    ) -> Iterator[Any]:
        from triton_sft_pipeline.evaluation import scores_hash, write_report

        sign_run(context)
        with told_plainly():
            opened = store.open()
            adapter = opened.require(ADAPTER)
            settings = settings_for(active, config)
            dataset = opened.version(DATASET, adapter.record["dataset"])
            with opened.building(KEY) as draft:
                report = _evaluate(settings, adapter, dataset, gpu, judge, draft.path)
                write_report(report, draft.path)
                context.log.info("%s", report["headline"])
                artifact = draft.promote(
                    scores_hash(report),
                    code_versions(settings)[KEY],
                    inputs={ADAPTER: adapter.data_version, DATASET: dataset.data_version},
                    record={"headline": report["headline"]},
                )
        yield warning(KEY, tuned_not_worse(report))
        yield dg.MaterializeResult(
            data_version=dg.DataVersion(artifact.data_version),
            metadata=_metadata(report, artifact.path, opened.current_link(KEY)),
        )

    return evaluation_report


def _evaluate(
    settings: Config, adapter: Artifact, dataset: Artifact, gpu: GPUResource, judge: JudgeResource, out: Path
) -> dict[str, Any]:
    from triton_sft_pipeline.evaluation.run import evaluate_splits, problems_of_dataset
    from triton_sft_pipeline.progress import progress_bar

    # The adapter is loaded on what it was trained on, also when that was a trial with another preset.
    trained_with = recorded_config(adapter)
    splits = {**problems_of_dataset(dataset.path), "held_out": held_out_problems(settings)}
    with (
        gpu.model(trained_with, adapter.path) as (model, tokenizer),
        judge.open(settings) as opened,
        progress_bar("answers and verdicts", show=gpu.progress) as progress,
    ):
        return evaluate_splits(
            model,
            tokenizer,
            splits,
            settings.evaluation,
            judge=opened,
            out=out,
            facts=_facts(settings, trained_with, adapter, dataset),
            notes=[trained_with.note],
            progress=progress,
        )


def _facts(settings: Config, trained_with: Config, adapter: Artifact, dataset: Artifact) -> dict[str, Any]:
    return {
        "preset": trained_with.preset,
        "base_model": trained_with.model.base_model,
        "base_model_version": adapter.record["depends_on"]["base"],
        "adapter_version": adapter.data_version,
        "dataset_version": dataset.data_version,
        "filtered_traces_version": dataset.inputs["filtered_traces"],
        "held_out": str(settings.held_out),
        "training_seed": trained_with.training.seed,
        "repeat_with": f"TRITON_SFT_PRESET={trained_with.preset} "
        f"dagster asset materialize -m triton_sft_pipeline.definitions --select {KEY}",
    }


def tuned_not_worse(report: dict[str, Any]) -> Gate:
    """Whether the tuned model has at least as many verified kernels as the base on every split."""
    worse = [s for s in SPLITS if report["tuned"][s]["verified"] < report["base"][s]["verified"]]
    detail = report["headline"][0].upper() + report["headline"][1:] + "."
    return Gate("tuned_not_worse", not worse, f"Worse on {', '.join(worse)}. {detail}" if worse else detail)


def _metadata(report: dict[str, Any], path: Path, link: Path) -> dict[str, Any]:
    from triton_sft_pipeline.evaluation import score_plot_png

    rows = [
        [
            split,
            model,
            report[model][split]["n"],
            report[model][split]["verified"],
            _interval(report[model][split]["verified_interval"]),
        ]
        for split in SPLITS
        for model in ("base", "tuned")
    ]
    numbers = {
        f"{model}_{split}_verified_rate": report[model][split]["verified_rate"]
        for model in ("base", "tuned")
        for split in SPLITS
        if report[model][split]["n"]
    }
    return {
        "headline": report["headline"],
        "scores": dg.MetadataValue.md(table_markdown(["split", "model", "n", "verified", "95 % interval"], rows)),
        "scores_plot": dg.MetadataValue.md(png_markdown(score_plot_png(report))),
        "notes": dg.MetadataValue.md("\n".join(f"- {note}" for note in report["notes"])),
        # A browser opens no file from a page that came over HTTP: what fits into a dialog is here as well as linked.
        "report": dg.MetadataValue.md(_without_problems((path / "report.md").read_text(encoding="utf-8"))),
        "report_html": dg.MetadataValue.url((link / "report.html").as_uri()),
        "path": dg.MetadataValue.path(str(path)),
        **numbers,
    }


def _without_problems(markdown: str) -> str:
    return markdown.partition("\n## Problems")[0] + "\n\nEach problem with its answers: `report.html`."


def _interval(interval: list[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.0%} to {interval[1]:.0%}"
