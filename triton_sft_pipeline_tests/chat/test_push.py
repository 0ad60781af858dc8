"""A dataset goes to the Hub when it is told to, as it is on disk, and to nobody who was not meant."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from triton_sft_pipeline.chat.dataset import write_dataset
from triton_sft_pipeline.chat.push import plan_push
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline_tests.chat.examples import built, trace
from triton_sft_pipeline_tests.chat.hub import TOKEN, Hub, running_hub
from triton_sft_pipeline_tests.commands import Outcome, Run

REPO = "owner/traces"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dataset")
    write_dataset(built([trace(n, file="/home/me/traces/t.json") for n in range(10)]), place)
    return place


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as running:
        yield running


def push_apart(directory: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the Hub's library reads where the Hub is when it is imported."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    own = {"HF_HOME": str(directory.parent / "no_login"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    return subprocess.run(
        [sys.executable, "-m", "triton_sft_pipeline.cli", "dataset", "push", str(directory), "--repo", REPO, *options],
        capture_output=True,
        text=True,
        env={**inherited, **own, **environment},
        timeout=120,
    )


@pytest.fixture
def push(run: Run, directory: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Outcome]]:
    """The same command in this process, with the constants that the Hub's library made of the environment when it was
    imported."""
    constants = {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    had_bars = not are_progress_bars_disabled()
    yield lambda *options: run("dataset", "push", directory, "--repo", REPO, *options)
    if had_bars:
        enable_progress_bars()


def test_a_dataset_is_sent_as_it_is_on_disk_to_a_private_place(directory: Path, hub: Hub) -> None:
    done = push_apart(directory, "--yes", HF_ENDPOINT=hub.address)
    assert (done.returncode, done.stderr) == (0, "")
    names = ["README.md", "test.parquet", "train.parquet"]
    assert hub.files == {REPO: {name: (directory / name).read_bytes() for name in names}}
    assert hub.visibility == {REPO: True}
    assert done.stdout.splitlines()[-1] == f"sent     {hub.address}/datasets/{REPO}"


def test_it_is_public_when_that_is_asked_for(push: Callable[..., Outcome], hub: Hub) -> None:
    assert push("--yes", "--public").code == 0
    assert hub.visibility == {REPO: False} and len(hub.files[REPO]) == 3


def test_a_dataset_that_is_there_gets_the_new_files(push: Callable[..., Outcome], hub: Hub) -> None:
    hub.visibility[REPO] = True
    assert push("--yes").code == 0
    assert len(hub.files[REPO]) == 3


def test_nothing_goes_to_a_public_dataset_that_was_thought_private(push: Callable[..., Outcome], hub: Hub) -> None:
    hub.visibility[REPO] = False
    done = push("--yes")
    assert done.code == 2 and "owner/traces is public" in done.err and "--public" in done.err
    assert hub.files == {} and hub.large == {}


def test_without_the_flag_the_hub_is_not_even_asked(push: Callable[..., Outcome], hub: Hub) -> None:
    done = push()
    assert done.code == 2 and done.err == "triton-sft: nothing was sent: add --yes to send it.\n"
    assert hub.asked == []
    said = done.out.splitlines()
    assert said[1:2] == ["rows     9 train, 1 test"] and said[3] == "to       owner/traces, private"
    assert said[4] == "names    folders of this machine, in the column `file`: /home/me/traces"


def test_a_login_that_the_hub_refuses_is_told_with_what_to_do(
    push: Callable[..., Outcome], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    done = push("--yes")
    assert done.code == 2 and f"{hub.address} refused it (401)" in done.err and "hf auth login" in done.err
    assert "hf_other" not in done.err + done.out and hub.files == {}


def test_a_hub_that_fails_is_told_with_what_it_said(push: Callable[..., Outcome], hub: Hub) -> None:
    hub.broken = 500
    done = push("--yes")
    assert done.code == 1 and "answered 500: The disk is on fire" in done.err
    assert done.err.startswith("triton-sft: ") and "Traceback" not in done.err


def test_a_card_that_the_hub_refuses_is_told_with_what_is_wrong(push: Callable[..., Outcome], hub: Hub) -> None:
    hub.card_errors = ['"license" must be one of [apache-2.0, mit]']
    done = push("--yes")
    assert done.code == 2 and "does not take it: Invalid metadata in README.md" in done.err
    assert '"license" must be one of' in done.err and hub.files == {}


def test_without_a_network_it_says_so_in_one_sentence(directory: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # Bound and not listening: every connection is refused.
        done = push_apart(directory, "--yes", HF_ENDPOINT=f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert done.returncode == 1 and "cannot be reached" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_offline_it_says_which_setting_forbids_it(directory: Path) -> None:
    done = push_apart(directory, "--yes", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "HF_HUB_OFFLINE is set" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["traces", "owner/", "a/b/c", "../b", "own er/b", "owner/..", "owner/a--b", ""])
def test_a_name_that_is_none_is_refused(directory: Path, name: str) -> None:
    with pytest.raises(PipelineError, match="expected owner/name"):
        plan_push(directory, name)


def test_a_directory_without_a_whole_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"train\.parquet: not readable as a chat dataset"):
        plan_push(tmp_path, REPO)
    write_dataset(built([trace(1)]), tmp_path)
    assert plan_push(tmp_path, REPO).folders == []
    assert plan_push(tmp_path, REPO).size == sum(f.stat().st_size for f in tmp_path.iterdir() if f.suffix != ".jsonl")
    (tmp_path / "README.md").unlink()
    with pytest.raises(PipelineError, match=r"README\.md: the dataset card is missing"):
        plan_push(tmp_path, REPO)
