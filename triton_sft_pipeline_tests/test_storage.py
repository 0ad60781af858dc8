"""Artifacts appear whole or not at all, whoever is killed and however full the disk is."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from triton_sft_pipeline import storage
from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.files import hash_tree
from triton_sft_pipeline.storage import Artifact, ArtifactStore

KEY = "filtered_traces"


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "storage")


def made(store: ArtifactStore, text: str, data_version: str = "v") -> Artifact:
    with store.building(KEY) as draft:
        (draft.path / "data.txt").write_text(text)
        return draft.promote(data_version, "c1", inputs={"reasoning_traces": "s1"}, record={"n": 1})


def contents(store: ArtifactStore) -> set[str]:
    return {p.name for p in (store.root / KEY).iterdir()}


def test_a_promoted_draft_is_the_current_version_under_the_hash_of_its_content(store: ArtifactStore) -> None:
    artifact = made(store, "one")
    assert store.current(KEY) == artifact
    assert (artifact.data_version, artifact.code_version) == ("v", "c1")
    assert artifact.inputs == {"reasoning_traces": "s1"} and artifact.record == {"n": 1}
    assert artifact.path.name == hash_tree(artifact.path)[:16]
    assert (store.current_link(KEY) / "data.txt").read_text() == "one"
    assert contents(store) == {artifact.path.name, "current"}


def test_a_newer_version_leaves_the_older_one_in_its_place(store: ArtifactStore) -> None:
    first, second = made(store, "one"), made(store, "two")
    assert store.current(KEY) == second
    assert store.version(KEY, first.path.name) == first
    assert (first.path / "data.txt").read_text() == "one"


def test_current_holds_no_absolute_path_so_that_storage_can_be_moved(store: ArtifactStore, tmp_path: Path) -> None:
    made(store, "one")
    store.root.rename(tmp_path / "moved")
    assert (ArtifactStore(tmp_path / "moved").current_link(KEY) / "data.txt").read_text() == "one"


def test_before_anything_was_promoted_there_is_no_current_version(store: ArtifactStore) -> None:
    assert store.current(KEY) is None
    with pytest.raises(
        PipelineError, match=r"there is no current filtered_traces\. Materialise it first: `triton-sft refresh`"
    ):
        store.require(KEY)
    with pytest.raises(PipelineError, match="this version of filtered_traces is gone"):
        store.version(KEY, "0123456789abcdef")


def test_a_current_version_whose_directory_is_gone_is_none(store: ArtifactStore) -> None:
    shutil.rmtree(made(store, "one").path)
    assert store.current(KEY) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"data_version": "v"}'])
def test_a_damaged_manifest_is_an_error_for_a_person(store: ArtifactStore, content: str) -> None:
    (made(store, "one").path / "artifact.json").write_text(content)
    with pytest.raises(PipelineError, match=r"artifact\.json: damaged .* materialise filtered_traces again"):
        store.current(KEY)


@pytest.mark.parametrize("error", [RuntimeError("gate"), KeyboardInterrupt(), SystemExit(1)])
def test_a_draft_that_is_not_promoted_is_removed_and_the_previous_version_stays(
    store: ArtifactStore, error: BaseException
) -> None:
    before = made(store, "one")
    with pytest.raises(type(error)), store.building(KEY) as draft:
        (draft.path / "data.txt").write_text("two")
        raise error
    with store.building(KEY):
        pass
    assert store.current(KEY) == before and contents(store) == {before.path.name, "current"}


def test_the_same_content_promoted_twice_is_one_directory(store: ArtifactStore) -> None:
    first = made(store, "one")
    inode = first.path.stat().st_ino
    second = made(store, "two")
    assert made(store, "one") == first and store.current(KEY) == first
    assert first.path.stat().st_ino == inode and contents(store) == {first.path.name, second.path.name, "current"}


@pytest.mark.parametrize("damage", ["edited", "emptied"])
def test_making_a_damaged_version_again_mends_it(store: ArtifactStore, damage: str) -> None:
    first = made(store, "one")
    if damage == "edited":
        (first.path / "data.txt").write_text("other")
    else:
        (first.path / "data.txt").unlink()
        (first.path / "artifact.json").unlink()
    assert made(store, "one") == first == store.current(KEY)
    assert (first.path / "data.txt").read_text() == "one"
    assert contents(store) == {first.path.name, "current"}


def test_another_run_that_promotes_in_between_does_not_change_what_this_one_made(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = ArtifactStore._point_current

    def overtaken(self: ArtifactStore, key: str, final: Path) -> None:
        point(self, key, final)
        monkeypatch.setattr(ArtifactStore, "_point_current", point)
        made(self, "of another run", "other")

    monkeypatch.setattr(ArtifactStore, "_point_current", overtaken)
    mine = made(store, "mine", "mine")
    assert mine.data_version == "mine" and (mine.path / "data.txt").read_text() == "mine"
    current = store.current(KEY)
    assert current is not None and current.data_version == "other"


PROMOTER = """
import sys
from pathlib import Path
from triton_sft_pipeline.storage import ArtifactStore
store = ArtifactStore(Path(sys.argv[1]))
sys.stdin.readline()
for number in range(20):
    with store.building("k") as draft:
        (draft.path / "data.txt").write_text(f"{number} {sys.argv[2]}")
        draft.promote(f"{number} {sys.argv[2]}", "c")
    current = store.require("k")
    assert current.data_version == (current.path / "data.txt").read_text()
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_processes_that_promote_at_once_leave_whole_versions_alone(store: ArtifactStore) -> None:
    # Two of them make the same contents, one makes others.
    processes = [python(PROMOTER, str(store.root), name) for name in ("same", "same", "other")]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    directories = [p for p in (store.root / "k").iterdir() if p.name != "current"]
    assert len(directories) == 40
    assert all(p.name == hash_tree(p)[:16] for p in directories)


