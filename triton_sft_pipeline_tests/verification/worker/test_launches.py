"""Launches are counted, announced and ablated, in the interpreter and, with fakes, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from triton_sft_pipeline_tests.verification.worker.interpreted import PRELUDE, Interpreted

pytestmark = pytest.mark.slow

INTERPRETED = PRELUDE + 'interpreter.install()\nmonitor = LaunchMonitor("interpreter")\nx = torch.arange(64.0)\n'

# Stands where CUDA's classes stand; `events` is what happened to them.
CUDA = """
from types import SimpleNamespace
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton_sft_pipeline.verification.worker.launches import LaunchMonitor

events = []

def run(self, *args, grid, warmup, **kwargs):
    if kwargs.get("wrong"):
        raise ValueError("no such kernel")
    sizes = grid({}) if callable(grid) and not warmup else grid
    events.append("compile" if warmup else "launch")
    return SimpleNamespace(_init_handles=lambda: events.append("load"))

JITFunction.run = run
CompiledKernel.__getitem__ = lambda self, grid: lambda *args: events.append("handle")
CudaDriver.clear_cache = lambda self, cache: events.append(f"inside: {monitor.inside}")
monitor = LaunchMonitor("cuda")
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreted]:
    with Interpreted(tmp_path_factory.mktemp("launches")) as interpreted:
        yield interpreted


def test_each_launch_counts_and_compiling_alone_does_not(interpreted: Interpreted) -> None:
    code = """
    y = torch.zeros(64)
    launch(x, y)
    launch(x, y)
    double.warmup(x, y, 64, BLOCK=32, grid=(1,))
    result = [monitor.count, torch.equal(y, 2 * x)]
    """
    assert interpreted.run(code, INTERPRETED) == [2, True]


def test_ablated_launches_do_nothing_and_count_nothing(interpreted: Interpreted) -> None:
    code = """
    y = torch.zeros(64)
    monitor.ablated = True
    returned = double[(2,)](x, y, 64, BLOCK=32)
    result = [monitor.count, returned, float(y.sum())]
    """
    assert interpreted.run(code, INTERPRETED) == [0, None, 0.0]


def test_a_grid_without_programs_is_no_launch(interpreted: Interpreted) -> None:
    code = """
    double[(0,)](x, x, 64, BLOCK=32)
    double[lambda meta: (0, 3)](x, x, 64, BLOCK=32)
    result = monitor.count
    """
    assert interpreted.run(code, INTERPRETED) == 0


def test_a_launch_that_raises_does_not_count(interpreted: Interpreted) -> None:
    code = """
    @triton.jit
    def broken(x_ptr):
        tl.no_such_function(x_ptr)

    try:
        broken[(1,)](x)
        result = "nothing raised"
    except Exception as error:
        result = [type(error).__name__, monitor.count]
    """
    assert interpreted.run(code, INTERPRETED) == ["InterpreterError", 0]


def test_a_grid_sees_its_arguments_as_on_a_gpu(interpreted: Interpreted) -> None:
    code = """
    y = torch.zeros(64)
    double[lambda meta: [triton.cdiv(meta["x_ptr"].numel(), meta["BLOCK"])]](x, y, 64, BLOCK=32)
    result = [monitor.count, torch.equal(y, 2 * x)]
    """
    assert interpreted.run(code, INTERPRETED) == [1, True]


def test_a_grid_that_would_take_hours_is_refused(interpreted: Interpreted) -> None:
    result = interpreted.run("result = double[(1001, 1000)](x, x, 64, BLOCK=32)", INTERPRETED)
    assert result["error"].startswith("UnsupportedOnCpuError: a grid of 1001000 programs")


def test_the_caller_hears_of_every_launch_before_it_runs(interpreted: Interpreted) -> None:
    code = """
    y, heard = torch.zeros(64), []
    monitor.before_launch = lambda: heard.append(float(y.sum()))
    launch(x, y)
    launch(x, y)
    result = heard == [0.0, 2 * float(x.sum())]
    """
    assert interpreted.run(code, INTERPRETED) is True


