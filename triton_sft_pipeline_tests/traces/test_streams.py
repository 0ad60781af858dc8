"""Bytes as they are needed: hashed as they pass, decompressed, and told apart from those that end too soon."""

from __future__ import annotations

import gzip
import hashlib
import random
from pathlib import Path
from unittest import mock

import pytest
import zstandard

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.traces import streams
from triton_sft_pipeline.traces.streams import BLOCK, ByteSource, Window

TEXT = random.Random(0).randbytes(50_000) + b"a" * 50_000
PACK = {".gz": gzip.compress, ".zst": zstandard.compress}


def read(path: Path, data: bytes) -> tuple[bytes, ByteSource]:
    path.write_bytes(data)
    source = ByteSource(path)
    text = b"".join(source.blocks())
    assert source.sha256 == hashlib.sha256(data).hexdigest() and source.done == len(data)
    return text, source


@pytest.mark.parametrize("size", [0, 1, 1000, 999])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_the_text_comes_out_whole_and_the_hash_is_that_of_the_file(tmp_path: Path, suffix: str, size: int) -> None:
    pack = PACK.get(suffix, bytes)
    with mock.patch.object(streams, "BLOCK", 1000):
        for text in (TEXT[:size], TEXT):
            found, source = read(tmp_path / f"t.json{suffix}", pack(text))
            assert found == text and source.cut is None


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_that_were_joined_are_read_to_the_end(tmp_path: Path, suffix: str) -> None:
    data = PACK[suffix](b"one ") + PACK[suffix](b"") + PACK[suffix](b"two")
    found, source = read(tmp_path / f"t{suffix}", data)
    assert found == b"one two" and source.cut is None


def test_gzip_may_be_padded_with_zero_bytes(tmp_path: Path) -> None:
    found, source = read(tmp_path / "t.gz", gzip.compress(b"text") + b"\0" * 100)
    assert found == b"text" and source.cut is None


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_data_that_ends_too_soon_gives_what_it_holds_and_says_so(tmp_path: Path, suffix: str) -> None:
    text = random.Random(1).randbytes(600_000)
    data = PACK[suffix](text)
    lengths = []
    for cut in range(1, len(data), 9999):
        found, source = read(tmp_path / f"t{suffix}", data[:cut])
        assert text.startswith(found) and source.cut is not None and "ends too soon" in source.cut
        lengths.append(len(found))
    # Zstandard packs up to 128 KiB at a time: what is in the last of these pieces is lost with it.
    assert lengths == sorted(lengths) and lengths[-1] > len(text) - 2 * 2**17


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_bytes_after_the_compressed_data_are_told(tmp_path: Path, suffix: str) -> None:
    found, source = read(tmp_path / f"t{suffix}", PACK[suffix](b"text") + b"and more")
    assert found == b"text" and source.cut is not None and "damaged" in source.cut


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(PipelineError, match=r"not (gzip|zstd) data, as its name says"):
        read(tmp_path / f"t{suffix}", b"[{}]")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_is_handed_on_in_pieces(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"t{suffix}").write_bytes(PACK[suffix](b" " * (20 * BLOCK)))
    sizes = [len(block) for block in ByteSource(tmp_path / f"t{suffix}").blocks()]
    assert sum(sizes) == 20 * BLOCK and max(sizes) <= 10 * BLOCK


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"none\.json: cannot be read \(No such file"):
        list(ByteSource(tmp_path / "none.json").blocks())


def test_progress_is_told_in_bytes_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "t.json.gz").write_bytes(data := gzip.compress(TEXT))
    told: list[int] = []
    with mock.patch.object(streams, "BLOCK", 10_000):
        list(ByteSource(tmp_path / "t.json.gz", told.append).blocks())
    assert told == sorted(told) and told[-1] == len(data) and len(told) > 3


@pytest.mark.parametrize("block", [1, 7, 50, 200])
@pytest.mark.parametrize("step", [1, 13, 60])
def test_a_window_gives_any_bytes_from_where_it_stands(block: int, step: int) -> None:
    text = bytes(range(256)) * 2
    with mock.patch.object(streams, "_SEAM", 20):
        window = Window(iter([text[start : start + block] for start in range(0, len(text), block)]))
        for start in range(0, len(text), step):
            assert window.get(start, 70) == text[start : start + 70]
            assert window.base <= start and window.end <= len(text)
        assert not window.advance(len(text)) and window.ended


def test_a_place_is_a_line_and_a_column_near_the_beginning_and_a_byte_further_on() -> None:
    window = Window(iter(["é\nüb".encode(), b"cd"]))
    window.get(0, 6)
    assert window.place(5) == "line 2, column 2"
    window.advance(4)
    assert window.place(6) == "byte 6"
