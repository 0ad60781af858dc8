"""Servers for the tests: the real one, `transformers serve` in a process of its own, and a scripted one that fails on
purpose.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TINY_BASE = Path(__file__).parents[2] / "data" / "tiny_base"
_READY_S = 120.0


class RealServer:
    """`transformers serve` on a port, with a model directory loaded, on the CPU and offline."""

    def __init__(self, model: Path, directory: Path, port: int) -> None:
        self.model, self.port = str(model), port
        self.url = f"http://127.0.0.1:{port}/v1"
        self._log = directory / f"serve_{port}.log"
        self._directory = directory
        self.start()

    def start(self) -> None:
        """Start it and return when its health endpoint answers."""
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", self.model]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self._directory / "hf"), "OMP_NUM_THREADS": "1"}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | quiet, stdin=subprocess.DEVNULL
            )
        deadline = time.monotonic() + _READY_S
        while not _healthy(f"http://127.0.0.1:{self.port}/health"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"transformers serve did not start:\n{self._log.read_text()[-4000:]}")
            # Polls the process: returns as soon as it ends.
            try:
                self.process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue

    def kill(self) -> None:
        """End it at once, in the middle of whatever it does."""
        self.process.kill()
        self.process.wait()


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def free_port() -> int:
    """A port that nothing listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    server = RealServer(TINY_BASE, tmp_path_factory.mktemp("serve"), free_port())
    yield server
    server.kill()


Reply = Callable[["ScriptedServer", dict[str, Any]], tuple[int, Any]]


class ScriptedServer:
    """A small HTTP server that answers chat requests as `reply` says: (200, a list of chunks) or (status, a body).

    Attributes:
        asked: the bodies of all chat requests, in order.
        keys: the Authorization headers that came with them.
        pages: path -> what else it has, such as "/v1/models"; anything else is 404.
    """

    def __init__(self, reply: Reply, pages: dict[str, Any]) -> None:
        self.reply, self.pages = reply, pages
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                page = outer.pages.get(self.path)
                page = page() if callable(page) else page
                self._send(*((404, {"detail": "Not Found"}) if page is None else page))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path in outer.pages:
                    return self._send(*outer.pages[self.path](body))
                if self.path != "/v1/chat/completions":
                    return self._send(404, {"detail": "Not Found"})
                with outer.lock:
                    outer.asked.append(body)
                    outer.keys.append(self.headers["Authorization"])
                    status, said = outer.reply(outer, body)
                return self._stream(said) if status == 200 else self._send(status, said)

            def _send(self, status: int, said: Any) -> None:
                data = said.encode() if isinstance(said, str) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if isinstance(said, str) else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After-Ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def _stream(self, chunks: list[Any]) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                # Whoever asked may be gone by now.
                with contextlib.suppress(ConnectionError):
                    for chunk in chunks:
                        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def scripted(
    reply: Reply, models: tuple[str, ...] = ("tiny",), owner: str = "me", **pages: Any
) -> Iterator[ScriptedServer]:
    listed = {"data": [{"id": name, "owned_by": owner, "created": time.time_ns(), "root": "r"} for name in models]}
    server = ScriptedServer(reply, {"/v1/models": (200, listed), **{f"/{k}": v for k, v in pages.items()}})
    try:
        yield server
    finally:
        server.close()


def chunk(content: str = "", finish: str | None = None, usage: tuple[int, int] | None = None, **delta: Any) -> Any:
    """One chunk of a stream."""
    made: dict[str, Any] = {
        "id": "x",
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {"content": content or None, **delta}, "finish_reason": finish}],
    }
    if usage:
        made["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return made


def said(*pieces: str, finish: str | None = "stop", usage: tuple[int, int] | None = None) -> tuple[int, list[Any]]:
    """A whole answer, in pieces."""
    return 200, [*(chunk(piece) for piece in pieces), chunk(finish=finish, usage=usage)]
