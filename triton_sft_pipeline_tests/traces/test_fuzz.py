"""Any file at all: nothing that stood whole in it is lost, every byte is accounted for, and nothing but a PipelineError
is ever raised.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.traces import arrays, streams
from triton_sft_pipeline.traces.items import Break
from triton_sft_pipeline.traces.reader import hash_location, open_traces
from triton_sft_pipeline.traces.record import Malformed, RawRecord, Trace, parse_record
from triton_sft_pipeline.traces.sources import resolve
from triton_sft_pipeline_tests.traces.records import record


def cases(number: int) -> settings:
    """The same files in every run, 2,000 in all: a failure in CI is one on a desk."""
    return settings(
        max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


PIECES = (
    "",
    "x",
    '}, {"sample_key": 1',
    "\\",
    '"',
    "],[",
    "\n  },\n  {\n",
    "é",
    "😀",
    "\ud800",
    "\x00",
    "\u2028",
    "null",
)
texts = st.lists(st.sampled_from(PIECES), max_size=4).map("".join) | st.text(max_size=8) | st.just("long " * 3000)
numbers = (
    st.sampled_from([0, -0.0, 2**63, 2**64, -(2**63) - 1, 10**40, 1e300, 12345678901234567])
    | st.floats()
    | st.integers()
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["sample_key", "turn", '"']) | texts, inner, max_size=3)
    ),
    max_leaves=6,
)
good = st.integers(0, 9).map(record)
wrong = st.tuples(good, st.sampled_from(sorted(record())), values).map(lambda case: {**case[0], case[1]: case[2]})
records = st.one_of(good, wrong, wrong, values)


@dataclass(frozen=True)
class Written:
    """A file's text, and for each record where it begins and ends and what it says."""

    lines: bool
    text: bytes
    spans: list[tuple[int, int, Any]]


@st.composite
def written(draw: st.DrawFn) -> Written:
    """Records as an array or as lines, in any of the ways in which people write them."""
    lines = draw(st.booleans())
    indent = None if lines else draw(st.sampled_from([None, 0, 1, 2, "\t"]))
    between = "\n" if lines else draw(st.sampled_from([",", ", ", ",\n", " ,\r\n "]))
    texts = []
    for value in draw(st.lists(records, max_size=5)):
        # A number at the end of a line that lost its end may be any shorter number.
        value = [value] if lines and isinstance(value, int | float) else value
        text = json.dumps(value, indent=indent, ensure_ascii=draw(st.booleans()))
        if isinstance(value, dict) and value and draw(st.booleans()):
            text = '{"sample_key": "said twice", ' + text[1:]
        try:
            text.encode()
        except UnicodeEncodeError:
            text = json.dumps(value, indent=indent)
        texts.append(text)
    if indent is not None:
        # No string of JSON holds a bare line end, so every line can be moved in.
        margin = " " * indent if isinstance(indent, int) else indent
        texts = [text.replace("\n", "\n" + margin) for text in texts]
        between = ",\n" + margin
    out = bytearray(b"" if lines else b"[" + (between[1:] if indent is not None else "").encode())
    spans = []
    for number, text in enumerate(texts):
        out += between.encode() if number else b""
        begin = len(out)
        out += text.encode()
        spans.append((begin, len(out), json.loads(text)))
    out += b"\n" if lines else draw(st.sampled_from([b"]", b"\n]\n", b" ] "]))
    return Written(lines, bytes(out), spans)


@pytest.fixture(autouse=True)
def small_windows() -> Iterator[None]:
    """Sizes under which a record of some bytes meets every edge that one of some megabytes meets otherwise."""
    with (
        mock.patch.multiple(streams, BLOCK=97, _SEAM=24),
        mock.patch.multiple(arrays, _FIRST_TRY=16, _LOOK_AHEAD=128, _NEAR=64, _OVERLAP=128),
    ):
        yield


def read(folder: Path, name: str, data: bytes) -> list[Any]:
    """Everything in a file, after checking that places, positions and the hash are right."""
    path = folder / name
    path.write_bytes(data)
    reading = open_traces(resolve(path))
    items = list(reading)
    assert reading.source_hash == hash_location(path)
    assert not any(isinstance(item, Break) for item in items[:-1])
    assert [item.position for item in items] == list(range(len(items)))
    for item in items:
        if isinstance(item, RawRecord):
            assert isinstance(parse_record(item), Trace | Malformed)
    return items


