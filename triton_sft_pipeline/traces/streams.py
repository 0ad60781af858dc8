"""The bytes of a trace file as they are needed: decompressed, hashed as they pass, with a word where they end too soon.

Knows nothing of records.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol

from triton_sft_pipeline.errors import PipelineError

BLOCK = 8 * 2**20
"""Bytes that are read, and at most handed on, at a time."""

# How much of a new block is joined to what is left of the one before: enough for the record between them.
_SEAM = 2**20
# One byte of zstd can stand for 32 KiB of text: small pieces keep a bomb from filling the memory.
_ZSTD_PIECE = 2048


class ByteSource:
    """The bytes of one file, read once from its beginning to its end.

    Attributes:
        cut: why the compressed data ended before its end; None when it did not, or not yet.
        done: bytes of the file that were read so far.
    """

    def __init__(self, path: Path, progress: Callable[[int], None] | None = None) -> None:
        self.path = Path(path)
        self.cut: str | None = None
        self.done = 0
        self._hash = hashlib.sha256()
        self._progress = progress

    @property
    def sha256(self) -> str:
        """Hash of the file's own bytes, compressed or not, of those that were read so far."""
        return self._hash.hexdigest()

    def blocks(self) -> Iterator[bytes]:
        """The text of the file in blocks of about BLOCK bytes, none of them empty.

        Raises:
            PipelineError: the file cannot be read, or is not compressed as its name says.
        """
        try:
            with open(self.path, "rb", buffering=0) as stream:
                unpack = _unpacker(self.path)
                yield from self._raw(stream) if unpack is None else self._unpacked(stream, unpack)
        except OSError as error:
            raise PipelineError(f"{self.path}: cannot be read ({error.strerror or error}).") from error

    def _raw(self, stream: IO[bytes]) -> Iterator[bytes]:
        """The file's own bytes. A second thread hashes a block while it is looked at, unless there is only one."""
        with ThreadPoolExecutor(1) as thread:
            hashing: Future[None] | None = None
            while block := stream.read(BLOCK):
                if hashing is not None:
                    hashing.result()
                if len(block) < BLOCK and hashing is None:
                    self._hash.update(block)
                else:
                    hashing = thread.submit(self._hash.update, block)
                self.done += len(block)
                if self._progress:
                    self._progress(self.done)
                yield block

    def _unpacked(self, stream: IO[bytes], unpack: _Unpacker) -> Iterator[bytes]:
        gathered: list[bytes] = []
        size = 0
        for block in self._raw(stream):
            if self.cut is not None:
                continue  # Read on for the hash alone.
            try:
                for piece in unpack.feed(block):
                    gathered.append(piece)
                    size += len(piece)
                    if size >= BLOCK:
                        yield b"".join(gathered)
                        gathered, size = [], 0
            except unpack.errors as error:
                if not unpack.began:
                    raise PipelineError(f"{self.path}: not {unpack.name} data, as its name says ({error}).") from error
                self.cut = f"the {unpack.name} data is damaged ({error})"
        if size:
            yield b"".join(gathered)
        if self.cut is None and not unpack.finished:
            self.cut = f"the {unpack.name} data ends too soon"


class _Unpacker(Protocol):
    """A decompressor that takes what comes and gives what it can.

    Attributes:
        began: whether a whole header was understood: before that the file is of another kind, after it damaged.
        finished: whether all that was fed ends where a compressed stream may end.
    """

    @property
    def name(self) -> str: ...

    @property
    def errors(self) -> tuple[type[Exception], ...]: ...

    @property
    def began(self) -> bool: ...

    @property
    def finished(self) -> bool: ...

    def feed(self, data: bytes) -> Iterator[bytes]: ...


