"""`evaluation_report`: base against tuned, on seen, test and held-out problems, as the judge decides.

How it is shown in the UI stands in `evaluation_metadata`.
"""

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from triton_sft_pipeline.assets.common import GROUP, SOURCE, TrialConfig, settings_for, sign_run
from triton_sft_pipeline.assets.evaluation_metadata import report_metadata, tuned_not_worse
from triton_sft_pipeline.assets.gates import told_plainly, warning
from triton_sft_pipeline.automation import when_stale
from triton_sft_pipeline.config import Config, code_versions, held_out_set, recorded_config
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import hash_json
from triton_sft_pipeline.resources import GPUResource, JudgeResource, StoreResource
from triton_sft_pipeline.storage import Artifact, ArtifactStore
from triton_sft_pipeline.verification import JUDGE_VERSION

if TYPE_CHECKING:
    from triton_sft_pipeline.problems import Problem, Unusable

KEY = "evaluation_report"
ADAPTER, DATASET, FILTERED = "lora_adapter", "chat_dataset", "filtered_traces"


@dataclass(frozen=True)
class Exam:
    """What is asked: problems by split, what of the held-out ones the training data touches and how, and what cannot be
    asked.
    """

    splits: dict[str, list["Problem"]]
    touched: dict[str, str]
    unusable: list["Unusable"]


@dataclass(frozen=True)
class Examinee:
    """Who is asked: an adapter, the dataset it was trained on, and the configuration that it was trained with."""

    adapter: Artifact
    dataset: Artifact
    trained_with: Config


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
                description="Warns when the tuned model's fast_0 (share of verified answers) is below the base's on "
                "any split that has problems.",
            )
        ],
        description="report.html, report.md and report.json with the generations and verdicts behind them. Seen "
        "problems are a memorisation check and are never added up with held-out ones. A killed run goes on where it "
        "was.",
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
            # The adapter is loaded on what it was trained on, also when that was a trial with another preset.
            examinee = Examinee(adapter, dataset, recorded_config(adapter))
            fingerprint = workspace_name(settings, examinee, judge)
            with opened.workspace(KEY, fingerprint) as workspace:
                if any(workspace.iterdir()):
                    context.log.info("going on with what an earlier run left in %s", workspace)
                about = provenance_facts(settings, examinee, judge, opened, config.overrides)
                report = _evaluate(settings, examinee, gpu, judge, workspace, about)
                context.log.info("%s", report["headline"])
                with opened.building(KEY) as draft:
                    shutil.copytree(workspace, draft.path, dirs_exist_ok=True)
                    write_report(report, draft.path)
                    artifact = draft.promote(
                        scores_hash(report),
                        code_versions(settings)[KEY],
                        inputs={ADAPTER: adapter.data_version, DATASET: dataset.data_version},
                        record={"headline": report["headline"]},
                    )
            opened.discard_workspace(KEY, fingerprint)
        yield dg.MaterializeResult(
            data_version=dg.DataVersion(artifact.data_version),
            check_results=[warning(KEY, tuned_not_worse(report))],
            metadata=report_metadata(report, artifact.path, opened.current_link(KEY)),
        )

    return evaluation_report


def _evaluate(
    settings: Config, examinee: Examinee, gpu: GPUResource, judge: JudgeResource, out: Path, about: dict[str, Any]
) -> dict[str, Any]:
    from triton_sft_pipeline.evaluation import LocalAsker
    from triton_sft_pipeline.evaluation.run import evaluate_splits
    from triton_sft_pipeline.problems.weights import hub_models
    from triton_sft_pipeline.progress import progress_bar

    exam = problems_to_ask(settings, examinee)
    models = hub_models(problem.pytorch_code for problems in exam.splits.values() for problem in problems)
    with (
        gpu.model(examinee.trained_with, examinee.adapter.path) as (model, tokenizer),
        judge.open(settings, models) as opened,
        progress_bar("answers and verdicts", show=gpu.progress, resumes=True) as progress,
    ):
        return evaluate_splits(
            LocalAsker(model, tokenizer, settings.evaluation, has_adapter=True),
            exam.splits,
            settings.evaluation,
            judge=opened,
            out=out,
            facts=about,
            notes=[examinee.trained_with.note],
            unusable=exam.unusable,
            touched=exam.touched,
            progress=progress,
        )


