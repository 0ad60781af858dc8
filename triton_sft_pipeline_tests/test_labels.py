"""Labels measured anew, with everything else left as it was."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.labels import relabelled, result_of, write_relabelled
from triton_sft_pipeline.verification import Verdict
from triton_sft_pipeline.verification.verdict import UNJUDGED
from triton_sft_pipeline_tests.judges import RecordingJudge, both, conversation, judged
from triton_sft_pipeline_tests.traces.records import labelled, record, write_array


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


def test_the_relabelled_array_is_the_one_that_json_would_write(tmp_path: Path) -> None:
    records = [{"sample_key": "größe\n", "list": [1, {}, []]}, 5, "line\nline", None, []]
    path = write_array(tmp_path / "t.json", records)
    write_relabelled([path], {}, tmp_path / "out.json")
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert text == json.dumps(records, indent=2, ensure_ascii=False) + "\n"
    write_relabelled([write_array(path, [])], {}, tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text() == "[]\n"


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
