"""Datasets of the Hub, from a server on this machine that answers as the Hub does."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

from triton_sft_pipeline import hub
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.traces.reader import hash_location, open_traces
from triton_sft_pipeline.traces.record import RawRecord
from triton_sft_pipeline.traces.sources import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "README.md": b"# traces",
    "a.json": b'[{"n": 1}]',
    "data/b.jsonl": b'{"n": 2}\n',
    "data/same.jsonl": b'{"n": 2}\n',
    "data/deep/c.json": b'[{"n": 3}]',
    "dataset_infos.json": b"{}",
}


class Hub(BaseHTTPRequestHandler):
    """One dataset, owner/name, at one commit."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        begin, _, rest = path.partition("/owner/name/")
        if begin == "/api/datasets" and rest in ("revision/main", f"revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in FILES]
            return self._send(200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode(), body)
        if begin == "/api/datasets" and rest.startswith("tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in FILES.items()
            ]
            return self._send(200, json.dumps(tree).encode(), body)
        data = FILES.get(rest.removeprefix(f"resolve/{COMMIT}/"))
        if begin == "/datasets" and data is not None:
            return self._send(200, data, body, ETag=f'"{_etag(data)}"', **{"X-Repo-Commit": COMMIT})
        error = "RevisionNotFound" if "/owner/name/" in path else "RepoNotFound"
        return self._send(404, b"{}", body, **{"X-Error-Code": error})

    def _send(self, status: int, data: bytes, body: bool, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths that the server was asked for."""
    asked: list[str] = []
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"asked": asked}))
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    here = f"http://127.0.0.1:{httpd.server_port}"
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", here)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield asked
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        ("hf://owner/name", ("owner/name", None, "")),
        ("hf:/owner/name", ("owner/name", None, "")),
        ("hf://datasets/owner/name/", ("owner/name", None, "")),
        ("hf://owner/na-me.v1@main/data/a.json", ("owner/na-me.v1", "main", "data/a.json")),
        ("hf://owner/name@refs%2Fpr%2F1", ("owner/name", "refs/pr/1", "")),
    ],
)
def test_a_dataset_is_named_by_owner_name_revision_and_path(place: str, parts: tuple[str, str | None, str]) -> None:
    assert hub.parse(place) == hub.HubPlace(*parts)


@pytest.mark.parametrize("place", ["hf://", "hf://name", "hf://owner/", "hf://owner/na me", "hf://owner/name@"])
def test_what_is_no_name_of_a_dataset_is_refused(place: str) -> None:
    with pytest.raises(PipelineError, match="expected hf://owner/name"):
        hub.parse(place)


def test_a_dataset_gives_its_trace_files_and_its_records_name_them(server: list[str]) -> None:
    files = resolve("hf://owner/name")
    prefix = "hf://owner/name/"
    assert [f.name for f in files] == [
        prefix + n for n in ("a.json", "data/b.jsonl", "data/deep/c.json", "data/same.jsonl")
    ]
    records = [item for item in open_traces(files) if isinstance(item, RawRecord)]
    assert [(r.file.removeprefix(prefix), r.value["n"]) for r in records][:2] == [("a.json", 1), ("data/b.jsonl", 2)]
    assert not any(path.endswith(("README.md", "dataset_infos.json")) for path in server)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/data/b.jsonl", ["data/b.jsonl"]),
        ("/data", ["data/b.jsonl", "data/deep/c.json", "data/same.jsonl"]),
        ("@main/*/*.jsonl", ["data/b.jsonl", "data/same.jsonl"]),
        (f"@{COMMIT}/data/deep", ["data/deep/c.json"]),
    ],
)
def test_a_file_a_folder_or_a_pattern_of_a_dataset_can_be_named(server: list[str], path: str, found: list[str]) -> None:
    files = resolve(f"hf://owner/name{path}")
    assert [f.name.split("/", 4)[4] for f in files] == found


def test_a_dataset_stands_beside_local_files_in_one_list(server: list[str], tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text("[]")
    names = [f.name for f in resolve(f"hf://owner/name/a.json:{tmp_path}/own.json:hf://owner/name/data/b.jsonl")]
    assert names == ["hf://owner/name/a.json", f"{tmp_path}/own.json", "hf://owner/name/data/b.jsonl"]


def test_what_was_downloaded_is_not_downloaded_again_and_serves_without_a_network(
    server: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hash_location("hf://owner/name")
    server.clear()
    assert hash_location(Path("hf://owner/name")) == before
    assert not any("/resolve/" in path for path in server)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    server.clear()
    assert hash_location("hf://owner/name") == before
    assert server == []


def test_without_a_network_a_dataset_that_is_not_in_the_cache_is_refused_with_the_setting(offline: None) -> None:
    with pytest.raises(
        PipelineError, match=r"hf://owner/name \(TRITON_SFT_TRACES\): not in the local cache, and the Hub"
    ):
        resolve("hf://owner/name", "TRITON_SFT_TRACES")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("hf://owner/none", "knows no such dataset"),
        ("hf://owner/name@none", "has no revision 'none'"),
        ("hf://owner/name/README.md", "holds no such file of traces"),
        ("hf://owner/name/none", "holds no such file of traces"),
    ],
)
def test_what_the_hub_does_not_have_is_said(server: list[str], place: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        resolve(place)
