"""Records of an array one at a time: what `json.loads` gives, wherever a block ends, and what comes after damage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_sft_pipeline.traces.arrays import array_records
from triton_sft_pipeline.traces.items import Break
from triton_sft_pipeline.traces.record import Malformed, RawRecord
from triton_sft_pipeline.traces.streams import Window
from triton_sft_pipeline.traces.values import RECORD_LIMIT, decode, decode_first

MIB = 2**20


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def read(data: str | bytes, size: int = 2**16) -> list[Any]:
    data = data.encode() if isinstance(data, str) else data
    return list(array_records("t.json", Window(pieces(data, size))))


def shown(items: list[Any]) -> list[Any]:
    """Values of records, (reason, raw) of malformed ones, and the byte of a break."""
    return [
        item.value
        if isinstance(item, RawRecord)
        else (item.reason, item.raw)
        if isinstance(item, Malformed)
        else item.byte
        for item in items
    ]


def pretty(records: list[Any], indent: int = 2) -> str:
    return json.dumps(records, indent=indent)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(
    records=st.lists(
        st.fixed_dictionaries({"a": json_values}, optional={"turns": json_values}) | json_values, max_size=5
    ),
    indent=st.sampled_from([None, 0, 1, 2]),
    size=st.sampled_from([1, 2, 3, 7, 64, 4096]),
)
def test_any_array_gives_what_json_loads_gives_wherever_its_blocks_end(
    records: Any, indent: int | None, size: int
) -> None:
    data = json.dumps(records, indent=indent).encode()
    items = read(data, size)
    assert repr([item.value for item in items]) == repr(json.loads(data))
    assert [data[item.byte : item.byte + len(item.raw.encode())].decode() for item in items] == [i.raw for i in items]


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(value=json_values, ascii_only=st.booleans())
def test_every_beginning_of_a_value_is_unfinished_and_the_whole_is_not(value: Any, ascii_only: bool) -> None:
    data = json.dumps([value], ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    for cut in range(1, len(data)):
        flaw = decode_first(data[:cut])[2]
        assert flaw is not None and flaw.unfinished, data[:cut]


@pytest.mark.parametrize(
    "text", ['{"a": nope', '{"a": 1, b', "[1 2", '{"a": "\x01', '["\\q', '["\\u12G4', "[tru1", "[1.x", "[,"]
)
def test_what_no_bytes_can_make_whole_is_not_called_unfinished(text: str) -> None:
    flaw = decode_first(text.encode())[2]
    assert flaw is not None and not flaw.unfinished


@pytest.mark.parametrize(
    "text",
    [
        *("NaN", "[Infinity, -Infinity]", "1e400", "-0", "-0.0", "0.1e-5", "2.2250738585072011e-308", str(2**63)),
        *(str(-(2**70)), "123456789012345678901234567890.5", '"\\ud800"', '"\\ud83d\\ude00"', '"\x7f"', '"\\/"'),
        '{"a": 1, "a": 2}',
    ],
)
def test_what_parsers_disagree_about_is_what_the_standard_library_says(text: str) -> None:
    value, flaw = decode(text.encode())
    assert flaw is None and repr(value) == repr(json.loads(text))


@pytest.mark.parametrize("text", ["01", "1.", "[1,]", '{"a": 1,}', '"\x01"', "1 2", "'a'", "\x0c1", "", "True"])
def test_what_the_standard_library_refuses_is_refused(text: str) -> None:
    assert decode(text.encode())[1] is not None


def test_records_inside_records_and_separators_inside_strings_are_not_taken_for_records() -> None:
    nested = {"k": 1, "turns": [{"k": 2}, {"k": 3}], "text": '}, {"k": 1}\n  },\n  {\n    "k": 4'}
    for text in (json.dumps([nested] * 5), pretty([nested] * 5), pretty([nested] * 5, 0)):
        assert shown(read(text, 50)) == [nested] * 5


@pytest.mark.parametrize("indent", [None, 2])
def test_a_damaged_record_is_told_with_its_text_and_the_rest_is_read(indent: int | None) -> None:
    text = json.dumps([{"k": n, "v": "x" * n} for n in range(5)], indent=indent)
    whole = [{"k": n, "v": "x" * n} for n in range(5)]
    for damage in ('"v": xx', '"v" "xx"', '"v": "xx', '"w": ["xx"'):
        items = read(text.replace('"v": "xx"', damage))
        kept = [item.value for item in items if isinstance(item, RawRecord)]
        assert [v for v in kept if v in whole] == [whole[n] for n in (0, 1, 3, 4)], damage
        bad = [item for item in items if isinstance(item, Malformed)]
        assert bad and bad[0].reason == "not_json" and bad[0].position == 2, damage
        assert not any(isinstance(item, Break) for item in items), damage


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[{}, nonsense]", [{}, ("not_json", "nonsense")]),
        ('[{"a": bad}, {"zz": 1}]', [("not_json", '{"a": bad}'), {"zz": 1}]),
        (
            '[{"a": 1,}, [1,], "\x01", {"a": 3}]',
            [("not_json", '{"a": 1,}'), ("not_json", "[1,]"), ("not_json", '"\x01"'), {"a": 3}],
        ),
        ('[{"a": 1},\0\0{"a": 2}]', [{"a": 1}, ("not_json", "\0\0"), {"a": 2}]),
        ('[{"a": 1} {"a": 2}]', [{"a": 1}, {"a": 2}]),
        ('[,{"a": 1},,{"a": 2},]', [{"a": 1}, {"a": 2}]),
        ('[{"a": 1}]\n[{"a": 2}]', [{"a": 1}, {"a": 2}]),
        ('[{"a": 1}], {"a": 2}]', [{"a": 1}, {"a": 2}]),
        ('[{"a": 1}}, {"a": 2}]', [{"a": 1}, ("not_json", "}"), {"a": 2}]),
        ('[{"a": 1}] log line [{"a": 2}]', [{"a": 1}, ("not_json", "log line ["), {"a": 2}]),
        # A writer that died, and another that began the file anew behind it.
        ('[{"a": 1}, {"a": "cut o[{"a": 2}]', [{"a": 1}, ("not_json", '{"a": "cut o['), {"a": 2}]),
        ('[{"a": 1}, {"b": [{"x": 1}, {"a": 2}, {"a"', [{"a": 1}, 11]),
    ],
)
def test_between_and_after_records_nothing_is_passed_over_in_silence(text: str, expected: list[Any]) -> None:
    assert shown(read(text)) == expected


def test_a_missing_bracket_in_a_pretty_printed_file_costs_its_own_record_alone() -> None:
    text = pretty([{"a": [1]}, {"a": [2]}, {"a": [3]}]).replace("      2\n    ]", "      2")
    first, bad, last = read(text)
    assert (first.value, bad.reason, last.value) == ({"a": [1]}, "not_json", {"a": [3]})


def test_nesting_that_is_too_deep_is_malformed_and_the_rest_is_read() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    items = read('[{"a": 1}, ' + deep + ', {"a": ' + deep + '}, {"a": 2}]')
    assert [item.value for item in items if isinstance(item, RawRecord)] == [{"a": 1}, {"a": 2}]
    assert [item.detail[:17] for item in items if isinstance(item, Malformed)] == ["nested too deeply"] * 2


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_record_over_the_limit_is_quarantined_with_its_beginning_and_the_rest_is_read(
    indent: int | None, number: int
) -> None:
    records: list[Any] = [{"k": n, "v": "small"} for n in range(3)]
    records[number]["v"] = "x" * (RECORD_LIMIT + MIB)
    items = read(json.dumps(records, indent=indent), MIB)
    bad = items.pop(number)
    assert (bad.reason, bad.position, len(bad.raw)) == ("too_large", number, 4096)
    del records[number]
    assert shown(items) == records


def test_a_record_just_under_the_limit_is_read() -> None:
    records = [{"k": 1}, {"k": 2, "v": "é" * (RECORD_LIMIT // 2 - 100)}, {"k": 3}]
    assert shown(read(json.dumps(records, ensure_ascii=False), MIB)) == records


def test_a_break_far_into_a_file_names_its_byte() -> None:
    data = ("[" + ", ".join('{"a": "' + "x" * 1000 + '"}' for _ in range(300)) + ', {"a": "cut o').encode()
    last = read(data, 50_000)[-1]
    assert isinstance(last, Break) and last.position == 300
    assert last.byte == data.rindex(b"{")
