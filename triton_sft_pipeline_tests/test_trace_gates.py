"""What holds a filter's result back, and what a person is told of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.assets import trace_gates
from triton_sft_pipeline.assets.gates import Gate
from triton_sft_pipeline.assets.trace_gates import GATES, WARNINGS, LastTime, gates, statistics, warnings
from triton_sft_pipeline.problems import fingerprint
from triton_sft_pipeline.traces import Filtered, FilterSettings, filter_location
from triton_sft_pipeline_tests.traces.records import KERNEL, MODULE, labelled, record, write_array

OPERATORS = ["tanh", "exp", "relu", "abs", "sqrt", "sin", "cos", "log", "erf", "floor", "ceil", "neg"]
DIFFERENT = [record(n, pytorch_code=MODULE.format(expression=f"torch.{o}(x)")) for n, o in enumerate(OPERATORS)]


def filtered(tmp_path: Path, records: list[Any], **settings: Any) -> Filtered:
    return filter_location(write_array(tmp_path / "t.json", records), FilterSettings(**settings), [])


def by_name(found: list[Gate]) -> dict[str, Gate]:
    return {gate.name: gate for gate in found}


def warned(found: Filtered, before: LastTime | None = None, **settings: Any) -> set[str]:
    told = warnings(found, FilterSettings(**settings), before or LastTime())
    assert {gate.name for gate in told} == set(WARNINGS)
    return {gate.name for gate in told if not gate.passed}


def test_different_good_traces_pass_every_gate_and_warn_of_nothing(tmp_path: Path) -> None:
    found = filtered(tmp_path, DIFFERENT)
    told = by_name(gates(found, FilterSettings(), {}))
    assert set(told) == set(GATES) and all(gate.passed for gate in told.values())
    assert warned(found) == set()


def test_a_record_that_is_not_accounted_for_fails_its_gate(tmp_path: Path) -> None:
    lost = replace(filtered(tmp_path, DIFFERENT), read=13)
    gate = by_name(gates(lost, FilterSettings(), {}))["accounting"]
    assert not gate.passed and gate.detail == "13 records read, 12 accounted for."


def test_a_kept_trace_about_a_held_out_problem_fails_its_gate(tmp_path: Path) -> None:
    held_out = {fingerprint(DIFFERENT[3]["pytorch_code"]): "abs_problem", "other": "other"}
    gate = by_name(gates(filtered(tmp_path, DIFFERENT), FilterSettings(), held_out))["no_overlap"]
    assert not gate.passed and gate.detail == "Kept traces are about held-out problems: abs_problem."


def test_too_few_traces_fail_with_what_became_of_the_rest(tmp_path: Path) -> None:
    found = filtered(tmp_path, [DIFFERENT[0], labelled(1, correctness=False), 5])
    gate = by_name(gates(found, FilterSettings(), {}))["min_traces"]
    assert not gate.passed
    assert gate.detail.endswith("Of 3 read, dropped: 1 correctness; quarantined: 1 not_an_object.")


def test_no_trace_at_all_holds_for_nothing(tmp_path: Path) -> None:
    told = by_name(gates(filtered(tmp_path, [5]), FilterSettings(), {}))
    assert not told["correctness"].passed and not told["fast_0"].passed and told["accounting"].passed


@pytest.mark.parametrize(("before", "warns"), [(0.59, False), (0.62, False), (0.63, True), (None, False)])
def test_a_share_kept_a_fifth_below_last_time_warns(tmp_path: Path, before: float | None, warns: bool) -> None:
    found = filtered(tmp_path, [*DIFFERENT, *[labelled(n, correctness=False) for n in range(12)]])
    assert ("share_kept" in warned(found, LastTime(share_kept=before))) == warns


def test_a_share_kept_below_the_bar_warns_whatever_it_was_before(tmp_path: Path) -> None:
    found = filtered(tmp_path, DIFFERENT)
    assert warned(found, LastTime(share_kept=0.1), min_share_kept=1.0) == set()
    half = filtered(tmp_path, [*DIFFERENT, *[labelled(n, correctness=False) for n in range(12)]])
    assert warned(half, LastTime(share_kept=0.1), min_share_kept=0.6) == {"share_kept"}


def test_labels_that_contradict_each_other_warn(tmp_path: Path) -> None:
    assert warned(filtered(tmp_path, [*DIFFERENT, labelled(20, error="CUDA error")])) == {"label_noise"}
    assert warned(filtered(tmp_path, [*DIFFERENT, labelled(20, correctness=False, error="no")])) == set()


def test_many_duplicates_warn(tmp_path: Path) -> None:
    again = [record(n, sample_key=f"again {n}", pytorch_code=DIFFERENT[n]["pytorch_code"]) for n in range(5)]
    found = filtered(tmp_path, [*DIFFERENT, *again])
    assert found.funnel["dropped"] == {"duplicate": 5} and warned(found) == {"duplicates"}
    assert warned(filtered(tmp_path, [*DIFFERENT, *again[:2]])) == set()


@pytest.mark.parametrize(("factor", "warns"), [(0.7, True), (0.81, False), (1.0, False), (1.3, False), (1.4, True)])
def test_a_median_length_a_quarter_off_last_time_warns(tmp_path: Path, factor: float, warns: bool) -> None:
    found = filtered(tmp_path, DIFFERENT)
    before = LastTime(median_characters=round(found.summary.median_characters * factor))
    assert warned(found, before) == ({"length_drift"} if warns else set())


def test_one_problem_or_one_family_that_dominates_warns_and_is_named(tmp_path: Path) -> None:
    others = [KERNEL.format(expression=f"tl.{o}(x) + {n}") for n, o in enumerate(["exp", "log", "sin", "cos", "abs"])]
    same = [record(30 + n, pytorch_code=DIFFERENT[0]["pytorch_code"], triton_code=k) for n, k in enumerate(others)]
    found = filtered(tmp_path, [*DIFFERENT, *same], drop_duplicates=False)
    told = by_name(warnings(found, FilterSettings(), LastTime()))["no_dominance"]
    assert not told.passed and "tanh, 35%" in told.detail
    assert "| tanh | 6 |" in told.metadata["families"].value


def test_of_a_handful_of_traces_none_dominates(tmp_path: Path) -> None:
    assert warned(filtered(tmp_path, DIFFERENT[:3])) == set()
    assert warned(filtered(tmp_path, [record(n) for n in range(5)])) == set()
    assert warned(filtered(tmp_path, [record(n) for n in range(6)])) == {"no_dominance"}


def test_a_file_that_breaks_off_warns(tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", DIFFERENT)
    path.write_bytes(path.read_bytes()[:-20])
    assert warned(filter_location(path, FilterSettings(), [])) == {"whole_files"}


def test_the_next_run_reads_what_this_one_wrote_down(tmp_path: Path) -> None:
    found = filtered(tmp_path, [*DIFFERENT, 5])
    written = statistics(found)
    assert LastTime.of({"statistics": written}) == LastTime(12 / 13, found.summary.median_characters)
    assert LastTime.of(None) == LastTime.of({}) == LastTime()


def test_five_records_of_each_reason_are_shown(tmp_path: Path) -> None:
    wrong = [labelled(n, correctness=False, error="a | b") for n in range(7)]
    shown = trace_gates.samples_of_each_reason(filtered(tmp_path, [*DIFFERENT, *wrong, 5]))
    assert shown.count("| correctness |") == 5 and shown.count("| not_an_object | (malformed) | t.json #19 |") == 1
    assert "labelled incorrect: a \\| b" in shown
    assert trace_gates.samples_of_each_reason(filtered(tmp_path, DIFFERENT)) == "Nothing was dropped."
