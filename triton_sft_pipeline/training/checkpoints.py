"""Which checkpoint a killed training goes on from.

Knows the files that transformers' Trainer writes, and nothing of models. A checkpoint counts only when it is whole and
belongs to the same training: the same data, base model and hyper-parameters.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from triton_sft_pipeline.files import read_json, write_json

_NAME = re.compile(r"checkpoint-(\d+)")
_RUN = "run.json"

# trainer_state.json comes last: Trainer writes it when everything else is on disk.
_FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")

# Random numbers of a training of one process, or of the first of several.
_RANDOM = ("rng_state.pth", "rng_state_0.pth")


def begin_run(output_dir: Path, fingerprint: str, resume: bool) -> Path | None:
    """Find the checkpoint to go on from, and remove those that cannot be: half-written ones, and all of another
    training.

    Args:
        output_dir: where the training writes.
        fingerprint: hash of everything that decides what is learned.
        resume: False starts anew whatever is there.

    Returns:
        The directory of the last whole checkpoint, or None to start from the beginning.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    same_run = resume and _fingerprint_of(output_dir) == fingerprint
    whole = []
    for step, path in _checkpoints(output_dir):
        if same_run and is_whole(path):
            whole.append((step, path))
        else:
            shutil.rmtree(path)
    write_json(output_dir / _RUN, {"fingerprint": fingerprint})
    return max(whole)[1] if whole else None


def is_whole(checkpoint: Path) -> bool:
    """Whether a process that died can have left `checkpoint` unfinished: all files are there and the last one says the
    step that the name says."""
    if not all((checkpoint / name).is_file() for name in _FILES):
        return False
    if not any((checkpoint / name).is_file() for name in _RANDOM):
        return False
    try:
        state: Any = read_json(checkpoint / "trainer_state.json")
    except json.JSONDecodeError:
        return False
    return isinstance(state, dict) and checkpoint.name == f"checkpoint-{state.get('global_step')}"


def remove_checkpoints(output_dir: Path) -> None:
    """Delete what only a resumed training needs."""
    for _, path in _checkpoints(output_dir):
        shutil.rmtree(path)
    (output_dir / _RUN).unlink(missing_ok=True)


def _checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    found = [(_NAME.fullmatch(path.name), path) for path in output_dir.iterdir() if path.is_dir()]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def _fingerprint_of(output_dir: Path) -> str | None:
    path = output_dir / _RUN
    return read_json(path).get("fingerprint") if path.is_file() else None
