"""Problems are read from folders, files and JSON Lines, and what is wrong with one is said by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.problems import fingerprint, load_problems

CODE = """import torch
import torch.nn as nn

class Model(nn.Module):
    def forward(self, x):
        return x * 2

def get_inputs():
    raise RuntimeError("loading must not run this")
"""


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return path


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    folder = tmp_path / "level2"
    folder.mkdir()
    for name in ("2_Second.py", "1_First.py", "_hidden.py", "notes.txt"):
        (folder / name).write_text(CODE)
    problems = load_problems(folder)
    assert [(item.key, item.name, item.level) for item in problems] == [
        ("1_First", "First", 2),
        ("2_Second", "Second", 2),
    ]
    assert problems[0].pytorch_code == CODE


def test_one_file_is_one_problem(tmp_path: Path) -> None:
    (tmp_path / "softmax.py").write_text(CODE)
    problems = load_problems(tmp_path / "softmax.py")
    assert [(item.key, item.name, item.level, item.source) for item in problems] == [("softmax", "softmax", None, "")]


def test_json_lines_take_either_name_of_the_key_and_keep_what_is_known(tmp_path: Path) -> None:
    full = {"key": "a", "pytorch_code": CODE, "source": "kernelbench", "level": 1, "name": "Square"}
    path = write_jsonl(tmp_path / "p.jsonl", full, "\n", {"sample_key": "b", "pytorch_code": CODE, "level": None})
    first, second = load_problems(path)
    assert (first.key, first.source, first.level, first.name) == ("a", "kernelbench", 1, "Square")
    assert (second.key, second.source, second.level, second.name) == ("b", "", None, None)


@pytest.mark.parametrize("base", ["nn.Module", "torch.nn.Module", "Module", "nn.Linear", "_Loss"])
def test_a_module_may_have_any_base_class(tmp_path: Path, base: str) -> None:
    (tmp_path / "p.py").write_text(CODE.replace("nn.Module", base))
    assert len(load_problems(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "content", "mentioned"),
    [
        ("missing.py", None, "no problems at"),
        ("p.txt", "x", "neither a folder"),
        ("p.py", " \n", "it is empty"),
        ("p.py", "class Model(", "not valid Python"),
        ("p.py", "x = '\0'", "not valid Python"),
        ("p.py", "import torch\ndef get_inputs(): return []\n", "no class derives from nn.Module"),
        ("p.py", "class Helper:\n    pass\ndef get_inputs(): return []\n", "no class derives from nn.Module"),
        ("p.py", "class Model(nn.Module):\n    pass\n", "no get_inputs()"),
        ("p.jsonl", "", "holds no problems"),
        ("p.jsonl", "{", "line 1: not JSON"),
        ("p.jsonl", "[]", "line 1: expected a JSON object, found list"),
        ("p.jsonl", '{"pytorch_code": "x"}', "line 1: no key"),
        ("p.jsonl", '{"key": 3, "pytorch_code": "x"}', "line 1: no key"),
        ("p.jsonl", '{"key": "a"}', "line 1 (a): `pytorch_code` must be a string, found NoneType"),
        ("p.jsonl", '{"key": "a", "pytorch_code": "x = 1"}', "line 1 (a): no class derives"),
    ],
)
def test_what_is_no_problem_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str | None, mentioned: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(PipelineError) as caught:
        load_problems(path)
    assert str(path) in str(caught.value) and mentioned in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="holds no problems"):
        load_problems(tmp_path)


def test_a_file_that_is_not_utf_8_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_bytes(b"\xff\xfe")
    with pytest.raises(PipelineError, match=r"p\.py cannot be read"):
        load_problems(tmp_path)


def test_a_key_that_appears_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    record = {"key": "a", "pytorch_code": CODE}
    with pytest.raises(PipelineError, match=r"line 2 \(a\): the key is on line 1 already"):
        load_problems(write_jsonl(tmp_path / "p.jsonl", record, record))


def test_what_python_thinks_of_the_style_of_a_problem_is_not_told(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text('PATTERN = "\\d"\n' + CODE)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        (problem,) = load_problems(tmp_path)
        fingerprint(problem.pytorch_code)
    assert told == []
