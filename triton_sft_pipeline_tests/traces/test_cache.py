"""What earlier runs found out is found again, changes no result, and is never out of date."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triton_sft_pipeline.problems import Problem
from triton_sft_pipeline.traces import Filtered, FilterSettings, filter_location, funnel
from triton_sft_pipeline.traces import cache as module
from triton_sft_pipeline.traces.cache import Cache, Finding, context_of
from triton_sft_pipeline_tests.traces.records import MODULE, labelled, record, write_array

CONTEXT = context_of(FilterSettings(), [])
FORM = (b"\x01" * 32, b"\x02" * 24)


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[Cache]:
    """Every cache that the filter opens."""
    made: list[Cache] = []

    class Kept(Cache):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(funnel, "Cache", Kept)
    return made


def filtered(path: Path, cache: Path | None, held_out: list[Problem] | None = None, **changes: Any) -> Filtered:
    return filter_location(path, FilterSettings(**changes), held_out or [], cache=cache)


def result(found: Filtered) -> Any:
    """All that a filter's result says, with what is in its files."""
    return found.funnel, found.data_version, found.kept, found.dropped, found.quarantined


@pytest.mark.parametrize(
    "finding", [Finding("p"), Finding("p", ("no_kernel", "there is no \U0001f600")), Finding("p", None, FORM)]
)
def test_what_is_remembered_is_found_in_this_run_and_the_next(tmp_path: Path, finding: Finding) -> None:
    cache = Cache(tmp_path / "deep" / "c.sqlite", CONTEXT)
    assert cache.record("text") is None
    cache.remember_record("text", finding)
    cache.remember_module("text", FORM)
    cache.close()
    again = Cache(tmp_path / "deep" / "c.sqlite", CONTEXT)
    assert again.record("text") == finding and again.module("text") == FORM
    assert again.record("other text") is None and again.module("\ud800") is None
    assert (again.hits, again.misses) == (2, 2)
    again.close()


RECORDS: list[Any] = [
    record(1),
    record(2),
    labelled(3, correctness=False),
    record(4, triton_code="def ("),
    record(1, sample_key="twice"),
    {"no": "trace"},
    record(5, pytorch_code=MODULE.format(expression="torch.tanh(x)")),
]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.lists(st.sampled_from(RECORDS), max_size=6), second=st.lists(st.sampled_from(RECORDS), max_size=8))
def test_a_filter_that_remembers_says_what_one_that_does_not_says(
    tmp_path_factory: pytest.TempPathFactory, first: list[Any], second: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("cached")
    held_out = [Problem("tanh", MODULE.format(expression="torch.tanh(x)"))]
    for number, records in enumerate([first, second]):
        path = write_array(folder / f"{number}.json", records)
        remembering = filtered(path, folder / "c.sqlite", held_out)
        assert result(remembering) == result(filtered(path, None, held_out))


def test_of_a_file_that_grew_only_what_is_new_is_worked_out(
    tmp_path: Path, caches: list[Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = tmp_path / "t.json", tmp_path / "c.sqlite"
    filtered(write_array(path, [record(n) for n in range(20)]), cache)
    worked: list[str] = []
    first_refusal = funnel.first_refusal
    monkeypatch.setattr(funnel, "first_refusal", lambda t, s: worked.append(t.sample_key) or first_refusal(t, s))
    found = filtered(write_array(path, [record(30), *(record(n) for n in range(20)), record(31)]), cache)
    assert worked == ["sample_30", "sample_31"]
    assert (caches[1].hits, caches[1].misses) == (40, 4), "a record and its module"
    assert [t.position for t in found.kept] == list(range(22))


@pytest.mark.parametrize("change", [{"require_fast_2": True}, {"check_syntax": False}, {"contamination": 0.7}])
def test_another_setting_finds_nothing(tmp_path: Path, caches: list[Cache], change: dict[str, Any]) -> None:
    path = write_array(tmp_path / "t.json", [record(1)])
    filtered(path, tmp_path / "c.sqlite")
    filtered(path, tmp_path / "c.sqlite", **change)
    assert [cache.hits for cache in caches] == [0, 0]


def test_another_held_out_problem_or_another_source_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = context_of(FilterSettings(), [])
    assert context_of(FilterSettings(), [Problem("p", MODULE.format(expression="x"))]) != before
    monkeypatch.setattr(module, "_source", lambda: "edited")
    assert context_of(FilterSettings(), []) != before


def test_a_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    path, file = write_array(tmp_path / "t.json", [record(1)]), tmp_path / "c.sqlite"
    file.write_bytes(b"no database at all" * 1_000)
    assert filtered(path, file).kept_count == 1
    assert sqlite3.connect(file).execute("SELECT count(*) FROM found").fetchone() == (2,)


def test_a_cache_that_another_run_is_writing_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WAIT_S", 0.01)
    path, file = write_array(tmp_path / "t.json", [record(1)]), tmp_path / "c.sqlite"
    Cache(file, CONTEXT).close()
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert filtered(path, file).kept_count == 1
    other.close()


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = write_array(tmp_path / "t.json", [record(1)])
    assert filtered(path, tmp_path / "file" / "c.sqlite").kept_count == 1


def test_what_no_record_asks_for_any_more_is_forgotten_once_it_is_more_than_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SPARE", 0)
    path, file = tmp_path / "t.json", tmp_path / "c.sqlite"
    filtered(write_array(path, [record(n) for n in range(10)]), file)
    for kept, entries in [(5, 20), (4, 8)]:
        filtered(write_array(path, [record(n) for n in range(kept)]), file)
        assert sqlite3.connect(file).execute("SELECT count(*) FROM found").fetchone() == (entries,)
