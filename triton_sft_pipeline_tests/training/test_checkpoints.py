"""Which checkpoints a training goes on from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from triton_sft_pipeline.training.checkpoints import begin_run, is_whole, remove_checkpoints

FILES = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


def checkpoint(directory: Path, step: int, state: str | None = None) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in FILES:
        (path / name).write_bytes(b"x")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}) if state is None else state)
    return path


def test_the_last_whole_checkpoint_is_found_by_number_and_not_by_name(tmp_path: Path) -> None:
    begin_run(tmp_path, "same", resume=True)
    for step in (5, 10, 100, 20):
        checkpoint(tmp_path, step)
    assert begin_run(tmp_path, "same", resume=True) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("missing", [*FILES, "trainer_state.json"])
def test_a_checkpoint_without_one_of_its_files_is_skipped_and_removed(tmp_path: Path, missing: str) -> None:
    begin_run(tmp_path, "same", resume=True)
    good, half = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    (half / missing).unlink()
    assert not is_whole(half)
    assert begin_run(tmp_path, "same", resume=True) == good
    assert not half.exists()


def test_a_checkpoint_of_several_processes_is_whole_with_their_random_numbers(tmp_path: Path) -> None:
    begin_run(tmp_path, "same", resume=True)
    shared = checkpoint(tmp_path, 5)
    (shared / "rng_state.pth").rename(shared / "rng_state_0.pth")
    assert begin_run(tmp_path, "same", resume=True) == shared


@pytest.mark.parametrize("state", ["", '{"global_step": 1', '{"global_step": 7}', "[]"])
def test_a_checkpoint_whose_state_breaks_off_or_says_another_step_is_skipped(tmp_path: Path, state: str) -> None:
    begin_run(tmp_path, "same", resume=True)
    checkpoint(tmp_path, 10, state=state)
    assert begin_run(tmp_path, "same", resume=True) is None


def test_checkpoints_of_another_training_are_removed(tmp_path: Path) -> None:
    begin_run(tmp_path, "one", resume=True)
    old = checkpoint(tmp_path, 10)
    assert begin_run(tmp_path, "other", resume=True) is None
    assert not old.exists()


def test_checkpoints_of_unknown_origin_are_removed(tmp_path: Path) -> None:
    old = checkpoint(tmp_path, 10)
    assert begin_run(tmp_path, "one", resume=True) is None
    assert not old.exists()


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    begin_run(tmp_path, "one", resume=True)
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "runs").mkdir()
    checkpoint(tmp_path, 1)
    remove_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-notes", "runs"]