def said(items: list[Any]) -> list[str]:
    # By their looks, for nan is not equal to itself, -0.0 is equal to 0, and 1 to True.
    return [repr(item.value) for item in items if isinstance(item, RawRecord)]


def unaccounted(text: bytes, items: list[Any]) -> bytes:
    """What of `text` neither stands in an item nor between items, up to the break."""
    places = [(item.byte, item.byte + len(item.raw.encode())) for item in items if not isinstance(item, Break)]
    end = items[-1].byte if items and isinstance(items[-1], Break) else len(text)
    gaps = [text[before:after] for (_, before), (after, _) in pairwise([(0, 0), *places, (end, end)])]
    return b"".join(gaps).strip(b" \t\r\n,[]")


def whole(file: Written, cut: int) -> list[str]:
    """The records that stand whole in the first `cut` bytes: a number only when something follows it."""
    ended = [
        v for begin, end, v in file.spans if end < cut or (end == cut and (file.lines or file.text[end - 1] in b'}]"'))
    ]
    return [repr(value) for value in ended]


@cases(800)
@given(file=written(), packed=st.sampled_from(["", "", ".gz", ".zst"]), share=st.floats(0, 1))
def test_a_file_that_is_cut_at_any_byte_gives_what_stood_before_and_a_break(
    file: Written, packed: str, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    name = ("cut.jsonl" if file.lines else "cut.json") + packed
    cut = 1 + round(share * (len(file.text) - 1))
    text = file.text[:cut]
    data = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packed](text)
    if not text.strip():
        with pytest.raises(PipelineError, match="is empty"):
            read(folder, name, data)
        return
    items = read(folder, name, data)
    assert said(items) == whole(file, cut)
    assert not unaccounted(text, items)
    assert not any(isinstance(item, Malformed) for item in items)
    if not file.lines:
        assert isinstance(items[-1] if items else None, Break) == (text.rstrip() != file.text.rstrip())


@cases(800)
@given(
    file=written(),
    share=st.floats(0, 1),
    lost=st.sampled_from([0, 0, 1, 5, 40]),
    instead=st.sampled_from(
        [
            b"",
            b"x",
            b'"',
            b"{",
            b"}",
            b"[",
            b"]",
            b",",
            b"\\",
            b"\x00\x00",
            b"\xff",
            b"\n",
            b'garbage, {" [',
            b'[{"sample_key": 1},',
        ]
    )
    | st.binary(max_size=20),
)
def test_damage_anywhere_loses_no_record_before_it_and_no_byte_at_all(
    file: Written, share: float, lost: int, instead: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    at = 1 + round(share * (len(file.text) - 1))
    text = file.text[:at] + instead + file.text[at + lost :]
    name = "damaged.jsonl" if file.lines else "damaged.json"
    try:
        items = read(tmp_path_factory.getbasetemp(), name, text)
    except PipelineError:
        assert not text.strip()
        return
    # A line is whole when its end is, and a number when nothing grew on to it.
    before = [repr(value) for begin, end, value in file.spans if end < at]
    assert said(items)[: len(before)] == before
    if not any(item.reason == "not_utf8" or "\\x" in item.raw for item in items if isinstance(item, Malformed)):
        assert not unaccounted(text, items)
    if not file.lines:
        with suppress(ValueError):
            assert said(items) == [repr(value) for value in json.loads(text)]


@cases(400)
@given(
    data=st.binary(max_size=200),
    name=st.sampled_from(["a.json", "a.jsonl", "a.json.gz", "a.jsonl.zst", "a.parquet"]),
    array=st.booleans(),
)
def test_bytes_of_any_kind_raise_nothing_but_an_error_for_a_person(
    data: bytes, name: str, array: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = b"[" + data if array else data
    try:
        items = read(tmp_path_factory.getbasetemp(), name, data)
    except PipelineError as error:
        str(error).encode()
    else:
        if name == "a.json" and not any(item.raw.count("\\x") for item in items if isinstance(item, Malformed)):
            assert not unaccounted(data, items)
