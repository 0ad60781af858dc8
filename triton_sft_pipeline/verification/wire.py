"""Carries plain values between the judge and its children over a stream socket. The receiver trusts nothing it reads.

A frame is the header's length (8 bytes, little-endian), the header (JSON), and the bytes of the arrays in the order in
which the header names them. In the header a tuple is a list, a dictionary is {"dict": [key, value, key, value, ...]}
and an array is {"array": [dtype, shape, stride or null]}: how many bytes it has follows from these three, so that
there is no second number that could contradict them. Nothing that is read is ever executed or unpickled.

Knows nothing of torch, of problems and of kernels.
"""

from __future__ import annotations

import json
import math
import re
import select
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

ITEM_SIZE = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
}
"""Bytes per element of every torch dtype that can travel."""

MAX_HEADER = 1 << 20
MAX_DEPTH = 32
# numpy knows no more.
MAX_DIMENSIONS = 64
_SMALLEST_INT, _LARGEST_INT = -(1 << 63), (1 << 64) - 1
_INT_DIGITS = 20
# A dictionary takes two brackets a level, an array's descriptor three.
_MAX_BRACKETS = 2 * MAX_DEPTH + 5
# Brackets outside of text. Possessive, so that a hostile header cannot make it backtrack or pile up memory.
_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|([\[{])|([\]}])', re.DOTALL)
# Arrays below this size are joined before they are sent: fewer system calls.
_LARGE = 1 << 16
# A peer that is gone must not end the judge by a signal.
_FLAGS = getattr(socket, "MSG_NOSIGNAL", 0)


class WireError(Exception):
    """The peer broke the protocol, or a value cannot travel."""


class ClosedError(Exception):
    """The peer is gone, or the socket is closed."""