def problems_to_ask(settings: Config, examinee: Examinee) -> Exam:
    """The problems of each split. The decontamination that the traces went through is repeated against what the adapter
    was trained on: held-out problems that it touches are asked apart.
    """
    from triton_sft_pipeline.evaluation.contamination import split_touched, training_problems
    from triton_sft_pipeline.evaluation.run import problems_of_dataset

    found = held_out_set(settings)
    trained_on = training_problems(examinee.adapter.path, None, examinee.dataset.path)
    clean, touched = split_touched(found.problems, trained_on)
    splits = {
        **problems_of_dataset(examinee.dataset.path),
        "held_out": clean,
        "touched": [problem for problem, _ in touched],
    }
    return Exam(splits, {problem.key: how for problem, how in touched}, found.unusable)


def workspace_name(settings: Config, examinee: Examinee, judge: JudgeResource) -> str:
    """The same for the same evaluation on the same kind of device, and for no other: what a killed run left is taken up
    by the next one of the same thing alone.
    """
    from triton_sft_pipeline.evaluation.run import device

    parts = [code_versions(settings)[KEY], examinee.adapter.path.name, examinee.dataset.path.name]
    return hash_json([*parts, judge.model_dump(mode="json"), device()])[:16]


def provenance_facts(
    settings: Config, examinee: Examinee, judge: JudgeResource, store: ArtifactStore, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Where everything in the report comes from, as far as this step knows it."""
    adapter, dataset, trained_with = examinee.adapter, examinee.dataset, examinee.trained_with
    filtered = dataset.inputs[FILTERED]
    return {
        "preset": trained_with.preset,
        "evaluation_preset": settings.preset,
        "base_model": trained_with.model.base_model,
        "base_model_version": adapter.record["depends_on"]["base"],
        "adapter_version": adapter.data_version,
        "dataset_version": dataset.data_version,
        "filtered_traces_version": filtered,
        "traces_hash": traces_hash(store, filtered),
        "held_out": str(settings.held_out),
        "training_seed": trained_with.training.seed,
        "sampling_seed": settings.evaluation.seed,
        "judge_version": JUDGE_VERSION,
        "judge_settings": judge.settings(settings),
        "repeat_with": repeat_command(settings, overrides),
    }


def traces_hash(store: ArtifactStore, version: str) -> str | None:
    """The hash of the trace files behind a version of `filtered_traces`; None when that artifact is gone.

    Other files can lead to the same kept traces: the current artifact is asked first.
    """
    current = store.current(FILTERED)
    names = sorted(path.name for path in (store.root / FILTERED).glob("*") if path.is_dir() and not path.is_symlink())
    candidates = [current.path.name] if current else []
    for name in [*candidates, *names]:
        try:
            artifact = store.version(FILTERED, name)
        except PipelineError:
            continue
        if artifact.data_version == version:
            return artifact.inputs.get(SOURCE)
    return None


_DECIDING = ("TRITON_SFT_HOME", "TRITON_SFT_CONFIG")


def repeat_command(settings: Config, overrides: dict[str, Any]) -> str:
    """The command that makes this report again out of the same adapter."""
    named = {name: value for name in _DECIDING if (value := os.environ.get(name))}
    set_first = " ".join(f"{n}={shlex.quote(v)}" for n, v in [*named.items(), ("TRITON_SFT_PRESET", settings.preset)])
    trial = {"ops": {KEY: {"config": {"overrides": overrides}}}}
    how = f" --config-json {shlex.quote(json.dumps(trial))}" if overrides else ""
    return f"{set_first} dagster asset materialize -m triton_sft_pipeline.definitions --select {KEY}{how}"
