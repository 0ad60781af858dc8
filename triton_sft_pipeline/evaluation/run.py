"""From a loaded model and directories to a report: which problems are asked, and what is written down about where
everything came from.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.chat.dataset import read_examples
from triton_sft_pipeline.chat.examples import Example
from triton_sft_pipeline.chat.prompt import pytorch_code_of
from triton_sft_pipeline.evaluation.evaluate import Judge, evaluate
from triton_sft_pipeline.evaluation.generation import Asker
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline.problems import Problem
from triton_sft_pipeline.progress import Progress

if TYPE_CHECKING:
    from triton_sft_pipeline.problems import Unusable

LIBRARIES = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "triton-sft-pipeline")
_SIDES = {"train": "seen", "test": "test"}


def problems_of_dataset(dataset: Path) -> dict[str, list[Problem]]:
    """The distinct problems of a chat dataset: {"seen": of the train split, "test": of the test split}.

    Raises:
        PipelineError: the directory holds no such dataset.
    """
    found: dict[str, list[Problem]] = {}
    for split, side in _SIDES.items():
        # Of several traces of one problem the first names it.
        named = {e.problem: _problem(e) for e in reversed(read_examples(dataset, split))}
        found[side] = list(named.values())[::-1]
    return found


def _problem(example: Example) -> Problem:
    code = pytorch_code_of(example.prompt[0]["content"])
    return Problem(key=example.sample_key, pytorch_code=code, source=example.source or "")


def provenance(facts: Mapping[str, Any], notes: Iterable[str]) -> dict[str, Any]:
    """What a report says of its making: the given facts, the libraries, the machine, and notes for the reader."""
    return {
        **facts,
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        "python": platform.python_version(),
        "device": device(),
        "notes": [note for note in notes if note],
    }


def evaluate_splits(
    asker: Asker,
    splits: Mapping[str, Sequence[Problem]],
    settings: EvaluationSettings,
    *,
    judge: Judge,
    out: Path,
    facts: Mapping[str, Any],
    notes: Iterable[str] = (),
    unusable: Sequence[Unusable] = (),
    touched: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    on_going_on: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """`evaluate` with the provenance filled in."""
    return evaluate(
        asker,
        splits,
        settings,
        judge=judge,
        out_dir=out,
        provenance=provenance(facts, notes),
        unusable=unusable,
        touched=touched,
        progress=progress,
        on_going_on=on_going_on,
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def device() -> str:
    """The GPU that this process would use, by name, or the kind of its CPU."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU ({platform.machine()})"
