"""What travels over the wire arrives as it was; what a hostile peer sends ends in one of three exceptions."""

from __future__ import annotations

import json
import math
import random
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from triton_sft_pipeline.verification.wire import (
    ITEM_SIZE,
    MAX_DEPTH,
    MAX_HEADER,
    Array,
    ClosedError,
    Value,
    WireError,
    arrays_in,
    has_more,
    nbytes,
    receive,
    send,
)

Pair = tuple[socket.socket, socket.socket]
MB = 1 << 20


@pytest.fixture
def pair() -> Iterator[Pair]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


def soon() -> float:
    return time.monotonic() + 30


def carried(pair: Pair, message: dict[str, Value], max_bytes: int | None = None) -> dict[str, Value]:
    """The message as it arrives. A thread sends: large ones do not fit into the socket's buffer."""
    sender = threading.Thread(target=send, args=(pair[0], message, soon()))
    sender.start()
    try:
        return receive(pair[1], soon(), max_bytes)
    finally:
        sender.join()


def frame(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def framed(message: dict[str, Value]) -> bytes:
    """The bytes of a message that fits into the socket's buffer."""
    near, far = socket.socketpair()
    with near, far:
        send(near, message)
        near.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: far.recv(MB), b""))


def received(data: bytes, max_bytes: int | None = 1 << 16) -> dict[str, Value]:
    """What comes of bytes after which the peer is gone."""
    near, far = socket.socketpair()
    with near, far:
        sender = threading.Thread(target=_write, args=(near, data))
        sender.start()
        try:
            return receive(far, soon(), max_bytes)
        finally:
            far.close()
            sender.join()


