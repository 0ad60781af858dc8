"""A Hub on this machine: as much of its HTTP interface as sending a dataset takes. It keeps what it is sent."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """A running Hub.

    Attributes:
        visibility: name of a dataset -> whether it is private.
        files: name of a dataset -> {path: content} as committed.
        asked: method and path of every request.
        broken: answer every commit with this status.
        card_errors: what is wrong with every dataset card.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.visibility: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.broken: int | None = None
        self.card_errors: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that answers until the block ends."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle(b"")

    def do_POST(self) -> None:
        self._handle(self._body())

    def do_PUT(self) -> None:
        content = self._body()
        self.server.asked.append(f"PUT {self.path}")
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.large[oid] = content
        self._answer(200, {})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _handle(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            errors = [{"message": message} for message in self.server.card_errors]
            return self._answer(400 if errors else 200, {"errors": errors, "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if "/preupload/" in path:
            return self._preupload(json.loads(body))
        if "/commit/" in path:
            return self._commit(path, body)
        name = path.removeprefix("/api/datasets/").partition("/revision/")[0]
        if name in self.server.visibility:
            return self._answer(200, {"id": name, "private": self.server.visibility[name], "siblings": []})
        return self._answer(404, {"error": "Repository not found"})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        assert asked["type"] == "dataset"
        known = name in self.server.visibility
        if not known:
            self.server.visibility[name] = bool(asked.get("private") or asked.get("visibility") == "private")
        self._answer(409 if known else 200, {"url": f"{self.server.address}/datasets/{name}", "name": name})

    def _preupload(self, asked: dict[str, Any]) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".parquet") else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self._answer(200, {"files": modes})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {
                "oid": item["oid"],
                "size": item["size"],
                "authenticated": True,
                "actions": {"upload": {"href": f"{self.server.address}/large/{item['oid']}", "header": {}}},
            }
            for item in asked["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, path: str, body: bytes) -> None:
        if self.server.broken:
            return self._answer(self.server.broken, {"error": "The disk is on fire"})
        name = path.removeprefix("/api/datasets/").partition("/commit/")[0]
        files = self.server.files.setdefault(name, {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        url = f"{self.server.address}/datasets/{name}/commit/1"
        return self._answer(200, {"commitUrl": url, "commitOid": "1", "success": True})

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
