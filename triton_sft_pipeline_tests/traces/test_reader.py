"""Files as they come: whole, cut off, in the wrong encoding, or no traces at all."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.traces.items import Break
from triton_sft_pipeline.traces.reader import hash_location, open_traces
from triton_sft_pipeline.traces.record import Malformed, RawRecord
from triton_sft_pipeline.traces.sources import resolve


def read(path: Path, data: bytes | str) -> list[Any]:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(open_traces(resolve(path)))


def values(items: list[Any]) -> list[Any]:
    return [item.value for item in items if isinstance(item, RawRecord)]


def test_a_whole_array_gives_every_record_with_its_place_and_its_text(tmp_path: Path) -> None:
    data = ' [ {"a": "é"} ,\n\t{"b":2}\r\n]\n'.encode()
    first, second = read(tmp_path / "t.json", data)
    assert (first.position, first.value, first.raw) == (0, {"a": "é"}, '{"a": "é"}')
    assert (second.position, second.value, second.raw) == (1, {"b": 2}, '{"b":2}')
    assert [data[r.byte : r.byte + len(r.raw.encode())].decode() for r in (first, second)] == [first.raw, second.raw]


def test_an_empty_array_has_no_records_and_no_break(tmp_path: Path) -> None:
    assert read(tmp_path / "t.json", "[]") == []


def test_a_file_that_breaks_off_at_any_byte_keeps_the_whole_records_and_says_where(tmp_path: Path) -> None:
    records: list[Any] = [{"a": "ü€😀", "n": 1.5}, {"b": [True, None, {"c": "]}"}]}, {"d": '",{'}, 42, "tail"]
    pieces = [json.dumps(r, ensure_ascii=False).encode() for r in records]
    data = b"[" + b",\n ".join(pieces) + b"]"
    # A number is not known to be whole before the comma after it; everything else ends by itself.
    ends, begins, place = [], [], 1
    for piece, value in zip(pieces, records, strict=True):
        begins.append(place)
        ends.append(place + len(piece) + (1 if isinstance(value, int) else 0))
        place += len(piece) + len(b",\n ")
    for cut in range(1, len(data)):
        items = read(tmp_path / "t.json", data[:cut])
        whole = sum(end <= cut for end in ends)
        assert values(items) == records[:whole], cut
        last = items[-1]
        assert isinstance(last, Break) and len(items) == whole + 1, cut
        assert last.position == whole and last.file == str(tmp_path / "t.json"), cut
        # Inside a record the break is where that record begins, between records where the file ends.
        begun = whole < len(begins) and begins[whole] < cut
        assert last.byte == (begins[whole] if begun else cut), cut


def test_json_lines_that_break_off_at_any_byte_keep_the_whole_lines(tmp_path: Path) -> None:
    records: list[Any] = [{"a": "ü€😀"}, {"b": "  \x85 "}, {"c": [1]}]
    lines = [json.dumps(r, ensure_ascii=False).encode() for r in records]
    data = b"\n".join(lines)
    starts = [sum(len(line) + 1 for line in lines[:i]) for i in range(len(lines))]
    for cut in range(1, len(data)):
        items = read(tmp_path / "t.jsonl", data[:cut])
        whole = sum(start + len(line) <= cut for start, line in zip(starts, lines, strict=True))
        assert values(items) == records[:whole], cut
        if cut > starts[whole]:
            assert isinstance(items[-1], Break) and len(items) == whole + 1, cut
            assert (items[-1].byte, items[-1].position) == (starts[whole], whole), cut
        else:
            assert len(items) == whole, cut


def test_a_break_is_told_with_file_byte_record_and_reason(tmp_path: Path) -> None:
    [_, broken] = read(tmp_path / "t.json", '[{"a": 1}, {"b": "cut of')
    assert str(broken).startswith(f"{tmp_path / 't.json'}: breaks off at byte 11, in record 1: Unterminated string")


@pytest.mark.parametrize(
    ("text", "kept", "reason"),
    [
        ("[{}] and more", 1, "there is text after the end of the array"),
        ("[{}", 1, "the file ends before the array does"),
        ("[{},", 1, "the file ends before the array does"),
        ("[1, 23", 1, "the file ends inside a value"),
    ],
)
def test_what_is_wrong_with_an_array_is_said(tmp_path: Path, text: str, kept: int, reason: str) -> None:
    items = read(tmp_path / "t.json", text)
    assert len(values(items)) == kept
    assert isinstance(items[-1], Break) and items[-1].reason == reason


@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\t\r\n "])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(PipelineError, match=rf"{name}: the file is empty"):
        read(tmp_path / name, content)


@pytest.mark.parametrize(
    "content", ["hello", '{"pytorch_code": 1}', "\ufeff", "\ufeff\ufeff[{}]", "PK\x03\x04", "null"]
)
def test_a_json_file_that_is_no_array_is_refused_with_its_beginning(tmp_path: Path, content: str) -> None:
    with pytest.raises(PipelineError, match=r"t\.json: not a JSON array; it begins with") as caught:
        read(tmp_path / "t.json", content)
    str(caught.value).encode()  # What is said can be printed.


def test_utf_16_is_refused_as_no_json_array(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="not a JSON array"):
        read(tmp_path / "t.json", '[{"a": 1}]'.encode("utf-16"))


@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "T.JSONL"])
def test_a_byte_order_mark_is_no_part_of_the_records(tmp_path: Path, name: str) -> None:
    text = '[{"a": 1}]' if name == "t.json" else '{"a": 1}\r\n'
    assert values(read(tmp_path / name, b"\xef\xbb\xbf" + text.encode())) == [{"a": 1}]


@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
def test_bytes_that_are_no_utf_8_cost_their_own_record_alone(tmp_path: Path, name: str) -> None:
    pieces = ['{"a": "à"}'.encode(), '{"a": "é"}'.encode("latin-1"), b'{"a": "ok"}']
    data = b"[" + b", ".join(pieces) + b"]" if name == "t.json" else b"\n".join(pieces)
    good, bad, after = read(tmp_path / name, data)
    assert [good.value, after.value] == [{"a": "à"}, {"a": "ok"}]
    assert isinstance(bad, Malformed) and bad.reason == "not_utf8" and bad.position == 1
    assert bad.raw == '{"a": "\\xe9"}'
    assert bad.detail == f"byte {data.index(bytes([0xE9])):,} of the file is not UTF-8"


def test_a_bad_line_in_the_middle_is_one_malformed_record(tmp_path: Path) -> None:
    items = read(tmp_path / "t.jsonl", b'{"a": 1}\n{"b": \xff\n\n  \n{"c": 3} x\n{"d": 4}\n')
    assert values(items) == [{"a": 1}, {"d": 4}]
    bad = [item for item in items if isinstance(item, Malformed)]
    assert [(m.position, m.reason) for m in bad] == [(1, "not_json"), (2, "not_json")]
    assert bad[0].detail.startswith("line 2: ") and bad[0].raw == '{"b": \\xff'
    assert bad[1].detail == "line 5: there is text after the object"


def test_a_bad_last_line_with_its_newline_is_malformed_and_no_break(tmp_path: Path) -> None:
    items = read(tmp_path / "t.jsonl", '{"a": 1}\n{"b":\n')
    assert isinstance(items[0], RawRecord) and isinstance(items[1], Malformed) and len(items) == 2


def test_unusual_json_values_do_not_end_the_reading(tmp_path: Path) -> None:
    text = '[{"a": NaN, "b": -Infinity}, {"a": ' + "9" * 5000 + '}, {"a": "\\ud800"}, {"a": 1, "a": 2}, [[[[1]]]]]'
    nan, huge, surrogate, duplicate, nested = values(read(tmp_path / "t.json", text))
    assert nan["a"] != nan["a"] and nan["b"] == float("-inf")
    assert huge["a"] == float("inf")
    assert surrogate["a"] == "\ud800"
    assert duplicate == {"a": 2}
    assert nested == [[[[1]]]]


def test_integers_that_python_can_hold_stay_exact(tmp_path: Path) -> None:
    assert values(read(tmp_path / "t.json", f"[{2**200}, {-(2**63)}]")) == [2**200, -(2**63)]


def test_a_folder_gives_its_json_files_by_name_and_nothing_else(tmp_path: Path) -> None:
    for name in ["b.json", "a.jsonl", "C.JSON", ".tmp-x.json", "notes.txt"]:
        (tmp_path / name).write_text("[]")
    (tmp_path / "sub.json").mkdir()
    assert [file.path.name for file in resolve(tmp_path)] == ["C.JSON", "a.jsonl", "b.json"]


def test_a_folder_without_traces_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("[]")
    with pytest.raises(PipelineError, match=r"the folder holds no \.json or \.jsonl file"):
        resolve(tmp_path)


@pytest.mark.parametrize("name", ["none.json", "none/deeper.json"])
def test_a_file_that_is_not_there_is_named_and_the_variable_too(tmp_path: Path, name: str) -> None:
    with pytest.raises(PipelineError, match=rf"{name}: no such file or folder\. Set TRITON_SFT_TRACES"):
        resolve(tmp_path / name, origin="TRITON_SFT_TRACES")


def test_a_name_that_no_file_can_have_is_an_error_for_a_person(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="cannot be read"):
        resolve(tmp_path / ("x" * 300))


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b'[{"a": 1}]')
    os.close(writing)
    try:
        assert values(list(open_traces(resolve(Path(f"/dev/fd/{reading}"))))) == [{"a": 1}]
    finally:
        os.close(reading)


def test_the_hash_of_a_location_follows_its_content(tmp_path: Path) -> None:
    one = tmp_path / "one"
    one.mkdir()
    (one / "a.json").write_text("[]")
    alone = hash_location(one / "a.json")
    reading = open_traces(resolve(one))
    assert list(reading) == [] and hash_location(one) == alone == reading.source_hash
    one.rename(tmp_path / "moved")
    assert hash_location(tmp_path / "moved") == alone
    (tmp_path / "moved" / "b.json").write_text("[]")
    both = hash_location(tmp_path / "moved")
    (tmp_path / "moved" / "b.json").write_text("[1]")
    assert len({alone, both, hash_location(tmp_path / "moved")}) == 3


def test_a_record_that_is_no_json_is_malformed_and_the_rest_is_read(tmp_path: Path) -> None:
    items = read(tmp_path / "t.json", '[{"a": 1}, {"a": nonsense}, {"a": 3}]')
    assert values(items) == [{"a": 1}, {"a": 3}]
    [bad] = [item for item in items if isinstance(item, Malformed)]
    assert (bad.position, bad.byte, bad.reason, bad.raw) == (1, 11, "not_json", '{"a": nonsense}')
    assert bad.detail == "Expecting value at line 1, column 18"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
def test_a_compressed_file_gives_what_a_plain_one_gives(tmp_path: Path, name: str, suffix: str) -> None:
    text = b'[{"a": "\xc3\xa9"}, {"b": 2}]' if name == "t.json" else b'{"a": "\xc3\xa9"}\n{"b": 2}\n'
    data = {".gz": gzip.compress, ".zst": zstandard.compress}[suffix](text)
    first, second = read(tmp_path / (name + suffix), data)
    assert (first.value, second.value) == ({"a": "é"}, {"b": 2})
    assert text[second.byte :].startswith(b'{"b"')


@pytest.mark.parametrize("name", ["t.json.gz", "t.jsonl.gz"])
def test_a_compressed_file_that_is_cut_off_gives_the_whole_records_and_a_break(tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"n": n, "noise": os.urandom(50).hex()}) for n in range(200)]
    text = "[" + ",\n".join(lines) + "]" if name == "t.json.gz" else "\n".join(lines) + "\n"
    data = gzip.compress(text.encode())
    items = read(tmp_path / name, data[: len(data) // 2])
    assert [v["n"] for v in values(items)] == list(range(len(items) - 1)) and len(items) > 50
    assert isinstance(items[-1], Break) and items[-1].reason.startswith("the gzip data ends too soon")
    whole = read(tmp_path / name, data[:-4])
    assert len(values(whole)) == 200 and isinstance(whole[-1], Break) and whole[-1].byte == len(text)


def test_a_parquet_file_gives_its_rows_as_the_json_they_stand_for(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"sample_key": f"s{n}", "result": {"correctness": True, "speedup": n / 2}, "turns": [{"turn": n}]}
        for n in range(200)
    ]
    table = pa.Table.from_pylist([{**row, "timestamp": datetime.datetime(2026, 1, 2, 3, 4)} for row in rows])
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=70)
    reading = open_traces(resolve(tmp_path / "t.parquet"))
    items = list(reading)
    assert values(items) == [{**row, "timestamp": "2026-01-02T03:04:00"} for row in rows]
    assert [item.position for item in items] == list(range(200))
    assert all(json.loads(item.raw) == item.value for item in items if isinstance(item, RawRecord))
    assert reading.source_hash == hash_location(tmp_path / "t.parquet")


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_a_parquet_file_without_its_end_is_refused(tmp_path: Path, damage: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "t.parquet")
    data = (tmp_path / "t.parquet").read_bytes()
    with pytest.raises(PipelineError, match=r"t\.parquet: (not a whole Parquet file|the file is empty)"):
        read(tmp_path / "t.parquet", {"cut": data[:-10], "other": b"[{}]", "empty": b""}[damage])


def test_a_parquet_file_with_damaged_rows_gives_those_before_and_a_break(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"a": [os.urandom(100).hex() for _ in range(300)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=100, compression="zstd", use_dictionary=False)
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    start = pq.read_metadata(tmp_path / "t.parquet").row_group(1).column(0).data_page_offset
    data[start : start + 400] = bytes(400)
    items = read(tmp_path / "t.parquet", bytes(data))
    assert values(items) == table.to_pylist()[: len(items) - 1] and 64 <= len(items) - 1 <= 128
    assert isinstance(items[-1], Break) and "the Parquet data is damaged" in items[-1].reason


def test_several_files_are_read_in_order_with_their_hashes_and_progress(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a"')
    (tmp_path / "b.jsonl").write_text('{"b": 1}\n')
    told: list[tuple[int, int]] = []
    reading = open_traces(resolve(tmp_path), lambda done, total: told.append((done, total)))
    items = list(reading)
    assert [type(item).__name__ for item in items] == ["ReadRecord", "Break", "ReadRecord"]
    assert [item.file for item in items] == [str(tmp_path / name) for name in ("a.json", "a.json", "b.jsonl")]
    assert [name for name, _ in reading.hashes] == ["a.json", "b.jsonl"]
    assert reading.source_hash == hash_location(tmp_path)
    assert told == [(15, 24), (24, 24)]


def test_a_file_is_hashed_again_only_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    path.write_text("[1]")
    os.utime(path, (1e9, 1e9))
    before = hash_location(path)
    hashed: list[Any] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: hashed.append(given) or digest(*given))
    assert hash_location(path) == before and hashed == []
    path.write_text("[2]")
    assert hash_location(path) != before and len(hashed) == 1
    # It may change again within one tick of the clock that marks changes.
    path.write_text("[3]")
    assert hash_location(path) == hashlib.sha256(b"[3]").hexdigest()


def test_a_large_array_takes_no_memory_to_speak_of(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    record = json.dumps({"sample_key": "k", "text": "é" * 5000, "turns": [{"a": 1}] * 20}, indent=2, ensure_ascii=False)
    with open(path, "w") as stream:
        stream.write("[\n" + ",\n".join([record] * 10_000) + "\n]")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from triton_sft_pipeline.traces.reader import open_traces\n"
        "from triton_sft_pipeline.traces.sources import resolve\n"
        "print(sum(1 for _ in open_traces(resolve(sys.argv[1]))))\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=True, capture_output=True, text=True)
    records, kib = map(int, done.stdout.split())
    assert path.stat().st_size > 100 * 2**20 and records == 10_000 and kib < 200 * 1024
