"""The life of the zygote and its children: how they end, what is told of it, and what is left when one is killed."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.verification.sandbox.client import ZygoteClient, ZygoteDiedError
from triton_sft_pipeline.verification.sandbox.confine import PROCESS
from triton_sft_pipeline_tests.verification.sandbox.boxes import LIMITS, answer, options, processes_named, talk, zygote

LEVELS = ["auto", PROCESS]


@pytest.fixture(scope="module", params=LEVELS)
def box(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZygoteClient]:
    with zygote(tmp_path_factory.mktemp("judge"), request.param) as client:
        yield client


def test_a_task_that_returns_ends_well(box: ZygoteClient) -> None:
    with talk(box, "print('done')") as child:
        end = child.end()
        assert child.hear() is None
    assert (end.exit_code, end.signal, end.output) == (0, None, "done\n")


def test_a_task_that_raises_is_told_by_code_and_traceback(box: ZygoteClient) -> None:
    with talk(box, "raise ValueError('no such luck')") as child:
        end = child.end()
    assert (end.exit_code, end.signal) == (70, None)
    assert end.output.endswith("ValueError: no such luck\n")


@pytest.mark.parametrize("code", ["import os; os._exit(3)", "import sys; sys.exit(3)"])
def test_an_exit_code_is_told(box: ZygoteClient, code: str) -> None:
    with talk(box, code) as child:
        assert child.end().exit_code == 3


def test_a_crash_is_told_by_its_signal(box: ZygoteClient) -> None:
    with talk(box, "import ctypes; ctypes.string_at(0)") as child:
        end = child.end()
    assert (end.exit_code, end.signal) == (None, "SIGSEGV")


def test_only_the_end_of_a_flood_is_kept_and_others_are_served_meanwhile(box: ZygoteClient) -> None:
    code = "say('up')\nimport os\nwhile True: os.write(1, b'x' * 65536)"
    with talk(box, code) as flood:
        assert flood.hear() == "up"
        assert answer(box, "say(7)") == 7
        flood.child.kill()
        assert flood.end().output == "x" * 2000


def test_killing_closes_the_socket_for_the_judge(box: ZygoteClient) -> None:
    with talk(box, "say('up'); hear()") as child:
        assert child.hear() == "up"
        child.child.kill()
        assert child.hear() is None
        assert child.end().signal == "SIGKILL"


def test_the_end_is_none_while_a_child_runs(box: ZygoteClient) -> None:
    with talk(box, "say('up'); hear()") as child:
        assert child.hear() == "up"
        assert child.child.end(0) is None


def test_closing_a_child_kills_it_and_may_be_done_twice(box: ZygoteClient) -> None:
    with talk(box, "hear()") as child:
        child.child.close()
        assert child.end().signal == "SIGKILL"


def test_children_do_not_hear_each_other(box: ZygoteClient) -> None:
    with talk(box, "say('up'); say(hear().decode())") as first:
        with talk(box, "say('up'); hear()") as second:
            assert first.hear() == second.hear() == "up"
            second.child.kill()
            second.end()
            first.go_on()
            assert first.hear() == "\n"


def test_many_threads_may_ask_at_the_same_time(box: ZygoteClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: answer(box, f"say({i} ** 2)"), range(24))) == [i**2 for i in range(24)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("victim", ["supervisor", "zygote"])
def test_a_killed_zygote_takes_its_children_along_and_is_replaced(tmp_path: Path, level: str, victim: str) -> None:
    marker = f"orphan-{tmp_path.name}-{os.getpid()}"
    code = f"""
        import os, subprocess
        started = subprocess.Popen(["{marker}", "-c", "read never < /dev/zero"], executable="/bin/sh")
        say("up")
        hear()
    """
    with zygote(tmp_path, level) as client:
        with talk(client, code) as child:
            assert child.hear() == "up"
            pid = client.pid if victim == "supervisor" else _only_child(client.pid)
            supervisor = os.pidfd_open(client.pid)
            os.kill(pid, signal.SIGKILL)
            assert child.hear() is None
            with pytest.raises(ZygoteDiedError):
                child.child.end(20)
            select.select([supervisor], [], [], 20)
            os.close(supervisor)
        assert answer(client, "say(7)") == 7
        assert client.pid != pid
        assert not processes_named(marker)


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_survives_a_killed_judge(tmp_path: Path, level: str) -> None:
    folder = tmp_path / "judge"
    folder.mkdir()
    marker = f"survivor-{tmp_path.name}-{os.getpid()}"
    code = f"""
        import os
        if os.fork() == 0:
            os.setsid()
            os.execv("/bin/sh", ["{marker}", "-c", "read never < /dev/zero"])
        open("file", "w").write("x")
        say("up")
        hear()
    """
    judge = f"""
from pathlib import Path
from triton_sft_pipeline_tests.verification.sandbox.boxes import Talk, LIMITS
from triton_sft_pipeline.verification.sandbox.client import ZygoteClient
client = ZygoteClient("cpu", Path({str(folder)!r}), options={options(level)!r})
client.wait_ready()
child = Talk(client.spawn("execute", LIMITS), {code!r})
child.hear()
print(client.pid, flush=True)
child.hear()
"""
    with subprocess.Popen([sys.executable, "-c", judge], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        supervisor = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
    assert select.select([supervisor], [], [], 20)[0], "the supervisor has not ended"
    os.close(supervisor)
    assert not folder.exists()
    assert not processes_named(marker)


def test_a_closed_client_starts_nothing(tmp_path: Path) -> None:
    with zygote(tmp_path) as client:
        pass
    with pytest.raises(ZygoteDiedError, match="closed"):
        client.spawn("execute", LIMITS)


def test_who_waits_for_an_end_hears_that_the_zygote_is_closed(tmp_path: Path) -> None:
    with zygote(tmp_path) as client:
        child = client.spawn("execute", LIMITS)
    with pytest.raises(ZygoteDiedError):
        child.end(20)
    child.close()


def test_a_zygote_that_cannot_start_says_why(tmp_path: Path) -> None:
    bad = ["--no-warm-up", "--tasks", json.dumps({"execute": "no_such_module:task"})]
    client = ZygoteClient("cpu", tmp_path, options=bad)
    try:
        with pytest.raises(PipelineError, match="no_such_module"):
            client.wait_ready()
    finally:
        client.close()


def _only_child(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)
