"""A pretended GPU: what wrappers ask of it has an answer, and its streams run late but in order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from triton_sft_pipeline.verification.worker.interpreter import UnsupportedOnCpuError, is_unsupported, on_cpu
from triton_sft_pipeline_tests.verification.worker.interpreted import PRELUDE, Interpreted

READY = (
    PRELUDE
    + """
interpreter.install()
monitor = LaunchMonitor("interpreter")
x, y = torch.arange(64.0), torch.zeros(64)
side, other = torch.cuda.Stream(), torch.cuda.Stream()
pending = interpreter.pending_launches
done = lambda: torch.equal(y, 2 * x)
"""
)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreted]:
    with Interpreted(tmp_path_factory.mktemp("interpreter")) as interpreted:
        yield interpreted


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("device='cuda'", "device='cpu'"),
        ('torch.device("cuda:0")', 'torch.device("cpu")'),
        ('f"cuda:{x.device.index}"', 'f"cpu"'),
        ("'cuda kernels'", "'cuda kernels'"),
        ("torch.cuda.synchronize()", "torch.cuda.synchronize()"),
    ],
)
def test_the_device_is_renamed_where_it_is_a_device(text: str, expected: str) -> None:
    assert on_cpu(text) == expected


def test_gaps_of_the_interpreter_are_told_from_mistakes() -> None:
    assert is_unsupported(UnsupportedOnCpuError("libdevice.erf needs a GPU"))
    assert is_unsupported(AttributeError("'InterpreterBuilder' object has no attribute 'create_x'"))
    assert not is_unsupported(AttributeError("module 'triton.language' has no attribute 'x'"))


@pytest.mark.slow
def test_a_launch_on_the_default_stream_runs_at_once(interpreted: Interpreted) -> None:
    code = """
    with torch.cuda.stream(torch.cuda.current_stream()):
        launch(x, y)
    result = [done(), pending(), monitor.count]
    """
    assert interpreted.run(code, READY) == [True, 0, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "wait",
    [
        "side.synchronize()",
        "torch.cuda.synchronize()",
        "torch.cuda.current_stream().wait_stream(side)",
        "torch.cuda.default_stream().wait_event(side.record_event())",
        "event.record(side); event.wait()",
        "event.record(side); event.synchronize()",
        "with torch.cuda.stream(side): event.record()\ntorch.cuda.current_stream().wait_event(event)",
        "while not side.query(): pass",
        "other.wait_stream(side); other.synchronize()",
        "other.wait_stream(side); torch.cuda.current_stream().wait_stream(other)",
    ],
)
def test_what_was_launched_on_a_side_stream_is_there_once_somebody_waited(interpreted: Interpreted, wait: str) -> None:
    code = f"""
event = torch.cuda.Event()
with torch.cuda.stream(side):
    launch(x, y)
before = [done(), pending()]
{wait}
result = [*before, done(), pending()]
"""
    assert interpreted.run(code, READY) == [False, 1, True, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "no_wait",
    [
        "pass",
        "other.synchronize()",
        "side.wait_stream(torch.cuda.current_stream())",
        "other.wait_stream(side)",
        "torch.cuda.current_stream().wait_event(torch.cuda.Event())",
    ],
)
def test_what_nobody_waited_for_is_pending(interpreted: Interpreted, no_wait: str) -> None:
    code = f"""
with torch.cuda.stream(side):
    launch(x, y)
{no_wait}
result = [done(), pending()]
"""
    assert interpreted.run(code, READY) == [False, 1]


@pytest.mark.slow
def test_a_wait_covers_what_was_queued_before_it_alone(interpreted: Interpreted) -> None:
    code = """
    z = torch.zeros(64)
    with torch.cuda.stream(side):
        launch(x, y)
        event = side.record_event()
        launch(y, z)
    torch.cuda.current_stream().wait_event(event)
    first = [done(), float(z.sum()), pending()]
    side.synchronize()
    result = [*first, torch.equal(z, 4 * x), pending()]
    """
    assert interpreted.run(code, READY) == [True, 0.0, 1, True, 0]


@pytest.mark.slow
def test_set_stream_is_a_side_stream_too(interpreted: Interpreted) -> None:
    code = """
    default = torch.cuda.current_stream()
    torch.cuda.set_stream(side)
    launch(x, y)
    torch.cuda.set_stream(default)
    result = [torch.cuda.current_stream() is default, done(), pending()]
    """
    assert interpreted.run(code, READY) == [True, False, 1]


@pytest.mark.slow
def test_an_operator_on_the_side_stream_sees_what_was_launched_before_it(interpreted: Interpreted) -> None:
    code = """
    with OperatorLog(monitor):
        with torch.cuda.stream(side):
            launch(x, y)
            z = y + 1
    early = pending()
    torch.cuda.current_stream().wait_stream(side)
    result = [torch.equal(z, 2 * x + 1), early, pending(), monitor.count]
    """
    # It ran, but nobody has waited for it yet.
    assert interpreted.run(code, READY) == [True, 1, 0, 1]


@pytest.mark.slow
def test_what_wrappers_ask_of_a_gpu_has_an_answer(interpreted: Interpreted) -> None:
    code = """
    properties = torch.cuda.get_device_properties(0)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    end.record()
    torch.cuda.synchronize(0)
    x.record_stream(torch.cuda.current_stream())
    active = triton.runtime.driver.active
    with torch.cuda.device(x.device):
        pass
    result = [
        x.is_cuda, x.cuda() is x, torch.cuda.is_available(), torch.cuda.is_bf16_supported(),
        properties.multi_processor_count > 0, properties.L2_cache_size > 0, properties.warp_size,
        torch.cuda.get_device_capability(), start.elapsed_time(end) > 0, isinstance(side, torch.cuda.Stream),
        active.get_current_target().backend, active.get_current_device(),
        active.utils.get_device_properties(0)["multiprocessor_count"] == properties.multi_processor_count,
    ]
    """
    answers = [True, True, True, True, True, True, 32, [8, 0], True, True, "cuda", 0, True]
    assert interpreted.run(code, READY) == answers


@pytest.mark.slow
def test_measuring_a_kernel_by_hand_ends_soon(interpreted: Interpreted) -> None:
    code = """
    time_ms = triton.testing.do_bench(lambda: launch(x, y))
    result = [time_ms > 0, monitor.count < 20]
    """
    assert interpreted.run(code, READY) == [True, True]


@pytest.mark.slow
def test_what_needs_a_gpu_says_so(interpreted: Interpreted) -> None:
    result = interpreted.run("result = torch.cuda.CUDAGraph()", READY)
    assert result == {"error": "UnsupportedOnCpuError: torch.cuda.CUDAGraph needs a GPU"}
