"""The real `dagster-webserver` in a process of its own, asked in GraphQL as its UI asks it."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from triton_sft_pipeline_tests.pipeline.processes import Workplace, kill_group

T = TypeVar("T")

LOOK_EVERY = 0.2
"""Seconds between two questions about something that another process does; every such loop has an end."""

LAUNCH = """
mutation ($params: ExecutionParams!) {
  launchPipelineExecution(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
    ... on InvalidSubsetError { message }
  }
}
"""

RUN = "query ($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"

ASSETS = """
query { assetNodes { assetKey { path } isObservable staleStatus staleCauses { key { path } reason } } }
"""

CHECKS = """
query ($key: AssetKeyInput!) {
  assetNodeOrError(assetKey: $key) {
    ... on AssetNode {
      assetChecksOrError {
        ... on AssetChecks {
          checks { name blocking executionForLatestMaterialization { status evaluation { severity description } } }
        }
      }
    }
  }
}
"""


class WebServer:
    """A server that answers at `url` for the length of a `with` block."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """The `data` of a GraphQL answer; an error instead fails the test."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        assert "errors" not in answer, answer["errors"]
        return answer["data"]

    def launch(self, *keys: str, in_one_process: bool = False) -> str:
        """Start what the buttons "Materialize" and "Observe" start, wait for its end, and return its status.

        Args:
            in_one_process: as the launchpad can ask for: the steps start no processes of their own.
        """
        params = {
            "mode": "default",
            "runConfigData": {"execution": {"config": {"in_process": {}}}} if in_one_process else {},
            "selector": {
                "repositoryLocationName": "triton_sft_pipeline.definitions",
                "repositoryName": "__repository__",
                "pipelineName": "__ASSET_JOB",
                "assetSelection": [{"path": [key]} for key in keys],
            },
        }
        launched = self.ask(LAUNCH, params=params)["launchPipelineExecution"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        run = launched["run"]["runId"]

        def ended() -> str | None:
            status = self.ask(RUN, id=run)["runOrError"]["status"]
            return status if status in ("SUCCESS", "FAILURE", "CANCELED") else None

        return until(ended, f"run {run} ended", seconds=180)

    def stale_status(self) -> dict[str, str]:
        """What the lineage page shows of each asset that is made."""
        nodes = self.ask(ASSETS)["assetNodes"]
        return {node["assetKey"]["path"][0]: node["staleStatus"] for node in nodes if not node["isObservable"]}

    def stale_causes(self, key: str) -> list[tuple[str, str]]:
        """Why an asset is stale: (asset key, what is new about it)."""
        (node,) = [node for node in self.ask(ASSETS)["assetNodes"] if node["assetKey"]["path"] == [key]]
        return [(cause["key"]["path"][0], cause["reason"]) for cause in node["staleCauses"]]

    def checks(self, key: str) -> dict[str, dict[str, Any]]:
        """What the page "Checks" of an asset shows: name -> its latest execution."""
        checks = self.ask(CHECKS, key={"path": [key]})["assetNodeOrError"]["assetChecksOrError"]["checks"]
        return {check["name"]: check["executionForLatestMaterialization"] or {} for check in checks}


@contextmanager
def web_server(workplace: Workplace) -> Iterator[WebServer]:
    """Serve a workplace's Dagster home; nothing that the server started outlives the block."""
    # Runs start at once: the queue of the shipped instance is worked off by the daemon, which `dagster dev` runs.
    with (workplace.home / "dagster.yaml").open("a") as settings:
        settings.write("\nrun_coordinator: {module: dagster.core.run_coordinator, class: DefaultRunCoordinator}\n")
    port = _free_port()
    options = ("-m", "triton_sft_pipeline.definitions", "-h", "127.0.0.1", "-p", str(port))
    process = workplace.start("dagster_webserver", *options, output=workplace.root / "webserver.log")
    server = WebServer(f"http://127.0.0.1:{port}")
    try:
        until(lambda: _answers(server.url, process), "the web server answers", seconds=60)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        finally:
            kill_group(process)


def until(look: Callable[[], T | None], what: str, seconds: float) -> T:
    """The first answer of `look` that is one; fails when there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(LOOK_EVERY)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


def _answers(url: str, process: subprocess.Popen[str]) -> bool:
    assert process.poll() is None, "the web server ended before it answered"
    try:
        with urllib.request.urlopen(f"{url}/server_info", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