@dataclass(frozen=True)
class Array:
    """A tensor's bytes.

    Attributes:
        dtype: torch's name without "torch.", a key of ITEM_SIZE.
        shape: elements along each dimension.
        data: the elements' raw little-endian bytes. With `stride`, the storage from the first element to the last one
            that `as_strided(shape, stride, 0)` reads.
        stride: None for a contiguous tensor, else the steps in elements, each >= 0.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview | bytes
    stride: tuple[int, ...] | None = None


# A dictionary's keys are str or int. Any, because a dict[str, Value] would not count as a dict[str | int, Value].
Value: TypeAlias = "Array | bool | int | float | str | tuple[Value, ...] | dict[Any, Value] | None"


def send(sock: socket.socket, message: Mapping[str, Value], deadline: float | None = None) -> None:
    """Send one message. The arrays' bytes are not copied. A list travels as a tuple.

    Args:
        sock: a stream socket. Its timeout is changed.
        message: nested at most MAX_DEPTH deep; integers between -2^63 and 2^64 - 1.
        deadline: by `time.monotonic()`; None waits for ever.

    Raises:
        WireError: the message cannot travel. Nothing has been sent.
        ClosedError: the peer is gone.
        TimeoutError: the deadline passed. Part of the message may be under way: the socket is of no more use.
    """
    arrays: list[Array] = []
    if type(message) is not dict or not all(type(key) is str for key in message):
        raise WireError("A message is a dictionary with texts as keys.")
    header = json.dumps(_encoded(message, arrays, 0), ensure_ascii=False, separators=(",", ":"))
    # Half of a surrogate pair has no UTF-8 form. It comes from file names in error messages, where "?" does.
    encoded = header.encode("utf-8", errors="replace")
    if len(encoded) > MAX_HEADER:
        raise WireError(f"The header has {len(encoded)} bytes, more than {MAX_HEADER}.")
    parts = [memoryview(len(encoded).to_bytes(8, "little")), memoryview(encoded), *map(_bytes_of, arrays)]
    for part in _joined(parts):
        _send_all(sock, part, deadline)


def receive(sock: socket.socket, deadline: float | None = None, max_bytes: int | None = None) -> dict[str, Value]:
    """Receive one message. Each array's data is a writable memoryview over memory of its own.

    Args:
        sock: a stream socket. Its timeout is changed.
        deadline: by `time.monotonic()`; None waits for ever.
        max_bytes: the most that all arrays' data may have together; None for no limit. Memory stays below this and some
            50 MiB for the header. An array with strides may have more elements than its data: check its shape before
            going through them.

    Raises:
        WireError: the peer sent something else than a message, or too much.
        ClosedError: the peer is gone, in the middle of a message or before it.
        TimeoutError: the deadline passed.
        After each of them the socket is of no more use.
    """
    size = int.from_bytes(_exactly(sock, 8, deadline), "little")
    if size > MAX_HEADER:
        raise WireError(f"The header has {size} bytes, more than {MAX_HEADER}.")
    header = _exactly(sock, size, deadline)
    reader = _Reader(sys.maxsize if max_bytes is None else max_bytes)
    message = reader.value(_parsed(bytes(header)), 0)
    if not isinstance(message, dict) or not all(type(key) is str for key in message):
        raise WireError("A message is a dictionary with texts as keys.")
    for data in reader.buffers:
        _fill(sock, data, deadline)
    return cast("dict[str, Value]", message)


def nbytes(value: Value) -> int:
    """Bytes of the data of all arrays in a value."""
    return sum(memoryview(array.data).nbytes for array in arrays_in(value))


def arrays_in(value: Value) -> Iterator[Array]:
    """Every array in a value, depth first, dictionaries in their order."""
    if isinstance(value, Array):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from arrays_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from arrays_in(item)


def has_more(sock: socket.socket) -> bool:
    """Whether unread bytes are waiting. Never blocks; False when the peer is gone and has left nothing."""
    try:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(0)) and bool(sock.recv(1, socket.MSG_PEEK))
    except (OSError, ValueError):  # A closed socket has no file descriptor to register.
        return False


def _encoded(value: object, arrays: list[Array], depth: int) -> object:
    """The value as JSON knows it. Appends its arrays to `arrays`."""
    if depth > MAX_DEPTH:
        raise WireError(f"The value is nested more than {MAX_DEPTH} deep.")
    if value is None or type(value) in (bool, float, str):
        return value
    if type(value) is int:
        return _int_in_range(value)
    if isinstance(value, Array):
        arrays.append(value)
        return {"array": [value.dtype, value.shape, value.stride]}
    if type(value) in (tuple, list):
        return [_encoded(item, arrays, depth + 1) for item in cast("list[object]", value)]
    if type(value) is dict:
        pairs: list[object] = []
        for key, item in value.items():
            if type(key) not in (str, int):
                raise WireError(f"A key of type {type(key).__name__} cannot travel.")
            pairs += [_encoded(key, arrays, depth + 1), _encoded(item, arrays, depth + 1)]
        return {"dict": pairs}
    raise WireError(f"An object of type {type(value).__name__} cannot travel.")


def _bytes_of(array: Array) -> memoryview:
    data = memoryview(array.data)
    size = _size(array.dtype, array.shape, array.stride)
    if data.nbytes != size:
        raise WireError(f"An array of {array.dtype} {array.shape} has {data.nbytes} bytes instead of {size}.")
    if not data.c_contiguous:
        raise WireError("An array's data is not one piece of memory.")
    # An empty view cannot be cast.
    return data.cast("B") if size else memoryview(b"")


def _joined(parts: list[memoryview]) -> Iterator[memoryview | bytes]:
    """The parts in order, small neighbours joined. Copies only these."""
    small: list[memoryview] = []
    waiting = 0
    for part in parts:
        if part.nbytes < _LARGE:
            small.append(part)
            waiting += part.nbytes
        if small and (part.nbytes >= _LARGE or waiting >= _LARGE):
            yield b"".join(small)
            small, waiting = [], 0
        if part.nbytes >= _LARGE:
            yield part
    if small:
        yield b"".join(small)


class _Reader:
    """Turns a parsed header into a value, with a buffer for each array that is still to be filled."""

    def __init__(self, max_bytes: int) -> None:
        self.buffers: list[memoryview] = []
        self._left = max_bytes

    def value(self, node: object, depth: int) -> Value:
        """The value that `node` describes."""
        if depth > MAX_DEPTH:
            raise WireError(f"The value is nested more than {MAX_DEPTH} deep.")
        if isinstance(node, list):
            return tuple(self.value(item, depth + 1) for item in node)
        if isinstance(node, str):
            return _text(node)
        if not isinstance(node, dict):
            return cast("bool | int | float | None", node)
        if len(node) == 1 and type(node.get("dict")) is list:
            return self._dict(node["dict"], depth)
        if len(node) == 1 and type(node.get("array")) is list:
            return self._array(node["array"])
        raise WireError("The header has an object that is neither a dictionary nor an array.")

    def _dict(self, pairs: list[object], depth: int) -> Value:
        found: dict[str | int, Value] = {}
        if len(pairs) % 2:
            raise WireError("A dictionary has a key without a value.")
        for key, item in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int) or isinstance(key, bool) or key in found:
                raise WireError("A dictionary has a wrong key, or one twice.")
            found[_text(key) if isinstance(key, str) else key] = self.value(item, depth + 1)
        return found

    def _array(self, fields: list[object]) -> Array:
        if len(fields) != 3:
            raise WireError("An array is described by a dtype, a shape and a stride.")
        dtype, shape, stride = fields
        if not isinstance(dtype, str):
            raise WireError("A dtype is a text.")
        dimensions = _numbers(shape)
        steps = None if stride is None else _numbers(stride)
        size = _size(dtype, dimensions, steps)
        if size > self._left:
            raise WireError("The arrays have more bytes than are allowed.")
        self._left -= size
        self.buffers.append(_memory(size))
        return Array(dtype, dimensions, self.buffers[-1], steps)


def _parsed(header: bytes) -> object:
    if not _is_shallow(header):
        raise WireError("The header is nested too deep.")
    try:
        return json.loads(header.decode("utf-8"), parse_int=_parsed_int)
    except (ValueError, RecursionError) as error:
        raise WireError(f"The header is no JSON: {error}.") from None


def _is_shallow(header: bytes) -> bool:
    """Whether the parser, which recurses, may see it: how deep it may go depends on a limit that the user can raise."""
    if header.count(b"[") + header.count(b"{") <= _MAX_BRACKETS:
        return True
    depth = 0
    for found in _BRACKETS.finditer(header):
        depth += (found[1] is not None) - (found[2] is not None)
        if depth > _MAX_BRACKETS:
            return False
    return True


def _parsed_int(text: str) -> int:
    # Converting many digits takes time quadratic in their number.
    if len(text) > _INT_DIGITS:
        raise WireError("An integer is too large.")
    return _int_in_range(int(text))


def _int_in_range(number: int) -> int:
    if not _SMALLEST_INT <= number <= _LARGEST_INT:
        raise WireError("An integer is too large.")
    return number


def _text(text: str) -> str:
    """The text, if it can be written to a file: an escaped half of a surrogate pair cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise WireError("A text is no Unicode.") from None
    return text


