"""From a loaded model and directories to a report: which problems are asked, and what is written down about where
everything came from.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from triton_sft_pipeline.chat.prompt import pytorch_code_of
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.evaluation.evaluate import Judge, evaluate
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline.problems import Problem

LIBRARIES = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "triton-sft-pipeline")
_SIDES = {"train": "seen", "test": "test"}


def problems_of_dataset(dataset: Path) -> dict[str, list[Problem]]:
    """The distinct problems of a chat dataset: {"seen": of the train split, "test": of the test split}.

    Raises:
        PipelineError: the directory holds no such dataset.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: dict[str, list[Problem]] = {}
    for split, side in _SIDES.items():
        path = Path(dataset) / f"{split}.parquet"
        try:
            rows = pq.read_table(path, columns=["prompt", "sample_key", "problem", "source"]).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise PipelineError(
                f"{path}: not readable as a chat dataset ({error}). Build it with `triton-sft dataset build`."
            ) from error
        found[side] = list({row["problem"]: _problem(row) for row in reversed(rows)}.values())[::-1]
    return found


def _problem(row: Mapping[str, Any]) -> Problem:
    code = pytorch_code_of(row["prompt"][0]["content"])
    return Problem(key=row["sample_key"], pytorch_code=code, source=row["source"] or "")


def provenance(facts: Mapping[str, Any], notes: Iterable[str]) -> dict[str, Any]:
    """What a report says of its making: the given facts, the libraries, the machine, and notes for the reader."""
    return {
        **facts,
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        "python": platform.python_version(),
        "device": _device(),
        "notes": [note for note in notes if note],
    }


def evaluate_splits(
    model: Any,
    tokenizer: Any,
    splits: Mapping[str, list[Problem]],
    settings: EvaluationSettings,
    *,
    judge: Judge,
    out: Path,
    facts: Mapping[str, Any],
    notes: Iterable[str] = (),
    has_adapter: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """`evaluate` with the provenance filled in."""
    about = provenance(facts, notes)
    return evaluate(
        model,
        tokenizer,
        splits,
        settings,
        judge=judge,
        out_dir=out,
        provenance=about,
        has_adapter=has_adapter,
        progress=progress,
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU ({platform.machine()})"
