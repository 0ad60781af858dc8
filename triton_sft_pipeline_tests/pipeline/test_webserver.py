"""The UI's own questions and buttons, on the real web server: observe, materialise what is stale, read the checks."""

from collections.abc import Iterator

import pytest

from triton_sft_pipeline.assets import trace_gates
from triton_sft_pipeline.refresh import PARENTS
from triton_sft_pipeline_tests.pipeline.processes import Workplace, good_traces
from triton_sft_pipeline_tests.pipeline.webserver import WebServer, web_server

pytestmark = pytest.mark.slow

MISSING = dict.fromkeys(PARENTS, "MISSING")
CHECKS = (*trace_gates.GATES, *trace_gates.WARNINGS, "labels_reproduce")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("webserver"))


@pytest.fixture(scope="module")
def server(workplace: Workplace) -> Iterator[WebServer]:
    with web_server(workplace) as server:
        yield server


def test_the_buttons_observe_materialise_and_hold_back_as_the_refresh_does(
    workplace: Workplace, server: WebServer
) -> None:
    """One story, because each step costs a process: a person opens the UI, presses its buttons and edits the traces."""
    assert server.stale_status() == MISSING

    assert server.launch("reasoning_traces") == "SUCCESS"
    assert server.launch("filtered_traces") == "SUCCESS"
    assert server.stale_status() == MISSING | {"filtered_traces": "FRESH"}
    checks = server.checks("filtered_traces")
    assert {name: check["status"] for name, check in checks.items()} == dict.fromkeys(CHECKS, "SUCCEEDED")
    assert checks["correctness"]["evaluation"]["description"] == "It holds for all 4 kept traces."

    promoted = workplace.store.require("filtered_traces")
    workplace.write([trace | {"result": trace["result"] | {"fast_0": False}} for trace in good_traces(4)])
    # What a button starts was started once of each kind. From here on it is about what was recorded.
    assert server.launch("reasoning_traces", in_one_process=True) == "SUCCESS"
    assert server.stale_status() == MISSING | {"filtered_traces": "STALE"}
    assert server.stale_causes("filtered_traces") == [("reasoning_traces", "has a new data version")]

    assert server.launch("filtered_traces", in_one_process=True) == "FAILURE"
    assert server.stale_status() == MISSING | {"filtered_traces": "STALE"}
    assert server.checks("filtered_traces")["fast_0"]["status"] == "FAILED"
    assert workplace.store.require("filtered_traces") == promoted
