"""Judging the records of files: resumed after a kill, and labels measured anew with everything else left as it was."""

from __future__ import annotations

import gzip
import json
import os
import re
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.labels import (
    Judgeable,
    JudgeSettings,
    Refused,
    check_destinations,
    judge_records,
    read_judgeable,
    relabelled,
    result_of,
    write_relabelled,
)
from triton_sft_pipeline.verification import JUDGE_VERSION, JudgeItem, KernelJudge, Verdict
from triton_sft_pipeline.verification.verdict import UNJUDGED
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


SETTINGS = JudgeSettings("cuda")


def judged(
    records: list[Judgeable],
    judge: RecordingJudge,
    out: Path,
    settings: JudgeSettings = SETTINGS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Verdict]:
    return judge_records(records, cast(KernelJudge, judge), out, settings, progress).verdicts


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
    missing = "pytorch_code is missing or no text"
    said = {"1": missing, "4 (sample_3)": missing, "5 (sample_4)": "triton_code is no text"}
    assert refused[:3] == [f"{path}, record {n}: {why}" for n, why in said.items()]
    assert refused[3].startswith(f"{path}: breaks off at byte") and len(refused) == 4


def test_a_bad_line_is_told_with_its_reason(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [record(1)])
    path.write_text("nonsense\n" + path.read_text())
    found, refused = both([path])
    assert len(found) == 1 and refused == [f"{path}, record 0: line 1: Expecting value"]


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


def test_a_key_that_a_line_cannot_show_is_left_out(tmp_path: Path) -> None:
    keys = ["a\x1b[31m", "k" * 81, 5, ""]
    path = write_array(tmp_path / "t.json", [record(1, sample_key=key, pytorch_code=None) for key in keys])
    assert all(f"record {n}: pytorch_code" in sentence for n, sentence in enumerate(both([path])[1]))


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


def test_relabelling_replaces_the_result_and_nothing_else(tmp_path: Path) -> None:
    records = [
        labelled(1, speedup=9.0),
        record(2, extra={"é": [1]}),
        record(3, result=None),
        record(4, result=...),
        {"pytorch_code": "x"},
    ]
    found, _ = both([write_array(tmp_path / "t.json", records)])
    measured = {
        "reference_time_ms": 0.5,
        "reference_iqr_ms": 0.02,
        "kernel_time_ms": 0.4,
        "speedup_low": 0.9,
        "speedup_high": 2.12345,
        "launch_bound": True,
        "fast_1": False,
    }
    verdicts = judged(found, RecordingJudge(**measured), tmp_path / "v.jsonl")
    write_relabelled([tmp_path / "t.json"], verdicts, tmp_path / "out.json")
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
            "reference_iqr_ms": 0.02,
            "kernel_time_ms": 0.4,
            "kernel_iqr_ms": None,
            "speedup_low": 0.9,
            "speedup_high": 2.1235,
            "launch_bound": True,
        }


@pytest.mark.parametrize("verdict", sorted(UNJUDGED))
def test_a_verdict_that_says_nothing_about_the_kernel_changes_no_label(tmp_path: Path, verdict: str) -> None:
    found, _ = both([write_array(tmp_path / "t.json", [record(1)])])
    verdicts = {found[0].identity: Verdict(found[0].identity, verdict, False, False)}
    assert list(relabelled([tmp_path / "t.json"], verdicts)) == [record(1)]


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
    found, _ = both([write_array(tmp_path / "t.json", [lost, record(1)])])
    verdicts = judged(found, RecordingJudge(), tmp_path / "v.jsonl")
    first, second = relabelled([tmp_path / "t.json"], verdicts)
    assert first == lost and second["sample_key"] == "sample_1"


def test_what_a_gpu_measured_outlives_a_check_without_timing(tmp_path: Path) -> None:
    timed = {"correctness": True, "speedup": 1.7, "fast_0": True, "fast_1": True, "fast_2": False, "error": None}
    found, _ = both([write_array(tmp_path / "t.json", [record(1, result=timed)])])
    verdicts = judged(found, RecordingJudge(speedup=None), tmp_path / "v.jsonl")
    (new,) = relabelled([tmp_path / "t.json"], verdicts)
    assert (new["result"]["speedup"], new["result"]["fast_1"]) == (1.7, True)


