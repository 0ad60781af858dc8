"""Files appear whole or not at all, and hashes follow content alone."""

from __future__ import annotations

import errno
import json
import os
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_sft_pipeline.files import (
    atomic_write_bytes,
    atomic_write_text,
    atomic_writer,
    hash_json,
    hash_tree,
    locked,
    read_json,
    sha256_bytes,
    sha256_file,
    write_json,
    write_jsonl,
)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_a_file_appears_with_its_parents_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "t.txt"
    with atomic_writer(path, "w") as stream:
        stream.write("größer")
        assert not path.exists()
    assert path.read_bytes() == "größer".encode() and names(path.parent) == ["t.txt"]


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    atomic_write_text(tmp_path / "t.txt", "old")
    with pytest.raises(type(error)), atomic_writer(tmp_path / "t.txt", "w") as stream:
        stream.write("new")
        raise error
    assert names(tmp_path) == ["t.txt"] and (tmp_path / "t.txt").read_text() == "old"


def test_a_disk_that_is_full_at_the_last_moment_leaves_the_old_file_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atomic_write_text(tmp_path / "t.txt", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        atomic_write_text(tmp_path / "t.txt", "new")
    assert caught.value.filename == str(tmp_path / "t.txt")
    assert names(tmp_path) == ["t.txt"] and (tmp_path / "t.txt").read_text() == "old"


def test_what_cannot_be_written_as_json_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "t.json", {"x": object()})
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "t.jsonl", [{"x": 1}, {"x": object()}])
    assert names(tmp_path) == []


def test_files_follow_the_users_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write_bytes(tmp_path / "t", b"")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o640


any_text = st.text() | st.text('ab\u00e9\ud83d\ude00\\"', max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=5,
)


@given(value=json_values)
def test_json_is_read_back_as_it_was_written_half_surrogates_included(
    value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    write_json(path, value)
    assert read_json(path) == json.loads(json.dumps(value))
    write_jsonl(path, [{"x": value}, {}])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == [
        {"x": json.loads(json.dumps(value))},
        {},
    ]


def test_json_is_indented_and_keeps_its_letters(tmp_path: Path) -> None:
    write_json(tmp_path / "t.json", {"a": "é"})
    assert (tmp_path / "t.json").read_text(encoding="utf-8") == '{\n  "a": "é"\n}\n'


def test_the_hash_of_json_follows_values_and_order_of_lists_not_of_keys() -> None:
    assert hash_json({"a": 1, "b": [1, 2]}) == hash_json({"b": [1, 2], "a": 1})
    assert len({hash_json(v) for v in ([1, 2], [2, 1], ["1", 2], [1, 2.5], [[1], 2], "\ud800", "\ud801")}) == 7


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"abc")
    assert (
        sha256_file(tmp_path / "t")
        == sha256_bytes(b"abc")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_the_hash_of_a_tree_follows_names_and_contents_wherever_it_stands(tmp_path: Path) -> None:
    def tree(name: str, files: dict[str, str]) -> str:
        for path, text in files.items():
            atomic_write_text(tmp_path / name / path, text)
        return hash_tree(tmp_path / name)

    one = tree("one", {"a": "1", "sub/b": "2"})
    assert tree("two", {"sub/b": "2", "a": "1"}) == one
    assert (
        len(
            {one, tree("three", {"a": "1", "sub/b": "3"}), tree("four", {"a": "1", "b": "2"}), tree("five", {"a": "1"})}
        )
        == 4
    )


def test_a_locked_file_has_one_owner_until_it_is_closed(tmp_path: Path) -> None:
    first, second, third = (FileIO(tmp_path / "lock", "w") for _ in range(3))
    with locked(first, ValueError("in use")):
        with pytest.raises(ValueError, match="in use"):
            locked(second, ValueError("in use"))
        assert second.closed and not first.closed
    with locked(third, ValueError("in use")):
        assert first.closed


def test_where_no_locks_are_known_only_what_needs_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("triton_sft_pipeline.files.fcntl.flock", unknown)
    needed, wished = (FileIO(tmp_path / "lock", "w") for _ in range(2))
    with pytest.raises(OSError, match="No locks available"):
        locked(needed, ValueError("in use"))
    with locked(wished, ValueError("in use"), required=False):
        assert needed.closed and not wished.closed
