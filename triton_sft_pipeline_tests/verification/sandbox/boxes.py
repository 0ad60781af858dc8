"""Zygotes without torch for tests: they start in a quarter of a second and run code that a test gives them."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triton_sft_pipeline.verification.sandbox.client import Child, End, ZygoteClient
from triton_sft_pipeline.verification.sandbox.confine import Limits

TASK = "triton_sft_pipeline_tests.verification.sandbox.sandbox_tasks:execute"
LIMITS = Limits(cpu_s=30, file_bytes=1 << 20, data_bytes=1 << 30, processes=16, scratch_bytes=8 << 20)
WAIT_S = 20.0


class Talk:
    """A child that runs some code, and what it says."""

    def __init__(self, child: Child, code: str) -> None:
        self.child = child
        child.socket.settimeout(WAIT_S)
        self._stream = child.socket.makefile("rb")
        child.socket.sendall(json.dumps(textwrap.dedent(code)).encode() + b"\n")

    def hear(self) -> Any:
        """The next value that it says; None when it has ended."""
        line = self._stream.readline()
        return json.loads(line) if line else None

    def go_on(self) -> None:
        self.child.socket.sendall(b"\n")

    def end(self) -> End:
        end = self.child.end(WAIT_S)
        assert end is not None, "it has not ended"
        return end


def options(level: str) -> list[str]:
    return ["--no-warm-up", "--tasks", json.dumps({"execute": TASK}), "--level", level]


@contextmanager
def zygote(folder: Path, level: str = "auto") -> Iterator[ZygoteClient]:
    client = ZygoteClient("cpu", folder, options=options(level))
    try:
        client.wait_ready()
        yield client
    finally:
        client.close()


@contextmanager
def talk(client: ZygoteClient, code: str, limits: Limits = LIMITS) -> Iterator[Talk]:
    with client.spawn("execute", limits) as child:
        yield Talk(child, code)


def answer(client: ZygoteClient, code: str, limits: Limits = LIMITS) -> Any:
    """What some code says first."""
    with talk(client, code, limits) as child:
        value = child.hear()
        assert value is not None, child.end()
        return value


def processes_named(marker: str) -> list[str]:
    """Process ids on this machine whose command line has a word in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found
