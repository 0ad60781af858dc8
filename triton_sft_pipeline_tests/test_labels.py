"""Judging the records of files: resumed after a kill, and labels measured anew with everything else left as it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.labels import (
    UNMEASURED,
    Judgeable,
    Refused,
    judge_records,
    read_judgeable,
    relabelled,
    result_of,
    write_relabelled,
)
from triton_sft_pipeline.verification import VERDICTS, JudgeItem, KernelJudge, Verdict
from triton_sft_pipeline_tests.traces.records import labelled, record, write_array, write_lines


class RecordingJudge:
    """Calls every kernel verified, in reverse order, and keeps what it was asked. Dies after `dies_after` verdicts."""

    def __init__(self, dies_after: int | None = None, **verdict: Any) -> None:
        self.asked: list[JudgeItem] = []
        self.dies_after = dies_after
        self.verdict = {"verdict": "verified", "correctness": True, "fast_0": True, "speedup": 1.25, **verdict}

    def verify_many(self, items: Iterable[JudgeItem]) -> Iterator[Verdict]:
        for done, item in enumerate(reversed(list(items))):
            if done == self.dies_after:
                raise KeyboardInterrupt
            self.asked.append(item)
            yield Verdict(key=item.key, **self.verdict)


def as_judge(judge: RecordingJudge) -> KernelJudge:
    return cast(KernelJudge, judge)


def both(places: list[Path]) -> tuple[list[Judgeable], list[str]]:
    """What can be judged, and the sentences about what cannot."""
    everything = read_judgeable(places)
    found = [item for item in everything if isinstance(item, Judgeable)]
    return found, [item.sentence for item in everything if isinstance(item, Refused)]


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
    said = "pytorch_code is missing or no text, or triton_code is no text"
    assert refused[:3] == [f"{path}, record {n}: {said}" for n in (1, 4, 5)]
    assert refused[3].startswith(f"{path}: breaks off at byte") and len(refused) == 4


def test_a_bad_line_is_told_with_its_reason(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [record(1)])
    path.write_text("nonsense\n" + path.read_text())
    found, refused = both([path])
    assert len(found) == 1 and refused == [f"{path}, record 0: line 1: Expecting value at line 1, column 1"]


def test_a_verdict_is_on_disk_the_moment_it_is_decided(tmp_path: Path) -> None:
    found, _ = both([write_array(tmp_path / "t.json", [record(n) for n in range(3)])])
    out = tmp_path / "deep" / "v.jsonl"
    seen: list[tuple[int, int, int]] = []
    verdicts = judge_records(
        found,
        as_judge(RecordingJudge()),
        out,
        progress=lambda done, total: seen.append((done, total, len(out.read_text().splitlines()))),
    )
    assert seen == [(1, 3, 1), (2, 3, 2), (3, 3, 3)]
    assert list(verdicts) == [f.identity for f in found]
    line = json.loads(out.read_text().splitlines()[0])
    assert (line["sample_key"], line["position"], line["file"]) == ("sample_2", 2, str(tmp_path / "t.json"))
    assert (line["verdict"], line["speedup"]) == ("verified", 1.25)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    found, _ = both([write_array(tmp_path / "t.json", [record(n) for n in range(5)])])
    out = tmp_path / "v.jsonl"
    with pytest.raises(KeyboardInterrupt):
        judge_records(found, as_judge(RecordingJudge(dies_after=2)), out)
    second = RecordingJudge()
    seen: list[tuple[int, int]] = []
    verdicts = judge_records(found, as_judge(second), out, progress=lambda *counts: seen.append(counts))
    assert {item.key for item in second.asked} == {f.identity for f in found[:3]}
    assert seen == [(3, 5), (4, 5), (5, 5)]
    assert len(verdicts) == 5 == len(out.read_text().splitlines())
    third = RecordingJudge()
    assert judge_records(found, as_judge(third), out) == verdicts and third.asked == []


def test_a_last_line_that_a_kill_cut_off_at_any_byte_is_judged_again(tmp_path: Path) -> None:
    found, _ = both([write_array(tmp_path / "t.json", [record(1, sample_key="größe"), record(2)])])
    out = tmp_path / "v.jsonl"
    whole = judge_records(found, as_judge(RecordingJudge()), out)
    data = out.read_bytes()
    first_line = data.index(b"\n") + 1
    for cut in range(first_line + 1, len(data)):
        out.write_bytes(data[:cut])
        judge = RecordingJudge()
        assert judge_records(found, as_judge(judge), out) == whole, cut
        assert len(judge.asked) == (0 if cut == len(data) - 1 else 1), cut
        assert out.read_bytes() == data, cut


def test_repeated_keys_are_different_records(tmp_path: Path) -> None:
    found, _ = both([write_array(tmp_path / "t.json", [record(1), record(2, sample_key="sample_1"), record(1)])])
    judge = RecordingJudge()
    verdicts = judge_records(found, as_judge(judge), tmp_path / "v.jsonl")
    assert len(verdicts) == 3 == len(judge.asked)


def test_a_record_that_was_edited_is_judged_again(tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", [record(1), record(2)])
    judge_records(both([path])[0], as_judge(RecordingJudge()), tmp_path / "v.jsonl")
    write_array(path, [record(1), record(2, triton_code="# edited")])
    judge = RecordingJudge()
    judge_records(both([path])[0], as_judge(judge), tmp_path / "v.jsonl")
    assert [item.triton_code for item in judge.asked] == ["# edited"]


@pytest.mark.parametrize("text", ["a\u2028b\x85c\x0cd", "half \ud800 pair"])
def test_odd_characters_in_names_and_sentences_survive_a_resumption(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps([record(1, sample_key=text)]))
    found, _ = both([path])
    first = judge_records(found, as_judge(RecordingJudge(detail=text)), tmp_path / "v.jsonl")
    again = RecordingJudge()
    assert judge_records(found, as_judge(again), tmp_path / "v.jsonl") == first and again.asked == []
    write_relabelled(found, first, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())[0]["sample_key"] == text


@pytest.mark.parametrize(
    "content", ["not json\n", "[1]\n", "5\n", '{"key": "x"}\n', "[{}]", '{"sample_key": "x"}', "notes", "\n"]
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path, content: str) -> None:
    found, _ = both([write_array(tmp_path / "t.json", [record(1)])])
    out = tmp_path / "v.jsonl"
    out.write_text(content)
    with pytest.raises(
        PipelineError, match=r"v\.jsonl, line 1: not a verdict of this command .* Give --out another name"
    ):
        judge_records(found, as_judge(RecordingJudge()), out)
    assert out.read_text() == content


def test_the_traces_themselves_are_never_written_over(tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", [record(1)])
    before = path.read_bytes()
    with pytest.raises(PipelineError, match="these are the traces to judge"):
        judge_records(both([path])[0], as_judge(RecordingJudge()), tmp_path / "." / "t.json")
    assert path.read_bytes() == before


def test_relabelling_replaces_the_result_and_nothing_else(tmp_path: Path) -> None:
    records = [
        labelled(1, speedup=9.0),
        record(2, extra={"é": [1]}),
        record(3, result=None),
        record(4, result=...),
        {"pytorch_code": "x"},
    ]
    found, _ = both([write_array(tmp_path / "t.json", records)])
    verdicts = judge_records(
        found, as_judge(RecordingJudge(reference_time_ms=0.5, kernel_time_ms=0.4)), tmp_path / "v.jsonl"
    )
    write_relabelled(found, verdicts, tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert written[2:] == records[2:]
    for new, old in zip(written[:2], records[:2], strict=True):
        assert {**new, "result": 0} == {**old, "result": 0} and list(new) == list(old)
        assert new["result"] == {
            "correctness": True,
            "speedup": 1.25,
            "fast_0": True,
            "fast_1": True,
            "fast_2": False,
            "error": None,
            "reference_time_ms": 0.5,
            "kernel_time_ms": 0.4,
        }


@pytest.mark.parametrize("verdict", sorted(UNMEASURED))
def test_a_verdict_that_says_nothing_about_the_kernel_changes_no_label(tmp_path: Path, verdict: str) -> None:
    assert verdict in VERDICTS
    found, _ = both([write_array(tmp_path / "t.json", [record(1)])])
    verdicts = {found[0].identity: Verdict(found[0].identity, verdict, False, False)}
    assert list(relabelled(found, verdicts)) == [record(1)]


@pytest.mark.parametrize(
    ("speedup", "flags"),
    [
        (0.5, (False, False)),
        (1.0, (False, False)),
        (1.00004, (False, False)),
        (1.2, (True, False)),
        (1.99996, (True, True)),
        (2.0, (True, True)),
    ],
)
def test_flags_follow_the_speedup_that_is_written(speedup: float, flags: tuple[bool, bool]) -> None:
    result = result_of(Verdict("k", "verified", True, True, speedup=speedup))
    assert (result["fast_1"], result["fast_2"]) == flags == (result["speedup"] > 1, result["speedup"] >= 2)


def test_a_kernel_that_is_wrong_has_no_speedup_and_says_why() -> None:
    result = result_of(Verdict("k", "incorrect_shape", False, False, speedup=3.0, detail="shape (1,), wanted ()"))
    assert (result["correctness"], result["fast_0"], result["fast_1"], result["fast_2"], result["speedup"]) == (
        False,
        False,
        False,
        False,
        0.0,
    )
    assert result["error"] == "incorrect_shape: shape (1,), wanted ()"


def test_relabelling_keeps_what_could_not_be_judged(tmp_path: Path) -> None:
    lost = {"sample_key": "no code", "result": None}
    everything = read_judgeable([write_array(tmp_path / "t.json", [lost, record(1)])])
    found = [item for item in everything if isinstance(item, Judgeable)]
    verdicts = judge_records(found, as_judge(RecordingJudge()), tmp_path / "v.jsonl")
    assert next(iter(relabelled(everything, verdicts))) == lost
    assert len(list(relabelled(everything, verdicts))) == 2


def test_what_a_gpu_measured_outlives_a_check_without_timing(tmp_path: Path) -> None:
    timed = {"correctness": True, "speedup": 1.7, "fast_0": True, "fast_1": True, "fast_2": False, "error": None}
    everything = read_judgeable([write_array(tmp_path / "t.json", [record(1, result=timed)])])
    found = [item for item in everything if isinstance(item, Judgeable)]
    verdicts = judge_records(found, as_judge(RecordingJudge(speedup=None)), tmp_path / "v.jsonl")
    (new,) = relabelled(everything, verdicts)
    assert (new["result"]["speedup"], new["result"]["fast_1"]) == (1.7, True)


def test_relabelling_never_writes_over_the_traces(tmp_path: Path) -> None:
    everything = read_judgeable([write_array(tmp_path / "t.json", [record(1)])])
    with pytest.raises(PipelineError, match="Give --relabel another name"):
        write_relabelled(everything, {}, tmp_path / "t.json")
