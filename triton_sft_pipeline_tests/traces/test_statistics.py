"""What the filter counts: of what was kept from the written file, of what was lost the first few of each reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.files import hash_json
from triton_sft_pipeline.traces import FilterSettings, filter_location
from triton_sft_pipeline.traces.statistics import SAMPLES, KeptSummary, Losses, Refused, operator_family
from triton_sft_pipeline_tests.traces.records import MODULE, labelled, record, write_array

ANYTHING = FilterSettings(require_correctness=False, require_fast_0=False)


def summary(tmp_path: Path, records: list[Any], settings: FilterSettings = ANYTHING) -> KeptSummary:
    return filter_location(write_array(tmp_path / "t.json", records), settings).summary


def test_the_version_is_the_hash_of_the_sorted_versions(tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", [record(n) for n in (3, 1, 2)])
    found = filter_location(path, ANYTHING)
    assert found.data_version == hash_json(sorted(t.version for t in found.kept))
    assert filter_location(write_array(path, [5]), ANYTHING).data_version == hash_json([])


def test_problems_families_and_lengths_are_counted(tmp_path: Path) -> None:
    tanh = MODULE.format(expression="torch.tanh(x)")
    records = [record(1), record(1), record(2), record(7, pytorch_code=tanh, model_reasoning="x" * 10_000)]
    found = summary(tmp_path, records)
    assert (found.count, len(found.problems)) == (4, 3)
    assert found.largest_problem == ("add_1", 2) and found.largest_family == ("arithmetic", 3)
    assert found.families == {"arithmetic": 3, "tanh": 1}
    assert found.median_characters == len(records[2]["model_reasoning"]) + len(records[2]["triton_code"])


def test_a_label_that_does_not_hold_is_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    found = summary(tmp_path, [record(1), labelled(2, correctness=False), labelled(3, fast_0=False)])
    assert found.faults["correctness"].first == (f"{path}, record 1 (sample_2)",)
    # A flag that is there says what it says: only one of the two lacks it.
    assert found.faults["fast_0"].count == 1 and "sample_3" in found.faults["fast_0"].first[0]
    many = summary(tmp_path, [labelled(n, correctness=False) for n in range(50)])
    assert many.faults["correctness"].count == 50 and len(many.faults["correctness"].first) == 20


def test_nothing_kept_has_no_largest_anything(tmp_path: Path) -> None:
    found = summary(tmp_path, [5])
    assert (found.count, found.median_characters) == (0, 0)
    assert found.largest_problem == found.largest_family == ("", 0)


@pytest.mark.parametrize(
    ("expression", "family"),
    [
        ("self.norm(nn.functional.conv2d(x, self.w))", "convolution"),
        ("torch.softmax(x @ y, -1)", "matrix product"),
        ("torch.softmax(x.sum(0), -1)", "softmax"),
        ("nn.Linear(4, 4)(x).relu()", "matrix product"),
        ("nn.BatchNorm2d(4)(nn.MaxPool2d(2)(x))", "normalisation"),
        ("nn.functional.mse_loss(x, x)", "loss"),
        ("x.reshape(2, 2).amax(1).tanh()", "amax"),
        ("torch.tanh(x).relu()", "tanh"),
        ("x * 2", "arithmetic"),
        ("x.view(-1)", "arithmetic"),
        ("(", "arithmetic"),
    ],
)
def test_a_module_belongs_to_the_family_of_its_dearest_operator(expression: str, family: str) -> None:
    assert operator_family(MODULE.format(expression=expression)) == family


def test_of_each_reason_the_first_few_are_remembered_and_all_are_counted() -> None:
    losses = Losses()
    for number in range(9):
        losses.add(Refused("b" if number % 3 else "a", f"key {number}", "t.json", number, "why"))
    losses.add(Refused("c", "last", "t.json", 9, "why"))
    losses.add(Refused("c2", "last", "t.json", 10, "why"))
    assert losses.by_frequency == {"b": 6, "a": 3, "c": 1, "c2": 1}
    assert list(losses.by_frequency) == ["b", "a", "c", "c2"]
    assert [r.position for r in losses.samples["b"]] == [1, 2, 4, 5, 7] and len(losses.samples["b"]) == SAMPLES