def _numbers(items: object) -> tuple[int, ...]:
    if not isinstance(items, list) or len(items) > MAX_DIMENSIONS or not all(type(item) is int for item in items):
        raise WireError("A shape or stride is no list of integers.")
    return tuple(items)


def _size(dtype: str, shape: tuple[int, ...], stride: tuple[int, ...] | None) -> int:
    """The bytes of an array's data."""
    if dtype not in ITEM_SIZE:
        raise WireError("An array has an unknown dtype.")
    if len(shape) > MAX_DIMENSIONS or any(number < 0 for number in (*shape, *(stride or ()))):
        raise WireError("A shape or stride is negative or has too many dimensions.")
    # Zeros aside: torch and numpy refuse (0, 2^62, 2^62) too.
    elements = math.prod(number for number in shape if number)
    span = elements
    if stride is not None:
        if len(stride) != len(shape):
            raise WireError("A stride has another length than its shape.")
        span = 1 + sum((number - 1) * step for number, step in zip(shape, stride, strict=True) if number)
    if max(elements, span, *(stride or (0,))) * ITEM_SIZE[dtype] > sys.maxsize:
        raise WireError("A shape or stride is too large.")
    return 0 if 0 in shape else span * ITEM_SIZE[dtype]


def _memory(size: int) -> memoryview:
    """Memory that costs nothing before it is written, so that a claim alone fills none."""
    import numpy as np

    try:
        return np.empty(size, dtype=np.uint8).data
    except MemoryError:
        raise WireError(f"There is no memory for an array of {size} bytes.") from None


def _send_all(sock: socket.socket, data: memoryview | bytes, deadline: float | None) -> None:
    try:
        _limit(sock, deadline)
        sock.sendall(data, _FLAGS)
    except TimeoutError:
        raise TimeoutError("The message could not be sent in time.") from None
    except OSError as error:
        raise ClosedError(f"The peer is gone: {error}.") from None


def _exactly(sock: socket.socket, size: int, deadline: float | None) -> bytearray:
    data = bytearray(size)
    _fill(sock, memoryview(data), deadline)
    return data


def _fill(sock: socket.socket, data: memoryview, deadline: float | None) -> None:
    """Receive until `data` is full."""
    while data.nbytes:
        try:
            _limit(sock, deadline)
            received = sock.recv_into(data)
        except TimeoutError:
            raise TimeoutError("No message came in time.") from None
        except OSError as error:
            raise ClosedError(f"The peer is gone: {error}.") from None
        if not received:
            raise ClosedError("The peer has closed the connection.")
        data = data[received:]


def _limit(sock: socket.socket, deadline: float | None) -> None:
    if deadline is None or deadline == math.inf:
        sock.settimeout(None)
        return
    left = deadline - time.monotonic()
    # Zero would make the socket non-blocking.
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)