class _Gzip:
    """gzip, also several members in a row and padded with zero bytes, as the format allows."""

    name = "gzip"
    errors = (zlib.error,)

    def __init__(self) -> None:
        self.began = False
        self._inflate = zlib.decompressobj(wbits=31)
        self._fed = False

    @property
    def finished(self) -> bool:
        return not self._fed or self._inflate.eof

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._inflate.eof:
                data = data.lstrip(b"\0")
                if not data:
                    return
                self._inflate = zlib.decompressobj(wbits=31)
            self._fed = True
            piece = self._inflate.decompress(data, BLOCK)
            data = self._inflate.unconsumed_tail or self._inflate.unused_data
            if piece:
                self.began = True
                yield piece
        # What the window still holds once all input is taken.
        while not self._inflate.eof and (piece := self._inflate.decompress(b"", BLOCK)):
            yield piece


class _Zstd:
    """Zstandard, also several frames in a row."""

    name = "zstd"

    def __init__(self) -> None:
        import zstandard

        self.errors: tuple[type[Exception], ...] = (zstandard.ZstdError,)
        self.began = False
        self._fed = False
        # Frames that need a window of more than 128 MiB are refused by default.
        self._new: Callable[[], Any] = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()

    @property
    def finished(self) -> bool:
        return not self._fed or bool(self._frame.eof)

    def feed(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), _ZSTD_PIECE):
            part = data[start : start + _ZSTD_PIECE]
            while part:
                if self._frame.eof:
                    self._frame = self._new()
                self._fed = True
                piece = self._frame.decompress(part)
                part = self._frame.unused_data
                if piece:
                    self.began = True
                    yield piece


def _unpacker(path: Path) -> _Unpacker | None:
    name = path.name.lower()
    if name.endswith(".gz"):
        return _Gzip()
    return _Zstd() if name.endswith(".zst") else None


class Window:
    """The part of a text that is looked at. It moves on, and grows as far as a record needs. Places are offsets in the
    text.

    Attributes:
        data: the bytes at hand.
        base: offset of `data[0]`.
        ended: whether nothing comes after `data`.
    """

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.data = b""
        self.base = 0
        self.ended = False
        self._blocks = blocks
        self._whole: tuple[int, bytes] | None = None

    @property
    def end(self) -> int:
        """Offset of the first byte that is not yet at hand."""
        return self.base + len(self.data)

    def advance(self, start: int) -> bool:
        """Let go of what lies before `start` and take in one more block, or as much as is at hand if that is more.

        Returns:
            False at the end of the text, and then the window is as it was.
        """
        if self._whole is not None:
            # Past the seam: look at the block itself, and copy nothing. A record that is larger than the seam needs
            # both.
            begin, block = self._whole
            self._whole = None
            rest = b"" if start >= begin else self.data[start - self.base : begin - self.base]
            self.base, self.data = (begin, block) if not rest else (start, rest + block)
            return True
        if self.ended:
            return False
        rest = self.data[start - self.base :]
        wanted = max(1, len(rest))
        blocks: list[bytes] = []
        while wanted > 0 and (block := next(self._blocks, b"")):
            blocks.append(block)
            wanted -= len(block)
        self.ended = wanted > 0
        if not blocks:
            return False
        if len(blocks) == 1 and len(blocks[0]) > 2 * _SEAM:
            self._whole = self.end, blocks[0]
            blocks = [blocks[0][:_SEAM]]
        self.data = b"".join([rest, *blocks])
        self.base = start
        return True

    def get(self, start: int, size: int) -> bytes:
        """`size` bytes from `start`, or what there is. Lets go of what lies before, if it must read on."""
        while self.end - start < size and self.advance(start):
            pass
        return self.data[start - self.base : start - self.base + size]

    def place(self, at: int) -> str:
        """Line and column of a byte, both from 1, where the beginning of the text is still at hand; else its offset."""
        if self.base:
            return f"byte {at:,}"
        begin = self.data.rfind(b"\n", 0, at) + 1
        column = len(self.data[begin:at].decode("utf-8", "replace")) + 1
        line = self.data.count(b"\n", 0, at) + 1
        return f"line {line}, column {column}"
