"""The filter as one step: every record is accounted for, and the version follows what is kept and nothing else."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.problems import Problem
from triton_sft_pipeline.traces import (
    Filtered,
    FilterSettings,
    describe,
    filter_location,
    hash_location,
    read_kept,
    write_filtered,
)
from triton_sft_pipeline_tests.traces.records import KERNEL, MODULE, labelled, record, write_array, write_lines

BAD: list[Any] = [
    None,
    5,
    "text",
    [],
    {},
    record(pytorch_code=...),
    record(triton_code=3),
    record(result={}),
    record(thinking="\ud800"),
]
DROPPED = [
    labelled(correctness=False),
    labelled(fast_0=False),
    record(result=None),
    record(model_reasoning=None, thinking=None),
]

any_record = st.one_of(
    st.integers(0, 5).map(record),
    st.sampled_from(DROPPED),
    st.sampled_from(BAD),
    st.builds(
        record,
        st.integers(0, 3),
        triton_code=st.one_of(st.none(), st.integers(), st.text(max_size=20)),
        thinking=st.one_of(st.none(), st.text(max_size=10)),
        result=st.one_of(st.none(), st.fixed_dictionaries({"correctness": st.booleans(), "speedup": st.floats()})),
    ),
)


def filtered(path: Path, **changes: Any) -> Filtered:
    return filter_location(path, FilterSettings(**changes), [], keep_raw=True)


def accounted(found: Filtered) -> int:
    sums = found.funnel
    return sums["kept"] + sum(sums["dropped"].values()) + sum(sums["quarantined"].values())


def read_cut_off(path: Path, records: list[Any], cut: int) -> Filtered:
    """What becomes of `records` in a file that lacks its last `cut` bytes, but never all of them."""
    texts = [json.dumps(r) for r in records]
    data = "\n".join(texts) if path.suffix == ".jsonl" else f"[{', '.join(texts)}]"
    path.write_text(data[: max(1, len(data) - cut)], encoding="utf-8")
    return filtered(path)


some_records = st.lists(any_record, min_size=1, max_size=8)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=some_records, name=st.sampled_from(["t.json", "t.jsonl"]), cut=st.integers(0, 4000))
def test_every_record_that_is_read_is_kept_dropped_or_quarantined(
    tmp_path: Path, records: list[Any], name: str, cut: int
) -> None:
    found = read_cut_off(tmp_path / name, records, cut)
    assert found.read == accounted(found) == len(found.kept) + len(found.dropped) + len(found.quarantined)
    assert len(found.raw) == len(found.kept)
    if cut == 0:
        assert found.read == len(records) and not found.breaks
    else:
        assert found.read + len(found.breaks) <= len(records) + 1


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=some_records, cut=st.sampled_from([0, 0, 500]))
def test_every_record_that_is_read_is_on_disk_afterwards(tmp_path: Path, records: list[Any], cut: int) -> None:
    found = read_cut_off(tmp_path / "t.json", records, cut)
    write_filtered(found, tmp_path / "out")
    assert read_kept(tmp_path / "out") == found.kept
    rows = [
        (tmp_path / "out" / name).read_text(encoding="utf-8").split("\n")[:-1]
        for name in ("dropped.jsonl", "quarantine.jsonl")
    ]
    assert [len(r) for r in rows] == [len(found.dropped), len(found.quarantined)]
    assert json.loads((tmp_path / "out" / "funnel.json").read_text(encoding="utf-8")) == found.funnel


def test_the_funnel_counts_reasons_the_most_frequent_first(tmp_path: Path) -> None:
    records = [
        record(1),
        labelled(correctness=False),
        labelled(correctness=False),
        record(2, result=None),
        record(triton_code=None),
        5,
        6,
    ]
    found = filtered(write_array(tmp_path / "t.json", records))
    assert found.funnel | {"source_hash": ""} == {
        "read": 7,
        "kept": 1,
        "dropped": {"correctness": 2, "no_kernel": 1, "no_result": 1},
        "quarantined": {"not_an_object": 2},
        "breaks": [],
        "source_hash": "",
    }
    assert list(found.funnel["dropped"]) == ["correctness", "no_kernel", "no_result"]
    assert found.source_hash == hash_location(tmp_path / "t.json")


def test_what_was_dropped_and_quarantined_is_written_with_place_reason_and_content(tmp_path: Path) -> None:
    records = [record(1), labelled(2, correctness=False, error="größer"), {"sample_key": "é", "half": "\ud800"}]
    path = write_array(tmp_path / "t.json", records[:2])
    path.write_text(json.dumps(records), encoding="utf-8")
    write_filtered(filtered(path), tmp_path / "out")
    dropped = json.loads((tmp_path / "out" / "dropped.jsonl").read_text(encoding="utf-8"))
    assert (dropped["reason"], dropped["detail"]) == ("correctness", "labelled incorrect: größer")
    assert (dropped["sample_key"], dropped["file"], dropped["position"]) == ("sample_2", str(path), 1)
    assert dropped["trace"]["triton_code"] == records[1]["triton_code"]
    quarantined = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text(encoding="utf-8"))
    assert (quarantined["reason"], quarantined["detail"], quarantined["position"]) == (
        "missing_field",
        "pytorch_code is missing",
        2,
    )
    assert json.loads(quarantined["raw"]) == records[2]


def test_the_raw_records_come_back_as_they_stood(tmp_path: Path) -> None:
    records = [record(1, extra=[1, {"x": None}]), labelled(correctness=False), record(2)]
    found = filter_location(write_array(tmp_path / "t.json", records), FilterSettings(), keep_raw=True)
    assert found.raw == [records[0], records[2]]


def test_the_version_follows_neither_order_nor_file_nor_what_was_dropped(tmp_path: Path) -> None:
    kept = [record(1), record(2), record(3), record(3, sample_key=...)]
    version = filtered(write_array(tmp_path / "a.json", kept)).data_version
    assert filtered(write_array(tmp_path / "b.json", kept[::-1])).data_version == version
    assert filtered(write_lines(tmp_path / "c.jsonl", kept)).data_version == version
    mixed = [DROPPED[0], kept[2], BAD[1], kept[0], kept[3], DROPPED[2], BAD[5], kept[1]]
    assert filtered(write_array(tmp_path / "d.json", mixed)).data_version == version
    folder = tmp_path / "folder"
    folder.mkdir()
    write_array(folder / "1.json", kept[:2])
    write_lines(folder / "2.jsonl", kept[2:])
    assert filtered(folder).data_version == version


def test_the_version_follows_every_kept_record_and_repeated_ones_too(tmp_path: Path) -> None:
    kept = [record(1), record(2)]
    edited = [record(1), record(2, model_reasoning="Otherwise.")]
    files = [write_array(tmp_path / f"{i}.json", r) for i, r in enumerate([kept, edited, kept[:1], [*kept, kept[0]]])]
    assert len({filtered(file, drop_duplicates=False).data_version for file in files}) == 4


def test_of_repeated_records_one_is_kept_and_keys_may_repeat(tmp_path: Path) -> None:
    records = [record(1), record(1), record(2, sample_key="sample_1"), labelled(1, speedup=9.0, fast_2=True)]
    found = filtered(write_array(tmp_path / "t.json", records))
    assert [t.position for t in found.kept] == [2, 3], "of kernels that are the same the fastest stays"
    assert [(d.reason, d.trace.position) for d in found.dropped] == [("duplicate", 0), ("duplicate", 1)]
    assert found.raw == records[2:]
    assert len(filtered(tmp_path / "t.json", drop_duplicates=False).kept) == 4


def test_a_break_keeps_what_is_before_it_and_strict_refuses_the_file(tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", [record(i) for i in range(4)])
    path.write_bytes(path.read_bytes()[:-30])
    found = filtered(path)
    assert found.read == 3 and [(b.position, b.file) for b in found.breaks] == [(3, str(path))]
    assert found.funnel["breaks"][0]["byte"] == found.breaks[0].byte
    with pytest.raises(PipelineError, match=r"breaks off at byte [\d,]+, in record 3: .* leave out --strict"):
        filtered(path, strict=True)


def test_strict_says_nothing_about_malformed_records(tmp_path: Path) -> None:
    assert filtered(write_array(tmp_path / "t.json", [record(1), 5]), strict=True).read == 2


def test_a_break_in_one_file_of_a_folder_does_not_end_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" + json.dumps(record(1)))
    write_array(tmp_path / "b.json", [record(2)])
    found = filtered(tmp_path)
    assert [t.sample_key for t in found.kept] == ["sample_1", "sample_2"] and len(found.breaks) == 1


def test_several_places_are_one_set_of_traces(tmp_path: Path) -> None:
    one, two = write_array(tmp_path / "a.json", [record(1)]), write_lines(tmp_path / "b.jsonl", [record(2)])
    found = filter_location([one, two], FilterSettings())
    assert [t.sample_key for t in found.kept] == ["sample_1", "sample_2"]


def held_out(expression: str) -> list[Problem]:
    return [Problem("two", "# a comment\n" + MODULE.format(expression=expression))]


def test_held_out_problems_are_kept_out_however_they_are_spelled(tmp_path: Path) -> None:
    others = [record(n, pytorch_code=MODULE.format(expression=e)) for n, e in enumerate(["torch.tanh(x)", "x.sum(1)"])]
    path = write_array(tmp_path / "t.json", [others[0], record(2), others[1]])
    found = filter_location(path, FilterSettings(), held_out("x +  2"))
    assert [t.sample_key for t in found.kept] == ["sample_0", "sample_1"]
    assert found.funnel["dropped"] == {"held_out_problem": 1}
    assert "two" in found.dropped[0].detail, "the problem that it touched is named"
    assert len(filter_location(path, FilterSettings(decontaminate=False), held_out("x + 2")).kept) == 3


def test_without_held_out_problems_the_label_filters_alone_are_applied(tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", [record(1, model_reasoning=None, thinking=None)])
    assert len(filter_location(path, FilterSettings()).kept) == 1
    assert len(filter_location(path, FilterSettings(), []).kept) == 0


def test_kept_traces_survive_parquet_to_the_letter(tmp_path: Path) -> None:
    odd = record(
        1,
        model_reasoning="ünïcode \U0001f600 \x00 \x85 \u2028 end\r\n",
        triton_code=KERNEL.format(expression="'\\n'") + "\n\n",
        level=None,
        name=None,
        problem_id=-(2**63),
        source=...,
        timestamp=None,
    )
    slow = labelled(2, speedup=5e-324, fast_1=False)
    found = filtered(write_array(tmp_path / "t.json", [odd, slow, labelled(3, speedup=None)]))
    assert len(found.kept) == 3
    write_filtered(found, tmp_path / "a=b")
    assert read_kept(tmp_path / "a=b") == found.kept


def test_every_column_that_is_not_plain_says_what_it_is(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    found = filtered(write_array(tmp_path / "t.json", [record(1)]))
    write_filtered(found, tmp_path)
    schema = pq.read_schema(tmp_path / "filtered_traces.parquet")
    assert schema.field("speedup").metadata[b"doc"] == b"label: reference time / kernel time"
    documented = {name for name in schema.names if b"doc" in (schema.field(name).metadata or {})}
    assert {
        "sample_key",
        "problem",
        "reasoning",
        "triton_code",
        "correctness",
        "fast_2",
        "position",
        "version",
    } <= documented
    assert pq.read_table(tmp_path / "filtered_traces.parquet")["version"].to_pylist() == [found.kept[0].version]


def test_the_files_live_as_long_as_somebody_reads_them_and_no_longer(tmp_path: Path) -> None:
    path, place = write_array(tmp_path / "t.json", [record(1), record(2)]), tmp_path / "place"
    place.mkdir()
    reading = filter_location(path, FilterSettings(), workplace=place).traces()
    gc.collect()
    assert next(reading).sample_key == "sample_1" and list(place.iterdir())
    assert next(reading).sample_key == "sample_2" and list(place.iterdir())
    del reading
    gc.collect()
    assert list(place.iterdir()) == []


def test_what_was_written_twice_is_there_once_and_stays_when_the_first_is_gone(tmp_path: Path) -> None:
    found = filtered(write_array(tmp_path / "t.json", [record(1), 5]))
    for _ in range(2):
        write_filtered(found, tmp_path / "out")
    found.discard()
    assert len(list((tmp_path / "out").iterdir())) == 4 and len(read_kept(tmp_path / "out")) == 1


def test_a_file_that_fails_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    write_array(tmp_path / "a.json", [record(1)])
    (tmp_path / "b.json").write_text("not an array")
    (tmp_path / "place").mkdir()
    with pytest.raises(PipelineError, match=r"b\.json: not a JSON array"):
        filter_location([tmp_path / "a.json", tmp_path / "b.json"], FilterSettings(), [], workplace=tmp_path / "place")
    assert list((tmp_path / "place").iterdir()) == []


def test_nothing_kept_is_written_and_read_as_nothing(tmp_path: Path) -> None:
    write_filtered(filtered(write_array(tmp_path / "t.json", [5])), tmp_path)
    assert read_kept(tmp_path) == []


@pytest.mark.parametrize("content", [None, b"", b"no parquet"])
def test_a_directory_without_filtered_traces_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "filtered_traces.parquet").write_bytes(content)
    with pytest.raises(PipelineError, match=r"filtered_traces\.parquet: not readable as filtered traces"):
        read_kept(tmp_path)


def test_a_parquet_file_of_something_else_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": [1]}), tmp_path / "filtered_traces.parquet")
    with pytest.raises(PipelineError, match="not readable as filtered traces"):
        read_kept(tmp_path)


def test_the_funnel_fits_a_terminal(tmp_path: Path) -> None:
    path = write_array(tmp_path / "t.json", [record(1), *DROPPED, *BAD[:-1]])
    path.write_text(json.dumps([record(1), *DROPPED, *BAD]), encoding="utf-8")
    lines = describe(filtered(path)).split("\n")
    assert lines[0] == "read              14" and lines[-1] == "kept               1  (7%)"
    assert all(len(line) <= 80 for line in lines)


REAL = os.environ.get("TRITON_SFT_REAL_TRACES")


@pytest.mark.skipif(not REAL, reason="TRITON_SFT_REAL_TRACES names no folder of real traces")
@pytest.mark.parametrize(
    ("name", "read", "kept", "breaks"),
    [
        ("gpt_oss_120b_single_turn", 100, 96, []),
        ("qwen3_multi_turn", 9, None, []),
        ("glm45_multi_turn_truncated", 105, None, [105]),
    ],
)
def test_every_record_of_real_files_is_accounted_for(name: str, read: int, kept: int | None, breaks: list[int]) -> None:
    found = filtered(Path(str(REAL)) / f"{name}.json")
    assert found.read == read == accounted(found)
    assert kept is None or len(found.kept) == kept
    assert [b.position for b in found.breaks] == breaks
