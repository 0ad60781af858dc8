"""Everything that Dagster is told: the one file that knows every room.

Load it with `dagster dev`, or name it in CI: `dagster asset materialize -m triton_sft_pipeline.definitions --select
'*'`. The configuration is read once, when this module is imported: every step of a run imports it anew and so sees the
same environment.
"""

from __future__ import annotations

import warnings

import dagster as dg

# Observable sources and automation sensors are what this project is built on; dagster is pinned, so their beta mark
# needs no line in every log.
warnings.filterwarnings("ignore", category=dg.BetaWarning)

from triton_sft_pipeline.assets.dataset import build_dataset_asset  # noqa: E402
from triton_sft_pipeline.assets.evaluation import build_evaluation_asset  # noqa: E402
from triton_sft_pipeline.assets.merged_model import build_merged_asset  # noqa: E402
from triton_sft_pipeline.assets.traces import build_trace_assets  # noqa: E402
from triton_sft_pipeline.assets.training import build_training_asset  # noqa: E402
from triton_sft_pipeline.automation import build_sensors  # noqa: E402
from triton_sft_pipeline.checks import build_checks  # noqa: E402
from triton_sft_pipeline.config import Config, load_config  # noqa: E402
from triton_sft_pipeline.resources import GPUResource, JudgeResource, StoreResource  # noqa: E402


def build_definitions(config: Config) -> dg.Definitions:
    """The pipeline under one configuration."""
    return dg.Definitions(
        assets=[
            *build_trace_assets(config),
            build_dataset_asset(config),
            build_training_asset(config),
            *([build_merged_asset(config)] if config.merge.enabled else []),
            build_evaluation_asset(config),
        ],
        asset_checks=build_checks(config),
        jobs=[
            dg.define_asset_job("pipeline", dg.AssetSelection.all(), description="Every asset, whether stale or not."),
            dg.define_asset_job(
                "retrain",
                dg.AssetSelection.assets("lora_adapter", "evaluation_report"),
                description="Train on the current dataset and evaluate.",
            ),
        ],
        sensors=build_sensors(),
        resources={"gpu": GPUResource(), "judge": JudgeResource(), "store": StoreResource()},
    )


defs = build_definitions(load_config())