def _write(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except OSError:  # The reader has seen enough.
        pass


def same(left: Value, right: Value) -> bool:
    """Equal in type too, with NaN equal to NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, float) and isinstance(right, float):
        return (math.isnan(left) and math.isnan(right)) or (left, math.copysign(1, left)) == (
            right,
            math.copysign(1, right),
        )
    return left == right


RICH: dict[str, Value] = {
    "empty": (),
    "nested": ({}, {"a": (1, 1.0, True, None)}, ((),)),
    "keys": {1: "one", "1": "text", -2: False},
    "floats": (math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1),
    "ints": (0, -(1 << 63), (1 << 64) - 1),
    "text": 'quote " slash \\ bracket [{ \n \x00 ü 😀',
    "lookalikes": ({"array": 1}, {"dict": ("x", 1)}),
    "plain": Array("float32", (2, 3), bytes(range(24))),
    "scalar": Array("complex128", (), bytes(16)),
    "none": Array("int64", (0, 3), b""),
    "strided": (Array("bfloat16", (2, 3), bytes(range(8)), (1, 1)), Array("int8", (5,), b"\x07", (0,))),
    "no rows": Array("float16", (0, 3), b"", (3, 1)),
}


def test_every_kind_of_value_arrives_as_it_was(pair: Pair) -> None:
    assert same(carried(pair, RICH), RICH)


def test_arrays_arrive_with_their_own_bytes_in_their_order(pair: Pair) -> None:
    sizes = (3, 1 << 17, 0, 5, 1 << 16, (1 << 16) - 1, (1 << 16) - 1, 1)
    message: dict[str, Value] = {"x": tuple(Array("uint8", (n,), random.Random(n).randbytes(n)) for n in sizes)}
    assert same(carried(pair, message), message)


def test_messages_follow_each_other_on_one_socket(pair: Pair) -> None:
    for number in range(3):
        send(pair[0], {"number": number, "data": Array("uint8", (2,), bytes([number] * 2))})
    assert [receive(pair[1])["number"] for _ in range(3)] == [0, 1, 2]


def test_a_list_arrives_as_a_tuple(pair: Pair) -> None:
    assert carried(pair, {"x": [1, [2]]}) == {"x": (1, (2,))}  # type: ignore[dict-item]


def test_half_a_surrogate_pair_becomes_a_question_mark(pair: Pair) -> None:
    assert carried(pair, {"x": "a\udc80b"}) == {"x": "a?b"}


def test_the_item_sizes_are_torchs() -> None:
    import torch

    assert {name: getattr(torch, name).itemsize for name in ITEM_SIZE} == ITEM_SIZE


def test_any_memory_of_the_right_size_can_be_sent_and_written_to_where_it_arrives(pair: Pair) -> None:
    import numpy as np
    import torch

    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    arrived = carried(pair, {"x": Array("float32", (2, 3), values.data)})["x"]
    assert isinstance(arrived, Array)
    tensor = torch.frombuffer(arrived.data, dtype=torch.float32).reshape(arrived.shape)
    tensor += 1
    assert (np.frombuffer(arrived.data, np.float32) == values.reshape(-1) + 1).all()


def test_bytes_are_counted_as_they_travel() -> None:
    assert nbytes(RICH) == sum(len(array.data) for array in arrays_in(RICH)) == 24 + 16 + 8 + 1
    assert [a.dtype for a in arrays_in(RICH)] == ["float32", "complex128", "int64", "bfloat16", "int8", "float16"]


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1.5: 1},
        {True: 1},
        {None: 1},
        1 << 64,
        -(1 << 63) - 1,
        b"bytes",
        {1, 2},
        Array("float33", (), b"1234"),
        Array("float32", (2,), b"1234"),
        Array("float32", (2,), b"12345678", (1, 1)),
        Array("float32", (2,), b"12345678", (2,)),
        Array("float32", (-1,), b""),
        Array("uint8", (1,) * 65, b"1"),
        Array("uint8", (2,), memoryview(b"1234")[::2]),
        "x" * (MAX_HEADER + 1),
    ],
)
def test_what_cannot_travel_is_refused_before_anything_is_sent(pair: Pair, value: object) -> None:
    with pytest.raises(WireError):
        send(pair[0], {"before": 1, "x": value})  # type: ignore[dict-item]
    assert not has_more(pair[1])


@pytest.mark.parametrize("message", [1, (), [], {1: 2}, None])
def test_a_message_is_a_dictionary_with_texts_as_keys(pair: Pair, message: object) -> None:
    with pytest.raises(WireError):
        send(pair[0], message)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", [lambda value: (value,), lambda value: {"a": value}])
def test_the_deepest_value_that_can_be_sent_can_be_received(pair: Pair, wrap: Callable[[Value], Value]) -> None:
    value: Value = Array("int8", (2,), b"12", (1,))
    for _ in range(MAX_DEPTH - 1):
        value = wrap(value)
    assert same(carried(pair, {"x": value}), {"x": value})
    with pytest.raises(WireError, match="deep"):
        send(pair[0], {"x": wrap(value)})


def test_brackets_in_a_text_are_no_nesting(pair: Pair) -> None:
    assert carried(pair, {"x": '[{"\\' * 1000}) == {"x": '[{"\\' * 1000}


def described(dtype: object, shape: object, stride: object = None) -> object:
    return {"dict": ["x", {"array": [dtype, shape, stride]}]}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff",
        b"nothing",
        b"{}",
        b"[]",
        b"1",
        b"null",
        b'{"dict": [1, 2]}',
        b'{"dict": ["a"]}',
        b'{"dict": ["a", 1, "a", 2]}',
        b'{"dict": [["a"], 1]}',
        b'{"dict": ["a", {"dict": [true, 1]}]}',
        b'{"dict": ["a", {"dict": [1.0, 1]}]}',
        b'{"dict": ["a", {"other": 1}]}',
        b'{"dict": [], "array": []}',
        b'{"dict": ["a", 1]} more',
        b'{"dict": ["a", "\\ud800"]}',
        b'{"dict": ["\\udfff", 1]}',
        b'{"dict": ["a", 18446744073709551616]}',
        b'{"dict": ["a", ' + b"9" * 5000 + b"]}",
        b'{"dict": ["x", {"array": ["float32", [2]]}]}',
        described("object", [1]),
        described(None, [1]),
        described(["float32"], [1]),
        described("float32", 1),
        described("float32", [-1]),
        described("float32", [-1, -1]),
        described("float32", [1.0]),
        described("float32", [True]),
        described("float32", ["1"]),
        described("float32", [None]),
        described("float32", [1] * 65),
        described("float32", [1 << 63]),
        described("float32", [1 << 32, 1 << 32]),
        described("float32", [1 << 61]),
        described("float32", [0, 1 << 62, 1 << 62]),
        described("float32", [1], []),
        described("float32", [1], [1, 1]),
        described("float32", [2], [-1]),
        described("float32", [2], [1 << 62]),
        described("float32", [1], [1 << 62]),
        described("float32", [2], "1"),
        described("float32", [1 << 62], [0]),
        described("float32", [1 << 40]),
    ],
)
def test_a_malformed_header_is_a_broken_protocol(header: object) -> None:
    with pytest.raises(WireError):
        received(frame(header, bytes(64)))


@pytest.mark.parametrize("opening", [b"[", b'{"dict":[1,', b'{"a":', b'["\\"",'])
def test_nesting_is_refused_before_a_parser_recurses(opening: bytes) -> None:
    header = (opening * MAX_HEADER)[: MAX_HEADER - 1]
    # A user who has raised the limit must not get a crash instead of an exception.
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10 * MAX_HEADER)
    try:
        with pytest.raises(WireError, match="deep"):
            received(frame(header))
    finally:
        sys.setrecursionlimit(limit)


def test_a_header_that_is_too_long_is_refused_unread() -> None:
    with pytest.raises(WireError, match="header"):
        received((MAX_HEADER + 1).to_bytes(8, "little"))
    with pytest.raises(WireError, match="header"):
        received(b"\xff" * 8)


def test_more_bytes_than_allowed_are_refused_over_all_arrays(pair: Pair) -> None:
    message: dict[str, Value] = {"x": (Array("uint8", (10,), bytes(10)), Array("int16", (5,), bytes(10)))}
    assert same(carried(pair, message, max_bytes=20), message)
    with pytest.raises(WireError, match="allowed"):
        carried(pair, message, max_bytes=19)


def test_a_peer_that_is_gone_is_closed_at_every_point_of_a_message() -> None:
    whole = framed({"x": Array("uint8", (4,), b"1234")})
    for length in range(len(whole)):
        with pytest.raises(ClosedError):
            received(whole[:length])
    assert received(whole) == {"x": Array("uint8", (4,), b"1234")}


def test_sending_to_a_peer_that_is_gone_or_over_a_closed_socket_is_closed(pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(ClosedError):
        send(pair[0], {"x": 1})
    pair[0].close()
    with pytest.raises(ClosedError):
        send(pair[0], {"x": 1}, soon())
    with pytest.raises(ClosedError):
        receive(pair[0])
    assert not has_more(pair[0])


def test_a_peer_that_is_gone_sends_no_signal() -> None:
    code = """if True:
        import signal, socket
        from triton_sft_pipeline.verification.wire import ClosedError, send
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        near, far = socket.socketpair()
        far.close()
        try:
            send(near, {"x": 1})
        except ClosedError:
            print("closed")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr


def test_the_deadline_ends_a_wait_for_a_message_and_for_the_rest_of_one(pair: Pair) -> None:
    with pytest.raises(TimeoutError):
        receive(pair[1], time.monotonic() + 0.02)
    pair[0].sendall(framed({"x": Array("uint8", (4,), b"1234")})[:-1])
    with pytest.raises(TimeoutError):
        receive(pair[1], time.monotonic() + 0.02)


def test_the_deadline_ends_sending_to_a_peer_that_does_not_read(pair: Pair) -> None:
    with pytest.raises(TimeoutError):
        send(pair[0], {"x": Array("uint8", (8 * MB,), bytes(8 * MB))}, time.monotonic() + 0.02)


def test_a_deadline_that_has_passed_or_never_comes_is_one_too(pair: Pair) -> None:
    send(pair[0], {"x": 1}, math.inf)
    with pytest.raises(TimeoutError):
        receive(pair[1], time.monotonic() - 1)
    assert receive(pair[1], math.inf) == {"x": 1}
    with pytest.raises(TimeoutError):
        send(pair[0], {"x": 1}, time.monotonic() - 1)
    assert not has_more(pair[1])


@pytest.mark.parametrize("timeout", [None, 0.0, 30.0])
def test_waiting_bytes_are_seen_without_taking_them(pair: Pair, timeout: float | None) -> None:
    pair[1].settimeout(timeout)
    assert not has_more(pair[1])
    send(pair[0], {"x": 1})
    assert has_more(pair[1]) and has_more(pair[1])
    assert receive(pair[1]) == {"x": 1}
    assert not has_more(pair[1])
    pair[0].sendall(b"x")
    pair[0].close()
    assert has_more(pair[1])
    pair[1].recv(1)
    assert not has_more(pair[1])


def test_large_arrays_are_not_copied(pair: Pair) -> None:
    import numpy as np

    size = 32 * MB
    data = np.full(size, 7, np.uint8).data
    tracemalloc.start()
    try:
        arrived = carried(pair, {"x": Array("uint8", (size,), data)})["x"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(arrived, Array) and arrived.data == data
    # The memory that it arrives in, once.
    assert size <= peak < size + 2 * MB


@pytest.mark.parametrize("item", [b"[],", b"{},", b'"",', b"1.5,", b'{"array":["int8",[9],null]},', b'{"dict":[]},'])
def test_memory_stays_bounded_whatever_a_header_claims(item: bytes) -> None:
    pieces = (item * (MAX_HEADER // len(item) - 8)).rstrip(b",")
    tracemalloc.start()
    try:
        with pytest.raises((WireError, ClosedError)):
            received(frame(b'{"dict":["x",[' + pieces + b"]]}")[:-1], max_bytes=MB)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * MB


def _flip(data: bytearray, dice: random.Random) -> None:
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def _replace(data: bytearray, dice: random.Random) -> None:
    at = dice.randrange(8, len(data))
    data[at : at + 1] = dice.choice([b'"', b"[", b"]", b"{", b"}", b",", b":", b"-", b"9", b"0", b".", b"\\", b"\xff"])


def _digits(data: bytearray, dice: random.Random) -> None:
    """Another number in place of one of the header's."""
    places = [at for at in range(8, len(data)) if 48 <= data[at] <= 57]
    at = dice.choice(places)
    number = dice.choice(["-1", "0", "1e9", "4294967296", "9223372036854775807", "99999999999999999999999", "true"])
    data[at : at + 1] = number.encode()
    _mend(data, len(number) - 1)


def _cut(data: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(data))
    del data[start : start + dice.randrange(1, 9)]


def _double(data: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(data))
    piece = data[start : start + dice.randrange(1, 40)]
    data[start:start] = piece
    _mend(data, len(piece))


def _length(data: bytearray, dice: random.Random) -> None:
    data[:8] = dice.randrange(1 << dice.randrange(1, 64)).to_bytes(8, "little")


def _mend(data: bytearray, more: int) -> None:
    """Let the header's length agree, so that the change reaches the parser's depths."""
    length = (int.from_bytes(data[:8], "little") + more) % (1 << 64)
    data[:8] = length.to_bytes(8, "little")


def test_mutated_messages_raise_nothing_else_and_break_no_bound() -> None:
    dice = random.Random(20)
    whole = framed(RICH)
    small = framed({"x": (Array("float32", (2, 3), bytes(24)), {"y": Array("int16", (2, 2), bytes(8), (1, 2))})})
    accepted = refused = 0
    for turn in range(4000):
        data = bytearray(whole if turn % 2 else small)
        for _ in range(dice.choice([1, 1, 1, 2, 5])):
            dice.choice([_flip, _replace, _digits, _cut, _double, _length])(data, dice)
            if len(data) < 16:
                break
        try:
            message = received(bytes(data), max_bytes=1 << 12)
        except (WireError, ClosedError):
            refused += 1
            continue
        accepted += 1
        assert nbytes(message) <= 1 << 12
        # What is accepted is a whole message: it can be sent on, and arrives the same.
        assert same(received(framed(message)), message)
    # Both happen often enough for the test to say something.
    assert accepted > 300 and refused > 1000


def test_random_bytes_raise_nothing_else() -> None:
    dice = random.Random(21)
    for _ in range(500):
        body = dice.randbytes(dice.randrange(200))
        with pytest.raises((WireError, ClosedError)):
            received(dice.choice([body, frame(body)]))