BUILDER = """
import sys
from pathlib import Path
from triton_sft_pipeline.storage import ArtifactStore
with ArtifactStore(Path(sys.argv[1])).building("filtered_traces") as draft:
    (draft.path / "data.txt").write_text("half")
    print(draft.path.name, flush=True)
    sys.stdin.readline()
"""


def test_the_draft_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not(store: ArtifactStore) -> None:
    before = made(store, "one")
    killed, living = python(BUILDER, str(store.root)), python(BUILDER, str(store.root))
    assert killed.stdout is not None and living.stdout is not None
    drafts = [killed.stdout.readline().strip(), living.stdout.readline().strip()]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert contents(store) == {before.path.name, "current", *drafts} and store.current(KEY) == before
    with store.building(KEY):
        assert drafts[0] not in contents(store) and drafts[1] in contents(store)
    living.communicate("\n")
    assert contents(store) == {before.path.name, "current"}


def test_drafts_of_another_machine_are_left_alone(store: ArtifactStore) -> None:
    gone = 2**22 + 1  # Above the largest process number that Linux gives.
    others = [
        ".building-odd",
        f".building-elsewhere-{gone}-abcdef01",
        f".building-{socket.gethostname()}-{gone}-1-abcdef01",
    ]
    for name in others:
        (store.root / KEY / name).mkdir(parents=True)
    (store.root / KEY / f".building-{socket.gethostname()}-{gone}-abcdef01").mkdir()
    with store.building(KEY):
        pass
    assert contents(store) == set(others)


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EROFS, "not writable")],
)
def test_a_disk_that_refuses_fails_the_step_and_the_previous_version_stays(
    store: ArtifactStore, number: int, said: str
) -> None:
    before = made(store, "one")
    with pytest.raises(StepError, match=said) as caught, store.building(KEY) as draft:
        (draft.path / "data.txt").write_text("tw")
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == 1 and str(store.root) in str(caught.value)
    assert store.current(KEY) == before and contents(store) == {before.path.name, "current"}


@pytest.mark.parametrize("function", ["write_json", "hash_tree"])
def test_a_disk_that_is_full_while_promoting_changes_nothing(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    before = made(store, "one")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(store.root / KEY / "x"))

    monkeypatch.setattr(storage, function, full)
    with pytest.raises(StepError, match=r"the disk is full\. Nothing was promoted and the previous version stays"):
        made(store, "two")
    monkeypatch.undo()
    assert store.current(KEY) == before and contents(store) == {before.path.name, "current"}


def test_an_error_about_a_file_elsewhere_is_not_blamed_on_the_storage(store: ArtifactStore, tmp_path: Path) -> None:
    for error in (
        PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "model")),
        FileNotFoundError(2, "No such file", "x"),
    ):
        with pytest.raises(type(error)) as caught, store.building(KEY):
            raise error
        assert caught.value is error and caught.value.__cause__ is None


def test_a_storage_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "storage").write_text("")
    with pytest.raises(OSError, match=r"storage") as caught, ArtifactStore(tmp_path / "storage").building(KEY):
        pass
    assert caught.value.__cause__ is not caught.value


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where mounting one is allowed."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a file system is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_really_full_disk_fails_the_step_and_the_previous_version_stays(small_disk: Path) -> None:
    from triton_sft_pipeline.traces import FilterSettings, filter_location, write_filtered
    from triton_sft_pipeline_tests.traces.records import record, write_array

    store = ArtifactStore(small_disk)
    before = made(store, "one")
    big = [record(n, model_reasoning=os.urandom(20_000).hex()) for n in range(30)]
    filtered = filter_location(write_array(small_disk.parent / "t.json", big), FilterSettings(), {})
    with pytest.raises(StepError, match="the disk is full"), store.building(KEY) as draft:
        write_filtered(filtered, draft.path)
    assert store.current(KEY) == before and contents(store) == {before.path.name, "current"}
    assert made(store, "two") == store.current(KEY)


def test_a_workspace_outlives_a_run_and_is_the_same_for_the_same_fingerprint(store: ArtifactStore) -> None:
    with store.workspace(KEY, "f1") as place:
        (place / "checkpoint").write_text("1")
    with store.workspace(KEY, "f1") as again, store.workspace(KEY, "f2") as other:
        assert (again / "checkpoint").read_text() == "1" and not list(other.iterdir())
    store.discard_workspace(KEY, "f1")
    store.discard_workspace(KEY, "never made")
    with store.workspace(KEY, "f1") as place:
        assert not list(place.iterdir())


def test_a_workspace_has_one_user_at_a_time_and_is_free_again_after_an_error(store: ArtifactStore) -> None:
    with pytest.raises(PipelineError, match="another run is working on the same filtered_traces") as caught:
        with store.workspace(KEY, "f1"), store.workspace(KEY, "f1"):
            pass
    assert caught.value.exit_code == 2
    with store.workspace(KEY, "f1"):
        pass


HOLDER = """
import sys
from pathlib import Path
from triton_sft_pipeline.storage import ArtifactStore
with ArtifactStore(Path(sys.argv[1])).workspace("filtered_traces", "f1"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_killed_process_gives_its_workspace_back(store: ArtifactStore) -> None:
    process = python(HOLDER, str(store.root))
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(PipelineError, match="another run"), store.workspace(KEY, "f1"):
        pass
    process.kill()
    process.wait()
    with store.workspace(KEY, "f1"):
        pass
