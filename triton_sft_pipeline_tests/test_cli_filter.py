"""`triton-sft filter`: where it reads, what a preset adds, and that nothing half-made is left behind."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from triton_sft_pipeline import cli
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.traces import read_kept
from triton_sft_pipeline_tests.traces.records import record, write_array, write_lines

LONG = " ".join(hashlib.sha256(str(n).encode()).hexdigest()[: 3 + n % 9] for n in range(20_000))
"""A reasoning that repeats nothing."""


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.cli, ["filter", *map(str, arguments)])


def funnel(directory: str = "out") -> dict[str, Any]:
    return json.loads(Path(directory, "funnel.json").read_text())


def test_files_folders_patterns_and_compressed_files_are_one_set_of_traces(tmp_path: Path) -> None:
    write_array(tmp_path / "a.json", [record(n) for n in range(4)])
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress(write_lines(tmp_path / "b.txt", [record(n) for n in range(4, 8)]).read_bytes())
    )
    (tmp_path / "folder").mkdir()
    write_lines(tmp_path / "folder" / "c.jsonl", [record(n) for n in range(8, 12)])
    done = run(tmp_path / "a.json", tmp_path / "*.gz", tmp_path / "folder", tmp_path / "a.json", "--out", "out")
    assert done.exit_code == 0, done.output
    assert funnel()["read"] == funnel()["kept"] == 12
    assert {t.sample_key for t in read_kept(Path("out"))} == {f"sample_{n}" for n in range(12)}


def test_what_the_environment_names_is_told_by_its_name_and_what_is_typed_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_SFT_TRACES", f"{tmp_path / 'a.json'}:{tmp_path / 'none' / '*.json'}")
    write_array(tmp_path / "a.json", [record(1)])
    with pytest.raises(PipelineError, match="TRITON_SFT_TRACES"):
        raise run("--out", "out").exception or AssertionError
    with pytest.raises(PipelineError, match="no such file") as caught:
        raise run("nowhere.json", "--out", "out").exception or AssertionError
    assert "TRITON_SFT_TRACES" not in str(caught.value) and list(Path().iterdir()) == []


def test_a_preset_drops_what_is_over_its_budget_and_only_a_preset_does(tmp_path: Path) -> None:
    long = record(99, model_reasoning=LONG)
    path = write_array(tmp_path / "t.json", [*(record(n) for n in range(10)), long])
    assert run(path, "--out", "out").exit_code == 0 and funnel()["dropped"] == {}
    done = run(path, "--out", "out", "--preset", "tiny")
    assert done.exit_code == 0 and funnel()["dropped"] == {"over_budget": 1}
    dropped = json.loads(Path("out", "dropped.jsonl").read_text())
    assert dropped["sample_key"] == "sample_99" and "over the budget of" in dropped["detail"]
    assert dropped["detail"].endswith("(tiny)")


def test_a_trace_that_is_over_the_budget_does_not_push_out_one_that_is_not(tmp_path: Path) -> None:
    fast = record(1, model_reasoning=LONG)
    fast["result"] = {**fast["result"], "speedup": 9.0, "fast_2": True}
    path = write_array(tmp_path / "t.json", [fast, *(record(n) for n in range(1, 11))])
    assert run(path, "--out", "out", "--preset", "tiny").exit_code == 0
    assert funnel()["dropped"] == {"over_budget": 1} and funnel()["kept"] == 10


def test_the_four_files_are_all_that_is_left_and_writing_them_again_replaces_them(tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", [record(n) for n in range(12)])
    for kept in (12, 11):
        write_array(path, [record(n) for n in range(kept)])
        assert run(path, "--out", Path("deep", "out")).exit_code == 0
        assert funnel("deep/out")["kept"] == len(read_kept(Path("deep", "out"))) == kept
    assert [p.name for p in Path().iterdir()] == ["deep"]
    assert sorted(p.name for p in Path("deep", "out").iterdir()) == [
        "dropped.jsonl",
        "filtered_traces.parquet",
        "funnel.json",
        "quarantine.jsonl",
    ]


def test_a_refused_file_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", [record(n) for n in range(12)])
    path.write_bytes(path.read_bytes()[:-5])
    assert isinstance(run(path, "--out", "out", "--strict").exception, PipelineError)
    assert list(Path().iterdir()) == []
