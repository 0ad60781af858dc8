"""What of the files can be judged, and the sentences about what cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline_tests.judges import both, conversation
from triton_sft_pipeline_tests.traces.records import labelled, record, write_array, write_lines


def test_every_record_with_code_can_be_judged_and_the_rest_is_told(tmp_path: Path) -> None:
    records = [
        record(1),
        5,
        record(2, triton_code=None),
        {"pytorch_code": "x"},
        record(3, pytorch_code=...),
        record(4, triton_code=7),
    ]
    path = write_array(tmp_path / "t.json", records)
    path.write_bytes(path.read_bytes()[:-1] + b', {"cut')
    found, refused = both([path])
    assert [f.record.position for f in found] == [0, 2, 3]
    assert found[1].item.triton_code == "" and found[0].item.pytorch_code == record(1)["pytorch_code"]
    missing = "pytorch_code is missing or no text"
    said = {"1": missing, "4 (sample_3)": missing, "5 (sample_4)": "triton_code is no text"}
    assert refused[:3] == [f"{path}, record {n}: {why}" for n, why in said.items()]
    assert refused[3].startswith(f"{path}: breaks off at byte") and len(refused) == 4


def test_a_bad_line_is_told_with_its_reason(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [record(1)])
    path.write_text("nonsense\n" + path.read_text())
    found, refused = both([path])
    assert len(found) == 1 and refused == [f"{path}, record 0: line 1: Expecting value"]


def test_a_key_that_a_line_cannot_show_is_left_out(tmp_path: Path) -> None:
    keys = ["a\x1b[31m", "k" * 81, 5, ""]
    path = write_array(tmp_path / "t.json", [record(1, sample_key=key, pytorch_code=None) for key in keys])
    assert all(f"record {n}: pytorch_code" in sentence for n, sentence in enumerate(both([path])[1]))


def test_what_is_not_judged_of_a_record_is_not_kept_in_memory(tmp_path: Path) -> None:
    talk = conversation(2, ["a = 1"], "a = 1", reasoning="r" * 9999, full_messages=[{"content": "c"}])
    talk["turns"][0]["full_completion"] = "f" * 9999
    found, _ = both([write_array(tmp_path / "t.json", [record(1, full_completion="f" * 9999), talk])])
    assert len(found) == 2 and all(len(repr(kernel)) < 3000 for kernel in found)


@pytest.mark.parametrize("turns", [5, [5], [{"triton_code": 5}]])
def test_turns_that_are_none_are_told(tmp_path: Path, turns: Any) -> None:
    found, refused = both([write_array(tmp_path / "t.json", [conversation(1, [], None, turns=turns)])])
    assert found == [] and "record 0 (sample_1): t" in refused[0]


def test_labels_are_read_where_they_are_and_a_missing_one_is_none(tmp_path: Path) -> None:
    talk = conversation(6, ["a = 1", "a = 2"], "a = 3", final_result={"correctness": True})
    talk["turns"][1]["result"] = None
    records = [
        labelled(1, correctness=False),
        labelled(2, correctness=...),
        labelled(3, correctness="yes"),
        record(4, result=None),
        record(5, result=...),
        talk,
    ]
    found, _ = both([write_array(tmp_path / "t.json", records)])
    assert [kernel.label for kernel in found] == [False, None, None, None, None, False, None, True]
