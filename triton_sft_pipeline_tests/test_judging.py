"""Judging the records of files: resumed after a kill, never by two at once, and nothing else written over."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from pathlib import Path

import pytest

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.judging import JudgeSettings, check_destinations
from triton_sft_pipeline.labels import write_relabelled
from triton_sft_pipeline.verification import JUDGE_VERSION
from triton_sft_pipeline_tests.judges import RecordingJudge, both, conversation, judged
from triton_sft_pipeline_tests.traces.records import record, write_array


def test_a_verdict_is_on_disk_the_moment_it_is_decided(tmp_path: Path) -> None:
    found, _ = both([write_array(tmp_path / "t.json", [record(n) for n in range(3)])])
    out = tmp_path / "deep" / "v.jsonl"
    seen: list[tuple[int, int, int]] = []
    verdicts = judged(
        found,
        RecordingJudge(),
        out,
        progress=lambda done, total: seen.append((done, total, len(out.read_text().splitlines()))),
    )
    assert seen == [(0, 3, 0), (1, 3, 1), (2, 3, 2), (3, 3, 3)]
    assert list(verdicts) == [f.identity for f in found]
    line = json.loads(out.read_text().splitlines()[0])
    assert line["judge_version"] == JUDGE_VERSION and "turn" not in line
    assert (line["sample_key"], line["position"], line["file"]) == ("sample_2", 2, str(tmp_path / "t.json"))
    assert (line["verdict"], line["speedup"]) == ("verified", 1.25)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    found, _ = both([write_array(tmp_path / "t.json", [record(n) for n in range(5)])])
    out = tmp_path / "v.jsonl"
    with pytest.raises(KeyboardInterrupt):
        judged(found, RecordingJudge(dies_after=2), out)
    second = RecordingJudge()
    seen: list[tuple[int, int]] = []
    verdicts = judged(found, second, out, progress=lambda *counts: seen.append(counts))
    assert {item.key for item in second.asked} == {f.identity for f in found[:3]}
    assert seen == [(2, 5), (3, 5), (4, 5), (5, 5)], "first what the killed run had done"
    assert len(verdicts) == 5 == len(out.read_text().splitlines())
    third = RecordingJudge()
    assert judged(found, third, out) == verdicts and third.asked == []


def test_a_last_line_that_a_kill_cut_off_at_any_byte_is_judged_again(tmp_path: Path) -> None:
    found, _ = both([write_array(tmp_path / "t.json", [record(1, sample_key="größe"), record(2)])])
    out = tmp_path / "v.jsonl"
    whole = judged(found, RecordingJudge(), out)
    data = out.read_bytes()
    first_line = data.index(b"\n") + 1
    for cut in range(first_line + 1, len(data)):
        out.write_bytes(data[:cut])
        judge = RecordingJudge()
        assert judged(found, judge, out) == whole, cut
        assert len(judge.asked) == (0 if cut == len(data) - 1 else 1), cut
        assert out.read_bytes() == data, cut


def test_repeated_keys_are_different_records(tmp_path: Path) -> None:
    found, _ = both([write_array(tmp_path / "t.json", [record(1), record(2, sample_key="sample_1"), record(1)])])
    judge = RecordingJudge()
    verdicts = judged(found, judge, tmp_path / "v.jsonl")
    assert len(verdicts) == 3 == len(judge.asked)


def test_a_record_that_was_edited_is_judged_again(tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", [record(1), record(2)])
    judged(both([path])[0], RecordingJudge(), tmp_path / "v.jsonl")
    write_array(path, [record(1), record(2, triton_code="# edited")])
    judge = RecordingJudge()
    judged(both([path])[0], judge, tmp_path / "v.jsonl")
    assert [item.triton_code for item in judge.asked] == ["# edited"]


@pytest.mark.parametrize("text", ["a\u2028b\x85c\x0cd", "half \ud800 pair"])
def test_odd_characters_in_names_and_sentences_survive_a_resumption(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps([record(1, sample_key=text)]))
    found, _ = both([path])
    first = judged(found, RecordingJudge(detail=text), tmp_path / "v.jsonl")
    again = RecordingJudge()
    assert judged(found, again, tmp_path / "v.jsonl") == first and again.asked == []
    write_relabelled([tmp_path / "t.json"], first, tmp_path / "out.json")
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
        judged(found, RecordingJudge(), out)
    assert out.read_text() == content


def test_the_traces_themselves_are_never_written_over(tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", [record(1)])
    before = path.read_bytes()
    with pytest.raises(PipelineError, match="these are the traces to judge"):
        judged(both([path])[0], RecordingJudge(), tmp_path / "." / "t.json")
    assert path.read_bytes() == before


def test_two_runs_never_share_a_file(tmp_path: Path) -> None:
    found, _ = both([write_array(tmp_path / "t.json", [record(1), record(2)])])
    out = tmp_path / "v.jsonl"

    def beside(done: int, _: int) -> None:
        before = out.read_bytes()
        with pytest.raises(PipelineError, match="another run is writing its verdicts there"):
            judged(found, RecordingJudge(), out)
        assert out.read_bytes() == before and len(before.splitlines()) == done

    judged(found, RecordingJudge(), out, progress=beside)
    again = RecordingJudge()
    assert len(judged(found, again, out)) == 2 and again.asked == [], "the first has let go of it"


def test_a_full_disk_is_told_with_the_file_and_costs_no_verdict(tmp_path: Path) -> None:
    found, _ = both([write_array(tmp_path / "t.json", [record(n) for n in range(4)])])
    out = tmp_path / "v.jsonl"
    whole = judged(found, RecordingJudge(), out)
    data = out.read_bytes()
    out.unlink()
    # The size that a file may have stands in for the disk: writing stops in the middle of the third line.
    room = data.index(b"\n", data.index(b"\n") + 1) + 30
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(StepError, match=r"v\.jsonl: File too large\. What was judged before is kept"):
            judged(found, RecordingJudge(), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert out.read_bytes() == data[:room]
    again = RecordingJudge()
    assert judged(found, again, out) == whole and len(again.asked) == 2 and out.read_bytes() == data


@pytest.mark.parametrize(
    ("out", "relabel", "said"),
    [
        ("t.json", None, "t.json: these are the traces to judge. Give --out another name"),
        ("v.jsonl", "./t.json", "t.json: these are the traces to judge. Give --relabel another name"),
        ("v.jsonl", "link.json", "link.json: these are the traces to judge. Give --relabel another name"),
        ("new", "./new", "new: named for --out and for --relabel. They need a file each"),
        ("folder", None, "folder: not a file. Give --out the name of one"),
        ("v.jsonl", "folder", "folder: not a file. Give --relabel the name of one"),
        ("v.jsonl", "/dev/null", "/dev/null: not a file. Give --relabel the name of one"),
        ("t.json/v.jsonl", None, "t.json cannot be written. Give --out another place"),
        ("v.jsonl", "t.json/deep/new.json", "t.json cannot be written. Give --relabel another place"),
    ],
)
def test_a_destination_that_cannot_be_is_refused_before_anything_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, relabel: str | None, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_array(tmp_path / "t.json", [{"nothing": "to judge"}])
    Path("folder").mkdir()
    Path("link.json").symlink_to("t.json")
    with pytest.raises(PipelineError, match=re.escape(said)):
        check_destinations([path], Path(out), relabel and Path(relabel))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "link.json", "t.json"]


def test_a_destination_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_array(tmp_path / "t.json", [record(1)])
    locked = tmp_path / "locked"
    locked.mkdir()
    # Root may write where the mode forbids it.
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != locked)
    for out, relabel in ((locked / "new" / "v", None), (tmp_path / "v", locked / "new.json")):
        with pytest.raises(PipelineError, match="locked cannot be written"):
            check_destinations([path], out, relabel)
    check_destinations([path], tmp_path / "deep" / "er" / "v", tmp_path / "deep" / "new.json")
    check_destinations([path], Path(os.devnull), None)


def test_traces_that_can_be_read_only_once_are_not_relabelled(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        pipe = [Path(f"/dev/fd/{reading}")]
        with pytest.raises(PipelineError, match="--relabel reads the traces again at its end"):
            check_destinations(pipe, tmp_path / "v.jsonl", tmp_path / "new.json")
        check_destinations(pipe, tmp_path / "v.jsonl", None)
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (JudgeSettings("interpreter"), "judged with backend cuda; this run judges with backend interpreter"),
        (JudgeSettings("cuda", trials=3), "judged with trials 5; this run judges with trials 3"),
        (JudgeSettings("cuda", timing=False), "judged with timing True; this run judges with timing False"),
        (
            JudgeSettings("cuda", trials=2, compile_baseline=True),
            "judged with trials 5, compile_baseline False; this run judges with trials 2, compile_baseline True",
        ),
    ],
)
def test_verdicts_of_other_settings_are_not_mixed(tmp_path: Path, other: JudgeSettings, said: str) -> None:
    found, _ = both([write_array(tmp_path / "t.json", [record(1), record(2)])])
    out = tmp_path / "v.jsonl"
    with pytest.raises(KeyboardInterrupt):
        judged(found, RecordingJudge(dies_after=1), out)
    before = out.read_bytes()
    with pytest.raises(PipelineError, match=rf"v\.jsonl, line 1: {said}.* give --out another name") as refusal:
        judged(found, RecordingJudge(), out, other)
    assert refusal.value.exit_code == 2 and out.read_bytes() == before
    assert len(judged(found, RecordingJudge(), out)) == 2


@pytest.mark.parametrize("version", ["plain-2", None])
def test_verdicts_of_another_judge_are_not_mixed(tmp_path: Path, version: str | None) -> None:
    found, _ = both([write_array(tmp_path / "t.json", [record(1)])])
    out = tmp_path / "v.jsonl"
    judged(found, RecordingJudge(), out)
    line = json.loads(out.read_text())
    del line["judge_version"], line["settings"]
    out.write_text(json.dumps(line | ({"judge_version": version} if version else {})) + "\n")
    said = f"judged with judge_version {version or 'unknown'}; this run judges with judge_version {JUDGE_VERSION}"
    with pytest.raises(PipelineError, match=said):
        judged(found, RecordingJudge(), out)


def test_every_turn_with_code_is_judged(tmp_path: Path) -> None:
    found, _ = both(
        [
            write_array(
                tmp_path / "t.json",
                [
                    conversation(1, ["a = 1", None, " ", "a = 2"], "a = 2"),
                    conversation(2, ["a = 1"], "a = 3"),
                    conversation(3, [None], None),
                    conversation(4, [], "a = 4", turns=None),
                ],
            )
        ]
    )
    assert [(k.record.position, k.turn, k.code) for k in found] == [
        (0, 1, "a = 1"),
        (0, 4, "a = 2"),
        (1, 1, "a = 1"),
        (1, None, "a = 3"),
        (2, None, ""),
        (3, None, "a = 4"),
    ]
    assert found[1].name == "sample_1 turn 4" and found[3].name == "sample_2"
    out = tmp_path / "v.jsonl"
    judged(found, RecordingJudge(), out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((line["position"], line.get("turn", 0)) for line in lines) == [
        (0, 1),
        (0, 4),
        (1, 0),
        (1, 1),
        (2, 0),
        (3, 0),
    ]
    again = RecordingJudge()
    assert len(judged(found, again, out)) == 6 and again.asked == []


def test_turns_with_the_same_code_are_different_kernels(tmp_path: Path) -> None:
    found, _ = both([write_array(tmp_path / "t.json", [conversation(1, ["a = 1", "a = 1"], "a = 1")])])
    assert len(judged(found, RecordingJudge(), tmp_path / "v.jsonl")) == 2


def test_the_same_file_given_twice_is_judged_once(tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", [record(1), record(2)])
    found, _ = both([path, path])
    judge = RecordingJudge()
    assert len(judged(found, judge, tmp_path / "v.jsonl")) == 2 == len(judge.asked)
