"""Every problem that can be asked is read from wherever it lies, and each that cannot be is named with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.problems import Problem, every_problem, load_problems, read_problems
from triton_sft_pipeline_tests.problems.codes import (
    CODE,
    LEVEL_4,
    cached,
    kernelbench_row,
    write_jsonl,
    write_parquet,
    write_sources,
)

KERNELBENCH = "hf://ScalingIntelligence/KernelBench"
ROWS = {
    level: [kernelbench_row(level, 1, "First"), kernelbench_row(level, 2, f"Level_{level}")] for level in (1, 2, 3, 4)
}


def dataset_copy(folder: Path) -> Path:
    for level, rows in ROWS.items():
        write_parquet(folder / "data" / f"level_{level}-00000-of-00001.parquet", rows)
    return folder


def keys(location: str | Path, **options: Any) -> list[str]:
    return [problem.key for problem in read_problems(location, **options).problems]


def test_a_flat_folder_keeps_the_stems_as_keys(tmp_path: Path) -> None:
    write_sources(tmp_path, "2_B", "1_A", "_hidden", ".hidden")
    assert read_problems(tmp_path).problems == load_problems(tmp_path)
    assert keys(tmp_path) == ["1_A", "2_B"]


def test_level_folders_make_keys_with_their_level_and_all_of_them_are_read(tmp_path: Path) -> None:
    write_sources(tmp_path / "level1", "23_Softmax")
    write_sources(tmp_path / "level_3", "23_Softmax")
    write_sources(tmp_path / "scripts", "no_problem")
    problems = read_problems(str(tmp_path)).problems
    assert [(p.key, p.level, p.name, p.source) for p in problems] == [
        ("level1/23_Softmax", 1, "Softmax", ""),
        ("level3/23_Softmax", 3, "Softmax", ""),
    ]


def test_a_copy_of_kernelbenchs_repository_is_known_and_gives_levels_3_and_4(tmp_path: Path) -> None:
    for level in (1, 2, 3, 4):
        write_sources(tmp_path / "KernelBench" / f"level{level}", f"{level}_Net")
    write_sources(tmp_path, "setup", code="import setuptools")
    found = read_problems(tmp_path)
    assert [(p.key, p.level, p.source) for p in found.problems] == [
        ("level3/3_Net", 3, "kernelbench"),
        ("level4/4_Net", 4, "kernelbench"),
    ]
    assert found.unusable == []
    assert keys(tmp_path, levels=(1,)) == ["level1/1_Net"]


def test_a_copy_of_kernelbenchs_dataset_gives_levels_3_and_4_or_those_that_are_asked(tmp_path: Path) -> None:
    dataset_copy(tmp_path)
    problems = read_problems(tmp_path).problems
    assert problems[0] == Problem("level3/1_First", CODE, "kernelbench", 3, "First")
    assert [p.key for p in problems] == ["level3/1_First", "level3/2_Level_3", "level4/1_First", "level4/2_Level_4"]
    assert keys(tmp_path, levels=(2,)) == ["level2/1_First", "level2/2_Level_2"]
    assert keys(tmp_path / "data") == [p.key for p in problems]


def test_one_file_of_the_dataset_is_read_whole(tmp_path: Path) -> None:
    file = dataset_copy(tmp_path) / "data" / "level_1-00000-of-00001.parquet"
    assert keys(file) == ["level1/1_First", "level1/2_Level_1"]


def test_the_hubs_dataset_is_read_from_the_cache_without_a_network(tmp_path: Path, hub_cache: Path) -> None:
    snapshot = cached(hub_cache, "ScalingIntelligence/KernelBench", kind="datasets")
    dataset_copy(snapshot)
    expected = ["level3/1_First", "level3/2_Level_3", "level4/1_First", "level4/2_Level_4"]
    assert keys(KERNELBENCH) == keys(Path(KERNELBENCH)) == expected
    assert keys(KERNELBENCH, levels=(1, 4)) == ["level1/1_First", "level1/2_Level_1", *expected[2:]]
    assert keys(f"{KERNELBENCH}/data/level_1-00000-of-00001.parquet") == ["level1/1_First", "level1/2_Level_1"]
    assert {p.source for p in read_problems(KERNELBENCH).problems} == {"kernelbench"}


def test_without_a_network_and_a_copy_it_is_said_what_to_do(hub_cache: Path) -> None:
    with pytest.raises(PipelineError) as caught:
        read_problems(KERNELBENCH)
    assert "hf download ScalingIntelligence/KernelBench --repo-type dataset --local-dir DIR" in str(caught.value)


def test_a_table_in_our_own_words_is_read_from_parquet_and_json_lines_alike(tmp_path: Path) -> None:
    rows = [
        {"key": "a", "pytorch_code": CODE, "level": 2, "name": "7_up", "source": "own"},
        {"key": "b", "pytorch_code": CODE, "level": None, "name": None, "source": None},
    ]
    expected = [Problem("a", CODE, "own", 2, "7_up"), Problem("b", CODE)]
    assert read_problems(write_parquet(tmp_path / "p.parquet", rows)).problems == expected
    assert read_problems(write_jsonl(tmp_path / "p.jsonl", *rows)).problems == expected


def test_a_row_of_kernelbench_without_its_number_in_the_name_gets_it_into_the_key(tmp_path: Path) -> None:
    row = {"code": CODE, "level": 1, "name": "Softmax", "problem_id": 23}
    assert keys(write_jsonl(tmp_path / "p.jsonl", row)) == ["level1/23_Softmax"]


INVALID_SOURCES = {
    "syntax": (b"class Model(", "not valid Python"),
    "no_module": (b"def get_inputs(): return []\n", "No class derives from nn.Module"),
    "no_inputs": (b"import torch.nn as nn\nclass Model(nn.Module):\n    pass\n", "No get_inputs()"),
    "latin": ("# é\n".encode("latin-1") + CODE.encode(), "not UTF-8"),
    "empty": (b"", "It is empty"),
    "null": (b"x = '\0'\n", "not valid Python"),
    "deep": (b"-" * 200_000 + b"1", "not valid Python"),
}


def test_what_is_no_problem_in_a_folder_is_named_and_stops_nothing(tmp_path: Path) -> None:
    write_sources(tmp_path, "good", "m_good")
    for name, (content, _) in INVALID_SOURCES.items():
        (tmp_path / f"{name}.py").write_bytes(content)
    found = read_problems(tmp_path)
    assert [p.key for p in found.problems] == ["good", "m_good"]
    assert [u.key for u in found.unusable] == sorted(INVALID_SOURCES)
    for item in found.unusable:
        assert (item.kind, item.place) == ("invalid", str(tmp_path / f"{item.key}.py"))
        assert INVALID_SOURCES[item.key][1] in item.reason and item.reason.endswith(".")


def test_what_is_no_problem_in_json_lines_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    good = write_jsonl(path, {"key": "a", "pytorch_code": CODE}).read_bytes()
    path.write_bytes(
        b"\xef\xbb\xbf" + good + b"{broken\n[]\n\n"
        b'{"pytorch_code": "x"}\n{"key": "k"}\n{"key": "\xff"}\n' + good + b"[" * 100_000 + b"\n"
        b'{"key": "s", "pytorch_code": "x = \'\\ud800\'"}\n' + good.replace(b'"a"', b'"z"')
    )
    found = read_problems(path)
    assert [p.key for p in found.problems] == ["a", "z"]
    expected = [
        ("p.jsonl:2", 2, "Not JSON"),
        ("p.jsonl:3", 3, "Expected a JSON object, found list"),
        ("p.jsonl:5", 5, "No key"),
        ("k", 6, "must be a string"),
        ("p.jsonl:7", 7, "Not UTF-8"),
        ("a", 8, "on line 1 already"),
        ("p.jsonl:9", 9, "Not JSON"),
        ("s", 10, "not valid Python"),
    ]
    assert [(u.key, u.place) for u in found.unusable] == [(key, f"{path}, line {n}") for key, n, _ in expected]
    assert all(said in u.reason for u, (_, _, said) in zip(found.unusable, expected, strict=True))


def test_a_bad_problem_does_not_take_its_key_from_a_good_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", {"key": "a", "pytorch_code": "x = 1"}, {"key": "a", "pytorch_code": CODE})
    found = read_problems(path)
    assert [p.key for p in found.problems] == ["a"] and [u.place for u in found.unusable] == [f"{path}, line 1"]


def test_a_key_in_two_files_is_named_with_both(tmp_path: Path) -> None:
    row = kernelbench_row(3, 1, "First")
    write_parquet(tmp_path / "level_3-00000-of-00002.parquet", [row])
    write_parquet(tmp_path / "level_3-00001-of-00002.parquet", [row])
    (second,) = read_problems(tmp_path).unusable
    assert second.place == f"{tmp_path / 'level_3-00001-of-00002.parquet'}, row 1"
    assert f"in {tmp_path / 'level_3-00000-of-00002.parquet'}, row 1 already" in second.reason


def test_a_table_with_other_columns_and_one_that_is_damaged_are_named_beside_a_good_one(tmp_path: Path) -> None:
    write_parquet(tmp_path / "level_3.parquet", ROWS[3])
    write_parquet(tmp_path / "level_4.parquet", [{"prompt": "x"}])
    (tmp_path / "level_1.parquet").write_bytes(b"PAR1 not really")
    found = read_problems(tmp_path, levels=(1, 3, 4))
    assert len(found.problems) == 2
    assert [(u.key, u.kind) for u in found.unusable] == [("level_1.parquet", "invalid"), ("level_4.parquet", "invalid")]
    assert "Not readable as Parquet" in found.unusable[0].reason
    assert "No column code or pytorch_code; it has prompt" in found.unusable[1].reason


def test_a_problem_that_needs_weights_from_the_hub_is_unsupported_and_named(tmp_path: Path, hub_cache: Path) -> None:
    rows = [kernelbench_row(4, 1, "Lm", LEVEL_4)]
    write_parquet(tmp_path / "data" / "level_4.parquet", rows)
    found = read_problems(tmp_path)
    assert found.problems == []
    (item,) = found.unusable
    assert (item.key, item.kind) == ("level4/1_Lm", "unsupported")
    assert "owner/lm-small" in item.reason and "hf download owner/lm-small" in item.reason
    cached(hub_cache, "owner/lm-small", "config.json", "model.safetensors")
    assert keys(tmp_path) == ["level4/1_Lm"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda at: at / "none", "no problems at"),
        (lambda at: write_sources(at / "empty"), "holds no problems"),
        (lambda at: write_sources(at / "bad", "a", "b", "c", "d", code="x = 1"), r"No class derives .*\(1 more\)"),
        (lambda at: write_jsonl(at / "p.jsonl"), "holds no problems"),
        (lambda at: write_jsonl(at / "p.txt"), "neither a folder"),
    ],
)
def test_a_place_without_any_problem_is_an_error(tmp_path: Path, make: Any, said: str) -> None:
    with pytest.raises(PipelineError, match=said):
        read_problems(make(tmp_path))


def test_levels_that_are_not_there_are_an_error_that_says_which_are(tmp_path: Path) -> None:
    write_sources(tmp_path / "level1", "1_A")
    with pytest.raises(PipelineError, match=r"no problem of level 3 or 4: it has 1\. Name others with --levels"):
        read_problems(tmp_path, levels=(3, 4))


def test_a_problem_that_says_no_level_is_read_whatever_levels_are_asked_for(tmp_path: Path) -> None:
    write_sources(tmp_path / "level1", "1_A")
    write_sources(tmp_path / "level2", "1_C")
    write_sources(tmp_path, "2_B")
    found = read_problems(tmp_path, levels=(1,))
    assert ([p.key for p in found.problems], found.unusable) == (["2_B", "level1/1_A"], [])
    with pytest.raises(PipelineError, match="no problem of level 3: it has 1, 2"):
        read_problems(tmp_path, levels=(3,))


def test_problems_that_all_say_no_level_are_all_read(tmp_path: Path) -> None:
    assert keys(write_sources(tmp_path, "1_A", "2_B"), levels=(3,)) == ["1_A", "2_B"]


def test_every_problem_is_of_every_level_and_also_what_needs_weights_that_are_not_here(
    tmp_path: Path, hub_cache: Path
) -> None:
    dataset_copy(tmp_path)
    rows = [*ROWS[4], kernelbench_row(4, 3, "Lm", LEVEL_4), kernelbench_row(4, 4, "Bad", "x = 1")]
    write_parquet(tmp_path / "data" / "level_4-00000-of-00001.parquet", rows)
    found = [problem.key for problem in every_problem(tmp_path)]
    assert found == [f"level{n}/{key}" for n in (1, 2, 3, 4) for key in ("1_First", f"2_Level_{n}")] + ["level4/3_Lm"]
    with pytest.raises(PipelineError, match=r"holds no problem that can be asked\. .*a\.py: No class derives"):
        every_problem(write_sources(tmp_path / "bad", "a", code="x = 1"))
