"""Which of the problems that are asked the tuned model was trained on, or nearly.

The decontamination of the traces, done again at the other end: against the chat dataset that an adapter was really
trained on, whatever was held out when its traces were filtered. Its train split is what was trained on; the test split
is looked at for its loss and teaches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_sft_pipeline.chat.prompt import pytorch_code_of
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import read_json, sha256_file
from triton_sft_pipeline.problems.likeness import OVERLAP, Contact, HeldOut
from triton_sft_pipeline.problems.loading import Problem
from triton_sft_pipeline.storage import MANIFEST, ArtifactStore
from triton_sft_pipeline.training.reload import LOG_FILE

DATASET_KEY = "chat_dataset"
TRAIN_FILE = "train.parquet"
DATASET_FOLDER = "dataset"
"""Where `triton-sft train` writes the dataset that it makes, inside its output."""

_ADVICE = "Name the dataset that it was trained on with --trained-on DIR."
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
# The nearest first.
_NEAREST = ("fingerprint", "normal_form", "overlap")


@dataclass(frozen=True)
class TrainedOn:
    """What an adapter was trained on.

    Attributes:
        dataset: directory of the chat dataset.
        sha256: of its train.parquet.
        problems: the distinct modules of its train split; the key is the sample key of the first trace of each.
    """

    dataset: Path
    sha256: str
    problems: list[Problem]


def training_problems(adapter: Path | None, store_root: Path | None, trained_on: Path | None) -> TrainedOn | None:
    """The problems that an adapter was trained on, or None when nothing says which.

    Args:
        adapter: its directory: a version of `lora_adapter`, which records the version of its dataset; what
            `triton-sft train` wrote, whose training log names it or which holds it as `dataset`; or any other, of which
            nothing is known. None for a model that somebody else serves.
        store_root: where artifacts are looked for beside the adapter's own store.
        trained_on: the dataset's directory, when the caller knows; wins over what is recorded.

    Raises:
        PipelineError: a dataset that is named or recorded is gone, is not the one that was trained on any more, or
            cannot be read.
    """
    dataset = trained_on
    if dataset is None and adapter is not None:
        dataset = _of_artifact(adapter, store_root) or _of_log(adapter) or _beside(adapter)
    return None if dataset is None else _read(dataset)


def split_touched(
    problems: Iterable[Problem], trained_on: TrainedOn | None, overlap: float = OVERLAP
) -> tuple[list[Problem], list[tuple[Problem, str]]]:
    """Set the problems apart that were trained on, or nearly: those whose module a training problem is, or holds.

    Args:
        trained_on: None when it is not known: then all are clean.
        overlap: from this share of a problem's own token 5-grams on a training problem holds it; in (0, 1].

    Returns:
        (the others, those with half a sentence that says which training problem each touches and how alike they are),
        both in the given order.
    """
    problems = list(problems)
    nearest = _nearest(problems, trained_on.problems if trained_on else [], overlap)
    clean = [problem for problem in problems if problem.key not in nearest]
    return clean, [(problem, _said(*nearest[problem.key])) for problem in problems if problem.key in nearest]


def _nearest(problems: list[Problem], trained: list[Problem], overlap: float) -> dict[str, tuple[Contact, str]]:
    """key of a problem -> its nearest contact, and the training problem that it is with."""
    index = HeldOut(problems, overlap)
    found: dict[str, tuple[Contact, str]] = {}
    for other in trained:
        for contact in index.all_touched_by(other.pytorch_code):
            known = found.get(contact.name)
            if known is None or _distance(contact) < _distance(known[0]):
                found[contact.name] = contact, other.key
    return found


def _distance(contact: Contact) -> tuple[int, float]:
    return _NEAREST.index(contact.how), -contact.overlap


def _said(contact: Contact, trained: str) -> str:
    if contact.how == "overlap":
        return f"{contact.overlap:.0%} of it is in the training problem {trained}"
    names = ", but for names and layout" if contact.how == "normal_form" else ""
    return f"the same module as the training problem {trained}{names}"


def _of_artifact(adapter: Path, store_root: Path | None) -> Path | None:
    """The dataset that a version of `lora_adapter` records."""
    version = adapter.resolve()
    if not (version / MANIFEST).is_file():
        return None
    manifest = version / MANIFEST
    try:
        name = read_json(manifest)["record"].get("dataset")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(f"{manifest}: damaged ({error!r}). {_ADVICE}") from error
    if name is None:
        return None
    roots = [version.parent.parent, *([store_root] if store_root else [])]
    held = [root for root in roots if (root / DATASET_KEY / str(name) / MANIFEST).is_file()]
    if not held:
        raise PipelineError(
            f"{manifest}: the adapter was trained on {DATASET_KEY} {name}, which {roots[-1]} holds no more. {_ADVICE}"
        )
    return ArtifactStore(held[0]).version(DATASET_KEY, str(name)).path


def _of_log(adapter: Path) -> Path | None:
    """The dataset that a training log names: {"dataset": {"path": ..., "train_sha256": ...}}."""
    log = adapter / LOG_FILE
    try:
        named: Any = read_json(log).get("dataset") if log.is_file() else None
        path, expected = (adapter / named["path"], named["train_sha256"]) if named else (None, None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(f"{log}: damaged ({error!r}). {_ADVICE}") from error
    if path is None:
        return None
    if not (path / TRAIN_FILE).is_file():
        raise PipelineError(f"{log}: the adapter was trained on {path}, which is gone. {_ADVICE}")
    if sha256_file(path / TRAIN_FILE) != expected:
        raise PipelineError(f"{path / TRAIN_FILE}: not what the adapter was trained on any more ({log}). {_ADVICE}")
    return path


def _beside(adapter: Path) -> Path | None:
    folder = adapter / DATASET_FOLDER
    return folder if (folder / TRAIN_FILE).is_file() else None


def _read(dataset: Path) -> TrainedOn:
    from triton_sft_pipeline.training.run import read_rows

    first: dict[str, str] = {}
    for row in read_rows(dataset, "train"):
        asked = row["messages"] if "messages" in row else row["prompt"]
        first.setdefault(_code_in(asked[0]["content"]), str(row["sample_key"]))
    problems = [Problem(key=key, pytorch_code=code) for code, key in first.items()]
    return TrainedOn(dataset, sha256_file(dataset / TRAIN_FILE), problems)


def _code_in(user_turn: str) -> str:
    """The PyTorch code that a user turn holds. Of one that this project did not write the longest fence, else all."""
    try:
        return pytorch_code_of(user_turn)
    except ValueError:
        return max(_FENCE.findall(user_turn), key=len, default=user_turn)
