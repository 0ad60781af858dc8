"""`lora_adapter`: the base model fine-tuned on the chat dataset."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from triton_sft_pipeline.assets.common import GROUP, sign_run
from triton_sft_pipeline.assets.gates import Gate, enforce, gate_specs, told_plainly, warning
from triton_sft_pipeline.assets.plots import curves_markdown, table_markdown
from triton_sft_pipeline.automation import when_stale
from triton_sft_pipeline.config import Config, code_versions, dependencies
from triton_sft_pipeline.files import hash_json, sha256_file
from triton_sft_pipeline.resources import GPUResource, StoreResource

if TYPE_CHECKING:
    from triton_sft_pipeline.training.reload import Reloaded
    from triton_sft_pipeline.training.trainer import TrainingRun

KEY = "lora_adapter"
PARENT = "chat_dataset"
MOST_OBSERVATIONS = 50
"""An observation costs 42 ms on SQLite, and a curve of fifty points is a curve."""

GATES = {
    "loss_finite": "Every logged train and eval loss is a number.",
    "adapter_reloads": "The adapter, loaded from disk onto the base model, has the loss that training ended with.",
}


def build_training_asset(active: Config) -> Any:
    """The adapter under this configuration."""

    @dg.asset(
        key=KEY,
        deps=[PARENT],
        group_name=GROUP,
        kinds={"pytorch", "huggingface"},
        tags={"domain": "training"},
        pool="gpu",
        code_version=code_versions(active)[KEY],
        automation_condition=when_stale(),
        check_specs=[
            *gate_specs(KEY, GATES),
            dg.AssetCheckSpec(
                "eval_loss_improved", asset=KEY, description="Warns when the loss on the test split did not fall."
            ),
        ],
        description="The QLoRA adapter: weights, tokenizer, config, training log and TensorBoard events in the layout "
        "that `AutoPeftModelForCausalLM.from_pretrained` loads. A killed run goes on from its last checkpoint.",
    )
    def lora_adapter(context: dg.AssetExecutionContext, gpu: GPUResource, store: StoreResource) -> Iterator[Any]:
        sign_run(context)
        with told_plainly():
            settings = gpu.settings(active)
            opened = store.open()
            parent = opened.require(PARENT)
            version = code_versions(settings)[KEY]
            fingerprint = hash_json([version, parent.data_version])[:16]
            with opened.workspace(KEY, fingerprint) as workspace:
                run = gpu.train(settings, parent.path, workspace, _live_curve(context, settings.training.logging_steps))
                # Reloading needs the memory that the trained model holds.
                run = _without_model(run)
                reloaded = _reload(run.adapter_dir, settings)
                held = yield from enforce(KEY, gates(run, reloaded))
                with opened.building(KEY) as draft:
                    _copy_adapter(workspace, draft.path)
                    artifact = draft.promote(
                        sha256_file(draft.path / "adapter_model.safetensors"),
                        version,
                        inputs={PARENT: parent.data_version},
                        record={
                            "configuration": settings.model_dump(mode="json"),
                            "depends_on": dependencies(settings)[KEY],
                            "dataset": parent.path.name,
                            "steps": run.steps,
                        },
                    )
            opened.discard_workspace(KEY, fingerprint)
        yield dg.MaterializeResult(
            data_version=dg.DataVersion(artifact.data_version),
            check_results=[*held, warning(KEY, _eval_loss(run))],
            metadata=_metadata(run, settings) | {"path": dg.MetadataValue.path(str(artifact.path))},
        )

    return lora_adapter


def gates(run: "TrainingRun", reloaded: "Reloaded") -> list[Gate]:
    """The conditions under which an adapter may be used."""
    from triton_sft_pipeline.training.trainer import losses_finite

    finite = losses_finite(run.log_history)
    return [
        Gate(
            "loss_finite",
            finite,
            f"Loss from {run.train_loss[0]:.4g} to {run.train_loss[1]:.4g} in {run.steps} steps."
            + ("" if finite else " A logged loss is not a number: lower training.learning_rate."),
        ),
        Gate(
            "adapter_reloads",
            reloaded.agrees,
            f"Loss on the probe: {reloaded.recorded:.6g} in memory, {reloaded.reloaded:.6g} after loading from disk.",
        ),
    ]


def _live_curve(context: dg.AssetExecutionContext, logging_steps: int) -> Callable[[int, dict[str, float]], None]:
    """Every log line of the trainer becomes an observation of the adapter, at most about fifty: a curve to watch in its
    plots.
    """
    seen = 0
    stride = 1

    def on_log(step: int, metrics: dict[str, float]) -> None:
        nonlocal seen, stride
        seen += 1
        # How many lines there will be is not known here: halving the rate each time fifty more were seen keeps near it.
        if seen > MOST_OBSERVATIONS * stride:
            stride *= 2
        shown = {k: v for k, v in metrics.items() if k in ("loss", "eval_loss", "learning_rate", "grad_norm", "epoch")}
        if shown and (seen % stride == 0 or "eval_loss" in shown):
            context.log_event(dg.AssetObservation(KEY, metadata={"step": step, **shown}))

    return on_log


def _without_model(run: "TrainingRun") -> "TrainingRun":
    import dataclasses

    from triton_sft_pipeline.resources import free_device_memory

    light = dataclasses.replace(run, model=None)
    del run
    free_device_memory()
    return light


def _reload(adapter: Path, settings: Config) -> "Reloaded":
    from triton_sft_pipeline.training.reload import reload_adapter

    return reload_adapter(adapter, settings.model)


def _copy_adapter(workspace: Path, destination: Path) -> None:
    """Everything but the checkpoints, which only a resumed training needs."""
    ignore = shutil.ignore_patterns("checkpoint-*", "run.json")
    shutil.copytree(workspace, destination, ignore=ignore, dirs_exist_ok=True)


def _eval_loss(run: "TrainingRun") -> Gate:
    if run.eval_loss is None:
        return Gate("eval_loss_improved", True, "There is no test split to measure it on.")
    before, after = run.eval_loss
    return Gate(
        "eval_loss_improved", after < before, f"Loss on the test split: {before:.4g} before, {after:.4g} after."
    )


def _metadata(run: "TrainingRun", settings: Config) -> dict[str, Any]:
    curves = {
        name: [(entry["step"], entry[key]) for entry in run.log_history if key in entry]
        for name, key in (("train", "loss"), ("test", "eval_loss"))
    }
    metadata: dict[str, Any] = {
        "preset": settings.preset,
        "base_model": settings.model.base_model,
        # Not `loss` and `eval_loss`: the live curves have these names.
        "train_loss": round(run.train_loss[1], 4),
        **({"test_loss": round(run.eval_loss[1], 4)} if run.eval_loss else {}),
        "steps": run.steps,
        "seconds": round(run.seconds, 1),
        "trainable_parameters": run.trainable_parameters,
        "adapted_modules": run.adapters,
        "loss_plot": dg.MetadataValue.md(curves_markdown(curves, "loss a token", "optimiser step")),
        "settings": dg.MetadataValue.md(_settings_table(settings)),
    }
    if run.resumed_from is not None:
        metadata["resumed_from_step"] = run.resumed_from
    return metadata


def _settings_table(settings: Config) -> str:
    sections = settings.model_dump(mode="json", include={"model", "lora", "training"})
    rows = [[f"{name}.{field}", value] for name, section in sections.items() for field, value in section.items()]
    return table_markdown(["setting", "value"], rows)