def test_relabelling_never_writes_over_the_traces(tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", [record(1)])
    before = path.read_bytes()
    with pytest.raises(PipelineError, match="Give --relabel another name"):
        write_relabelled([tmp_path], {}, path)
    assert path.read_bytes() == before


def test_traces_that_changed_while_they_were_judged_are_not_relabelled(tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", [record(1), record(2)])
    verdicts = judged(both([path])[0], RecordingJudge(), tmp_path / "v.jsonl")
    write_array(path, [record(1), record(2, triton_code="# edited")])
    with pytest.raises(PipelineError, match=r"t\.json, record 1: the file changed .* with the same --out"):
        write_relabelled([path], verdicts, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


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


@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "t.json.gz", "t.jsonl.zst", "t.parquet"])
def test_every_format_that_is_read_is_judged_and_relabelled(tmp_path: Path, name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    records = [record(n) for n in range(3)]
    path = tmp_path / "in" / name
    path.parent.mkdir()
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        lines = ".jsonl" in name
        data = ("\n".join(map(json.dumps, records)) if lines else json.dumps(records)).encode()
        pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, lambda data: data)
        path.write_bytes(pack(data))
    for place in (path, path.parent, tmp_path / "*" / "t.*"):
        found, refused = both([place])
        assert not refused and {kernel.record.file for kernel in found} == {str(path)}
        assert [(k.record.position, k.label, k.code) for k in found] == [
            (n, True, record(n)["triton_code"]) for n in range(3)
        ]
    again = RecordingJudge()
    verdicts = judged(found, RecordingJudge(), tmp_path / "v.jsonl")
    assert judged(found, again, tmp_path / "v.jsonl") == verdicts and again.asked == []
    write_relabelled([path], verdicts, tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["sample_key"] for row in written] == ["sample_0", "sample_1", "sample_2"]
    assert all(row["result"]["speedup"] == 1.25 for row in written)


def test_what_is_not_judged_of_a_record_is_not_kept_in_memory(tmp_path: Path) -> None:
    talk = conversation(2, ["a = 1"], "a = 1", reasoning="r" * 9999, full_messages=[{"content": "c"}])
    talk["turns"][0]["full_completion"] = "f" * 9999
    found, _ = both([write_array(tmp_path / "t.json", [record(1, full_completion="f" * 9999), talk])])
    assert len(found) == 2 and all(len(repr(kernel)) < 3000 for kernel in found)


def test_the_relabelled_array_is_the_one_that_json_would_write(tmp_path: Path) -> None:
    records = [{"sample_key": "größe\n", "list": [1, {}, []]}, 5, "line\nline", None, []]
    path = write_array(tmp_path / "t.json", records)
    write_relabelled([path], {}, tmp_path / "out.json")
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert text == json.dumps(records, indent=2, ensure_ascii=False) + "\n"
    write_relabelled([write_array(path, [])], {}, tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text() == "[]\n"


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


def conversation(number: int, codes: list[str | None], final: str | None, **changes: Any) -> dict[str, Any]:
    wrong = {"correctness": False, "error": "old"}
    plain = record(number, triton_code=..., result=...)
    turns = [{"turn": n, "triton_code": code, "result": dict(wrong)} for n, code in enumerate(codes, 1)]
    return {**plain, "final_triton_code": final, "final_result": dict(wrong), "turns": turns, **changes}


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


@pytest.mark.parametrize("turns", [5, [5], [{"triton_code": 5}]])
def test_turns_that_are_none_are_told(tmp_path: Path, turns: Any) -> None:
    found, refused = both([write_array(tmp_path / "t.json", [conversation(1, [], None, turns=turns)])])
    assert found == [] and "record 0 (sample_1): t" in refused[0]


def test_relabelling_replaces_the_result_of_each_turn_and_the_final_one(tmp_path: Path) -> None:
    old = conversation(1, ["a = 1", "a = 2", None], "a = 2")
    del old["turns"][0]["result"]
    found, _ = both([write_array(tmp_path / "t.json", [old, conversation(2, ["a = 1"], "a = 9")])])
    verdicts = {k.identity: Verdict(k.identity, "verified", True, True, speedup=3.0) for k in found[:2]}
    verdicts |= {found[2].identity: Verdict("", "crash", False, False, detail="It died.")}
    verdicts |= {found[3].identity: Verdict("", "infra_error", False, False)}
    first, second = relabelled([tmp_path / "t.json"], verdicts)
    assert list(first) == list(old)
    assert [turn.get("result", {}).get("correctness") for turn in first["turns"]] == [None, True, False]
    assert first["turns"][1]["result"] == first["final_result"] and first["final_result"]["fast_2"] is True
    assert first["turns"][2] == old["turns"][2]
    assert second["turns"][0]["result"]["error"] == "crash: It died."
    assert second["final_result"] == {"correctness": False, "error": "old"}, "nothing is known of the final kernel"


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


def test_a_timeout_of_the_interpreter_changes_no_label_and_one_of_a_gpu_does(tmp_path: Path) -> None:
    found, _ = both([write_array(tmp_path / "t.json", [record(1)])])

    def result(backend: str) -> Any:
        verdict = Verdict(found[0].identity, "timeout", False, False, backend=backend)
        return next(relabelled([tmp_path / "t.json"], {verdict.key: verdict}))["result"]

    assert result("interpreter") == record(1)["result"]
    assert result("cuda")["correctness"] is False


def test_a_hybrid_kernel_is_labelled_correct() -> None:
    result = result_of(Verdict("k", "verified_hybrid", True, True, speedup=2.5))
    assert (result["correctness"], result["fast_0"], result["fast_2"], result["error"]) == (True, True, True, None)


def test_the_same_file_given_twice_is_judged_once(tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", [record(1), record(2)])
    found, _ = both([path, path])
    judge = RecordingJudge()
    assert len(judged(found, judge, tmp_path / "v.jsonl")) == 2 == len(judge.asked)
