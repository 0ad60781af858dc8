"""Canonical records in Parquet: whatever is written comes back, in batches, with a schema that says what it holds."""

from __future__ import annotations

import gc
import io
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.traces import canonical
from triton_sft_pipeline.traces.canonical import TraceWriter, iterate_kept, read_batches, read_kept, schema, select
from triton_sft_pipeline.traces.record import RawRecord, Trace, parse_record
from triton_sft_pipeline_tests.traces.records import record

# Named here and not at the top, as in the package: a heavy import that only some need.
pa, pq = import_module("pyarrow"), import_module("pyarrow.parquet")


def trace(number: int = 0) -> Trace:
    parsed = parse_record(RawRecord("t.json", number, 0, record(number), ""))
    assert isinstance(parsed, Trace)
    return parsed


def written(directory: Path, traces: list[Trace]) -> Path:
    path = directory / canonical.KEPT_FILE
    with open(path, "wb") as stream, TraceWriter(stream) as writer:
        for item in traces:
            writer.add(item)
    assert writer.count == len(traces)
    return path


texts = st.text(st.characters(codec="utf-8"), max_size=30)
GOOD = trace()
any_trace = st.builds(
    replace,
    st.just(GOOD),
    pytorch_code=texts,
    triton_code=texts,
    reasoning=st.none() | texts,
    messages=st.none() | texts,
    speedup=st.none() | st.floats(allow_nan=False),
    speedup_low=st.none() | st.floats(allow_nan=False),
    problem_id=st.none() | st.integers(-(2**63), 2**63 - 1),
    turn=st.none() | st.integers(1, 9),
    launch_bound=st.none() | st.booleans(),
    correctness=st.none() | st.booleans(),
    position=st.integers(0, 2**40),
)


@given(traces=st.lists(any_trace, max_size=6))
def test_whatever_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, traces: list[Trace]) -> None:
    directory = tmp_path_factory.mktemp("kept")
    path = written(directory, traces)
    assert read_kept(directory) == list(iterate_kept(directory)) == traces
    assert pq.read_table(path)["version"].to_pylist() == [t.version for t in traces]


def test_every_field_says_what_it_is_and_of_what_type() -> None:
    assert set(schema().names) == {*vars(GOOD), "version"}
    assert all(field.metadata[b"doc"] for field in schema())
    assert schema().field("speedup").type == pa.float64() and schema().field("turn").type == pa.int64()
    assert schema().field("launch_bound").type == pa.bool_() and schema().field("messages").type == pa.string()


def test_the_file_is_compressed_and_keeps_the_schema(tmp_path: Path) -> None:
    file = pq.ParquetFile(written(tmp_path, [GOOD]))
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert file.schema_arrow.equals(schema(), check_metadata=True)


def test_long_texts_are_written_before_there_are_many_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canonical, "_CHARACTERS", 5_000)
    path = written(tmp_path, [replace(GOOD, reasoning="x" * 4_000)] * 6 + [GOOD])
    assert pq.ParquetFile(path).metadata.num_row_groups > 1
    assert len(read_kept(tmp_path)) == 7


def test_many_short_traces_are_several_row_groups_in_the_order_of_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canonical, "_ROWS", 10)
    traces = [replace(GOOD, position=n) for n in range(25)]
    assert pq.ParquetFile(written(tmp_path, traces)).metadata.num_row_groups == 3
    assert read_kept(tmp_path) == traces


@pytest.mark.parametrize("rows", [3, 1_000])
def test_a_selection_copies_some_and_hands_out_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(canonical, "_ROWS", rows)
    traces = [replace(GOOD, position=n, file=name) for n in range(5) for name in ("a.json", "b.json")]
    source, lost = written(tmp_path, traces), []
    copy = io.BytesIO()
    count = select(source, copy, lambda file, position: file == "a.json" or position == 4, lost.append)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / canonical.KEPT_FILE).write_bytes(copy.getvalue())
    kept = [t for t in traces if t.file == "a.json" or t.position == 4]
    assert read_kept(tmp_path / "copy") == kept and count == len(kept) == 6
    assert lost == [t for t in traces if t not in kept]


def test_a_selection_of_nothing_is_a_file_of_nothing(tmp_path: Path) -> None:
    copy = io.BytesIO()
    assert select(written(tmp_path, [GOOD]), copy, lambda file, position: False, lambda trace: None) == 0
    assert pq.read_table(io.BytesIO(copy.getvalue())).num_rows == 0


def test_a_writer_that_an_error_ends_says_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    complaints: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)

    class Full(io.BytesIO):
        """Room for the first bytes of the file alone."""

        def write(self, data: Any) -> int:
            if self.tell():
                raise OSError(28, "No space left on device")
            return super().write(data)

    with pytest.raises(OSError, match="No space left"), TraceWriter(Full()) as writer:
        writer.add(GOOD)
    del writer
    gc.collect()
    assert complaints == []


def test_a_file_that_lacks_a_column_is_refused_with_its_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"sample_key": ["x"]}), tmp_path / canonical.KEPT_FILE)
    with pytest.raises(PipelineError, match=r"filtered_traces\.parquet: not readable .*it has no column source"):
        list(read_batches(tmp_path / canonical.KEPT_FILE))
