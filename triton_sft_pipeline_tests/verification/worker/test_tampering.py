"""What is replaced is noticed; what honest code does is not; leftovers are counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from triton_sft_pipeline_tests.verification.worker.interpreted import PRELUDE, Interpreted

pytestmark = pytest.mark.slow

READY = (
    PRELUDE
    + """
import sys, time, builtins, threading, _thread, os, types
interpreter.install()
monitor = LaunchMonitor("interpreter")
before = tampering.fingerprint()
"""
)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreted]:
    with Interpreted(tmp_path_factory.mktemp("tampering")) as interpreted:
        yield interpreted


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        ("torch.cuda.synchronize = lambda *args: None", "torch.cuda.synchronize"),
        ("torch.cuda.Event.elapsed_time = lambda self, end: 0.0", "torch.cuda.Event.elapsed_time"),
        ("torch.cuda.Event = object", "torch.cuda.Event"),
        ("torch.allclose = lambda *args, **kwargs: True", "torch.allclose"),
        ("torch.equal = lambda *args: True", "torch.equal"),
        ("torch.empty = torch.zeros", "torch.empty"),
        ("torch.manual_seed = lambda seed: None", "torch.manual_seed"),
        ("torch.Tensor.copy_ = lambda self, other: self", "torch.Tensor.copy_"),
        ("torch.Tensor.is_cuda = property(lambda self: False)", "torch.Tensor.is_cuda"),
        ("torch.Tensor.__repr__.__code__ = (lambda self, **kwargs: '').__code__", "torch.Tensor.__repr__"),
        ("time.perf_counter = lambda: 0.0", "time.perf_counter"),
        ("del time.monotonic", "time.monotonic"),
        ("builtins.open = lambda *args: None", "builtins.open"),
        ("triton.jit = lambda function: function", "triton.jit"),
        (
            "triton.runtime.interpreter.InterpretedFunction.run = lambda *args, **kwargs: None",
            "triton.runtime.interpreter.InterpretedFunction.run",
        ),
        ("OperatorLog._add = lambda *args: None", "triton_sft_pipeline.verification.worker.operators.OperatorLog"),
        ("sys.modules['time'] = types.ModuleType('time')", "sys.modules['time']"),
        ("del sys.modules['torch.cuda']", "sys.modules['torch.cuda']"),
        ("torch.cuda.__class__ = type('Fake', (types.ModuleType,), {})", "torch.cuda.__class__"),
        ("sys.setprofile(lambda *args: None)", "sys.setprofile"),
    ],
)
def test_what_is_replaced_is_named(interpreted: Interpreted, attack: str, name: str) -> None:
    found = interpreted.run(f"{attack}\nresult = tampering.changed(before)", READY)
    assert isinstance(found, list), found
    assert any(item == name or item.startswith(f"{name}.") for item in found), found


def test_honest_code_changes_nothing(interpreted: Interpreted) -> None:
    code = """
    import math, colorsys, wave, torch.distributions, torch.fft
    import torch.nn.functional as F
    from triton.language.extra import libdevice
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    with torch.no_grad(), OperatorLog(monitor, poison=True):
        x = torch.randn(64)
        y = launch(x, torch.empty_like(x))
        F.conv1d(x.view(1, 1, 64), torch.ones(1, 1, 3))
        torch.nn.Linear(8, 8)(x.view(8, 8))
    tuned = triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 32})], key=["n"])(double)
    tuned[lambda meta: (triton.cdiv(64, meta["BLOCK"]),)](x, y, 64)
    torch.my_own_attribute = 1
    result = [tampering.changed(before), tampering.threads(), tampering.processes()]
    """
    assert interpreted.run(code, READY) == [[], 0, 0]


def test_threads_count_while_they_run_however_they_were_started(interpreted: Interpreted) -> None:
    code = """
    end = threading.Event()
    threading.Thread(target=end.wait, daemon=True).start()
    first = tampering.threads()
    running = threading.Event()
    _thread.start_new_thread(lambda: running.set() or end.wait(), ())
    running.wait()
    second = tampering.threads()
    result = [first, second]
    """
    assert interpreted.run(code, READY) == [1, 2]


def test_started_threads_are_counted_even_when_they_have_ended(interpreted: Interpreted) -> None:
    code = """
    counter = tampering.ThreadCounter()
    after = tampering.fingerprint()
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    done = _thread.allocate_lock()
    done.acquire()
    _thread.start_new_thread(done.release, ())
    done.acquire()
    result = [counter.started, tampering.changed(after)]
    """
    assert interpreted.run(code, READY) == [2, []]


def test_children_and_grandchildren_count_while_they_live(interpreted: Interpreted) -> None:
    code = """
    import subprocess
    none = tampering.processes()
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    one = tampering.processes()
    shell = subprocess.Popen(["sh", "-c", "cat; true"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    shell.stdin.write(b"x")
    shell.stdin.flush()
    shell.stdout.read(1)
    three = tampering.processes()
    child.kill()
    # Ended, not waited for: a zombie does nothing more.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    two = tampering.processes()
    shell.communicate()
    result = [none, one, three, two, tampering.processes()]
    """
    assert interpreted.run(code, READY) == [0, 1, 3, 2, 0]


def test_a_leader_finds_an_orphan_in_its_session(interpreted: Interpreted) -> None:
    code = """
    import subprocess
    os.setsid()
    read, write = os.pipe()
    kept = os.pipe()
    starter = subprocess.Popen(
        ["sh", "-c", f"cat <&{kept[0]} >/dev/null & echo started >&{write}"], pass_fds=(write, kept[0])
    )
    starter.wait()
    os.read(read, 8)
    result = tampering.processes()
    """
    assert interpreted.run(code, READY) == 1