def test_the_arguments_of_each_launch_are_shown_as_they_are_before_it(interpreted: Interpreted) -> None:
    code = """
    y, seen = torch.zeros(64), []
    monitor.seen = lambda args, kwargs: seen.append([args[0] is x, float(args[1].sum()), args[2:], kwargs])
    launch(x, y)
    launch(x, y)
    double.warmup(x, y, 64, BLOCK=32, grid=(1,))
    total = 2 * float(x.sum())
    result = seen == [[True, 0.0, (64,), {"BLOCK": 32}], [True, total, (64,), {"BLOCK": 32}]]
    """
    assert interpreted.run(code, INTERPRETED) is True


def test_the_arguments_of_ablated_launches_and_of_those_without_programs_are_shown_too(
    interpreted: Interpreted,
) -> None:
    code = """
    seen = []
    monitor.seen = lambda args, kwargs: seen.append(len(args) + len(kwargs))
    double[(0,)](x, x, 64, BLOCK=32)
    monitor.ablated = True
    double[(1,)](x_ptr=x, y_ptr=x, n=64, BLOCK=32)
    monitor.seen = None
    launch(x, x)
    result = [seen, monitor.count]
    """
    assert interpreted.run(code, INTERPRETED) == [[4, 4], 0]


def test_only_what_triton_copies_is_inside_a_launch(interpreted: Interpreted) -> None:
    code = """
    @triton.jit
    def cheat(y_ptr, SEEN: tl.constexpr):
        SEEN.append(monitor.inside)

    seen, storage = [], type(x.untyped_storage())
    copy = storage.cpu
    storage.cpu = lambda self: seen.append(monitor.inside) or copy(self)
    double[lambda meta: seen.append(monitor.inside) or (1,)](x, x, 64, BLOCK=32)
    result = seen
    """
    assert interpreted.run(code, INTERPRETED) == [False, True]


def test_on_a_gpu_a_kernel_is_compiled_and_loaded_before_its_launch_is_announced(interpreted: Interpreted) -> None:
    code = """
    JITFunction.run(None, grid=(1,), warmup=False)
    monitor.before_launch = lambda: events.append("announced")
    JITFunction.run(None, grid=lambda meta: (1,), warmup=False)
    result = [events, monitor.count]
    """
    assert interpreted.run(code, CUDA) == [["launch", "compile", "load", "announced", "launch"], 2]


def test_on_a_gpu_only_launches_that_run_programs_count(interpreted: Interpreted) -> None:
    code = """
    JITFunction.run(None, grid=(1,), warmup=True)
    JITFunction.run(None, grid=(4, 0), warmup=False)
    JITFunction.run(None, grid=lambda meta: (0,), warmup=False)
    try:
        JITFunction.run(None, grid=(1,), warmup=False, wrong=True)
    except ValueError:
        events.append("raised")
    result = [events, monitor.count]
    """
    assert interpreted.run(code, CUDA) == [["compile", "launch", "launch", "raised"], 0]


def test_on_a_gpu_a_compiled_kernel_called_by_its_handle_counts_too(interpreted: Interpreted) -> None:
    code = """
    CompiledKernel.__getitem__(None, (2, 1, 1))(1, 2)
    monitor.ablated = True
    CompiledKernel.__getitem__(None, (2, 1, 1))(1, 2)
    JITFunction.run(None, grid=(1,), warmup=False)
    JITFunction.run(None, grid=(1,), warmup=True)
    result = [events, monitor.count]
    """
    assert interpreted.run(code, CUDA) == [["handle"], 1]


def test_on_a_gpu_the_arguments_of_launches_and_handles_are_shown(interpreted: Interpreted) -> None:
    code = """
    monitor.seen = lambda args, kwargs: events.append([list(args), kwargs])
    JITFunction.run(None, 1, grid=(1,), warmup=False, BLOCK=2)
    JITFunction.run(None, 1, grid=(1,), warmup=True)
    CompiledKernel.__getitem__(None, (2, 1, 1))(3)
    monitor.ablated = True
    CompiledKernel.__getitem__(None, (2, 1, 1))(4)
    JITFunction.run(None, 5, grid=(1,), warmup=False)
    result = events
    """
    shown = [[[1], {"BLOCK": 2}], "launch", "compile", [[3], {}], "handle", [[4], {}], [[5], {}]]
    assert interpreted.run(code, CUDA) == shown


def test_on_a_gpu_what_empties_the_cache_for_tuning_is_tritons_own(interpreted: Interpreted) -> None:
    code = """
    CudaDriver.clear_cache(None, None)
    events.append(f"after: {monitor.inside}")
    result = events
    """
    assert interpreted.run(code, CUDA) == ["inside: True", "after: False"]
