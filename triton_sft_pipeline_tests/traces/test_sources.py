"""Where traces lie: files, folders, patterns and several of them, each file once."""

from __future__ import annotations

from pathlib import Path

import pytest

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.traces.sources import SourceFile, resolve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ["b.json", "a.jsonl", "C.JSON", "d.json.gz", "e.jsonl.zst", "f.parquet"]:
        (tmp_path / name).write_text("[]")
    for name in [".tmp-x.json", "notes.txt", "g.parquet.gz", "h.gz"]:
        (tmp_path / name).write_text("[]")
    (tmp_path / "sub.json").mkdir()
    (tmp_path / "sub.json" / "deep.json").write_text("[]")
    return tmp_path


def names(location: object, origin: str | None = None) -> list[str]:
    return [file.path.name for file in resolve(location, origin)]  # type: ignore[arg-type]


def test_a_folder_stands_for_its_trace_files_by_name_compressed_or_not(folder: Path) -> None:
    assert names(folder) == ["C.JSON", "a.jsonl", "b.json", "d.json.gz", "e.jsonl.zst", "f.parquet"]


def test_a_file_is_read_whatever_it_is_called(folder: Path) -> None:
    assert resolve(folder / "notes.txt") == [SourceFile(folder / "notes.txt", str(folder / "notes.txt"))]


def test_a_pattern_gives_the_trace_files_that_match(folder: Path) -> None:
    assert names(f"{folder}/*.json") == ["b.json", "deep.json"]
    assert names(f"{folder}/**/d*") == ["d.json.gz", "deep.json"]
    assert names(f"{folder}/?.json*") == ["a.jsonl", "b.json", "d.json.gz", "e.jsonl.zst"]


def test_several_places_are_joined_by_colons_and_a_file_is_read_once(folder: Path) -> None:
    b, a = folder / "b.json", folder / "a.jsonl"
    assert names(f"{b}:{folder}/*.jsonl:{b}:") == ["b.json", "a.jsonl"]
    assert names([b, str(a), f"{a}:{b}"]) == ["b.json", "a.jsonl"]
    (folder / "link.json").symlink_to(b)
    assert names([folder / "link.json", b]) == ["link.json"]


def test_a_name_that_exists_is_neither_split_nor_taken_for_a_pattern(tmp_path: Path) -> None:
    for name in ["a:b.json", "c[1].json", "c1.json"]:
        (tmp_path / name).write_text("[]")
    assert names(tmp_path / "a:b.json") == ["a:b.json"]
    assert names(tmp_path / "c[1].json") == ["c[1].json"]


def test_a_home_folder_may_be_written_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert names("~/b.json:~/a.jsonl") == ["b.json", "a.jsonl"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("none.json", "none.json: no such file or folder"),
        ("b.json/deeper.json", "b.json/deeper.json: cannot be read"),
        ("*.csv", r"\*.csv: no trace file matches this pattern"),
        ("x" * 300, "cannot be read"),
        ("sub.json/empty", "the folder holds no .json or .jsonl file"),
    ],
)
def test_what_names_no_trace_is_refused(folder: Path, place: str, message: str) -> None:
    (folder / "sub.json" / "empty").mkdir()
    with pytest.raises(PipelineError, match=message):
        resolve(folder / place)


@pytest.mark.parametrize("location", ["", ":", []])
def test_no_place_at_all_is_refused(location: object) -> None:
    with pytest.raises(PipelineError, match="No traces are named"):
        resolve(location)  # type: ignore[arg-type]


def test_the_variable_is_named_when_the_place_was_read_from_it_and_only_then(tmp_path: Path) -> None:
    for place in ("none.json", "*.none"):
        with pytest.raises(PipelineError) as told:
            resolve(tmp_path / place, "TRITON_SFT_TRACES")
        assert "Set TRITON_SFT_TRACES to" in str(told.value)
        with pytest.raises(PipelineError) as untold:
            resolve(tmp_path / place)
        assert "TRITON_SFT_TRACES" not in str(untold.value)
