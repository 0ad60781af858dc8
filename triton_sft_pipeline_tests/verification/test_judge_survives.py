"""What the judge survives, how soon it ends what never ends, and what it leaves behind."""

from __future__ import annotations

import functools
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.verification import JudgeItem, KernelJudge, Verdict
from triton_sft_pipeline.verification import judge as module
from triton_sft_pipeline.verification.sandbox.client import ZygoteClient, ZygoteDiedError
from triton_sft_pipeline_tests.verification.sandbox.boxes import processes_named
from triton_sft_pipeline_tests.verification.snippets import DOUBLE, DOUBLE_KERNEL, pointwise_kernel

LIMIT_S = 2.0
ENDLESS = pointwise_kernel("x * 2", before="while True:\n    pass")
HANGS = {
    "in the wrapper": ENDLESS,
    "at import": DOUBLE_KERNEL + "\nwhile True:\n    pass\n",
    "in the Triton kernel": DOUBLE_KERNEL.replace(
        "    x = tl.load", "    while n > 0:\n        mask = mask & mask\n    x = tl.load"
    ),
}
DYING = {
    "endless": ENDLESS,
    "crashing": pointwise_kernel("x * 2", before="import ctypes\nctypes.string_at(0)"),
    "exiting": pointwise_kernel("x * 2", before="import os\nos._exit(0)"),
    "flooding its output": pointwise_kernel("x * 2", before="import os\nwhile True:\n    os.write(1, b'x' * 65536)"),
    "flooding its socket": pointwise_kernel("x * 2", before="import os\nwhile True:\n    os.write(3, b'x' * 65536)"),
}


@pytest.fixture
def without_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate would refuse most of these unseen."""
    monkeypatch.setattr(module, "inspect_source", lambda code: None)


def by_key(judge: KernelJudge, codes: dict[str, str]) -> dict[str, Verdict]:
    items = (JudgeItem(key, DOUBLE, code) for key, code in codes.items())
    return {verdict.key: verdict for verdict in judge.verify_many(items)}


@pytest.mark.slow
def test_a_hang_ends_within_a_second_of_its_limit_wherever_it_is(impatient_judge: KernelJudge) -> None:
    assert impatient_judge.verify(DOUBLE, DOUBLE_KERNEL).verdict == "verified"
    verdicts = by_key(impatient_judge, HANGS)
    assert {key: verdict.verdict for key, verdict in verdicts.items()} == dict.fromkeys(HANGS, "timeout")
    assert not {key: verdict.wall_s for key, verdict in verdicts.items() if not LIMIT_S <= verdict.wall_s < LIMIT_S + 1}
    assert not any(verdict.is_conclusive for verdict in verdicts.values())


@pytest.mark.slow
def test_every_honest_kernel_gets_its_verdict_among_those_that_die(
    impatient_judge: KernelJudge, without_gate: None
) -> None:
    honest = {f"honest {number}": DOUBLE_KERNEL for number in range(6)}
    verdicts = {key: verdict.verdict for key, verdict in by_key(impatient_judge, DYING | honest).items()}
    assert {key: verdict for key, verdict in verdicts.items() if key in honest} == dict.fromkeys(honest, "verified")
    assert {key: verdict for key, verdict in verdicts.items() if key in DYING} == {
        "endless": "timeout",
        "crashing": "crash",
        "exiting": "early_exit",
        "flooding its output": "timeout",
        "flooding its socket": "forged_result",
    }


def test_a_kernel_cannot_kill_what_started_it(judge: KernelJudge, without_gate: None) -> None:
    assert judge._zygote is not None
    before = judge._zygote.pid
    killer = pointwise_kernel("x * 2", before="import os, signal\nos.kill(os.getppid(), signal.SIGKILL)")
    verdicts = by_key(judge, {"killer": killer, "honest": DOUBLE_KERNEL})
    assert verdicts["honest"].verdict == "verified"
    # Where it has a namespace of its own there is nothing to kill.
    assert verdicts["killer"].verdict in ("verified", "runtime_error", "sandbox_violation")
    assert judge._zygote.pid == before


@pytest.mark.slow
def test_a_zygote_that_dies_costs_nobody_a_verdict(judge: KernelJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    client = judge._zygote
    assert client is not None
    first = client.pid
    examine = module.examine

    def examine_after_a_death(*args: Any) -> Any:
        if client.pid == first:
            zygote = os.pidfd_open(first)
            os.kill(first, signal.SIGKILL)
            assert select.select([zygote], [], [], 20)[0]
            os.close(zygote)
        return examine(*args)

    monkeypatch.setattr(module, "examine", examine_after_a_death)
    verdicts = by_key(judge, {str(number): DOUBLE_KERNEL for number in range(3)})
    assert {key: verdict.verdict for key, verdict in verdicts.items()} == dict.fromkeys("012", "verified")
    assert client.pid != first


def test_a_kernel_on_which_the_judge_fails_twice_gets_a_verdict_of_its_own(
    judge: KernelJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    examine = module.examine
    deaths: list[str] = []

    def examine_or_die(peer: Any, reference: Any, triton_code: str, *args: Any) -> Any:
        if "unlucky" in triton_code:
            deaths.append(triton_code)
            raise ZygoteDiedError("it died")
        return examine(peer, reference, triton_code, *args)

    monkeypatch.setattr(module, "examine", examine_or_die)
    verdicts = by_key(judge, {"unlucky": DOUBLE_KERNEL + "# unlucky\n", "other": DOUBLE_KERNEL})
    assert {key: verdict.verdict for key, verdict in verdicts.items()} == {
        "unlucky": "infra_error",
        "other": "verified",
    }
    assert "it died" in verdicts["unlucky"].detail and not verdicts["unlucky"].is_conclusive
    assert len(deaths) == 2


@pytest.mark.slow
def test_without_namespaces_kernels_are_judged_all_the_same_and_nothing_is_left(
    without_gate: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "ZygoteClient", functools.partial(ZygoteClient, options=["--level", "process"]))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Another process group, which killing the kernel's own would miss.
    started = f"import subprocess\nsubprocess.Popen(['sleep', '1000.{os.getpid()}'], start_new_session=True)"
    codes = {
        "honest": DOUBLE_KERNEL,
        "wrong": pointwise_kernel("x * 3"),
        "crashing": DYING["crashing"],
        "starting": pointwise_kernel("x * 2", before=started),
        "killing": pointwise_kernel("x * 2", before="import os\nos.kill(os.getppid(), 9)"),
        "last": DOUBLE_KERNEL,
    }
    with KernelJudge(device="cpu", workers=2, trials=2) as judge:
        assert judge.isolation == "process" and judge.isolation_reason
        verdicts = by_key(judge, codes)
        assert {verdict.isolation for verdict in verdicts.values()} == {"process"}
        assert processes_named(str(tmp_path)) != [] and list(tmp_path.iterdir()) != []
    found = {key: verdict.verdict for key, verdict in verdicts.items()}
    assert (found["honest"], found["last"]) == ("verified", "verified")
    assert (found["wrong"], found["crashing"]) == ("incorrect_numerical", "crash")
    assert found["starting"] in ("process_leak", "runtime_error", "sandbox_violation")
    assert found["killing"] in ("runtime_error", "sandbox_violation", "infra_error")
    assert list(tmp_path.iterdir()) == []
    assert processes_named(str(tmp_path)) == processes_named(f"1000.{os.getpid()}") == []


# Judges a kernel that ends and one that does not; says where its zygote is, and when the second one runs.
_PROGRAM = """
import sys, tempfile
from triton_sft_pipeline.verification import JudgeItem, KernelJudge
tempfile.tempdir = sys.argv[1]
pytorch_code, right, endless = (open(path).read() for path in sys.argv[2:])
with KernelJudge(device="cpu", workers=2) as judge:
    print(judge._zygote.pid, flush=True)
    items = [JudgeItem("endless", pytorch_code, endless), JudgeItem("right", pytorch_code, right)]
    for verdict in judge.verify_many(items):
        print(verdict.verdict, flush=True)
"""


class Program:
    """A judge in a process of its own, with a folder of its own."""

    def __init__(self, place: Path) -> None:
        self.folder = place / "temporary"
        self.folder.mkdir(parents=True)
        files = {"problem": DOUBLE, "right": DOUBLE_KERNEL, "endless": ENDLESS}
        for name, code in files.items():
            (place / name).write_text(code)
        arguments = [str(self.folder), *(str(place / name) for name in files)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def stop(self, how: signal.Signals) -> None:
        self.process.send_signal(how)
        self.process.communicate(timeout=20)


@pytest.mark.slow
def test_nothing_is_left_behind_when_the_judge_is_stopped(tmp_path: Path) -> None:
    programs = {how: Program(tmp_path / how.name) for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)}
    for how, program in programs.items():
        zygote = os.pidfd_open(int(program.line()))
        assert program.line() == "verified\n"
        program.stop(how)
        # A process's descriptor is readable once it has ended.
        assert select.select([zygote], [], [], 20)[0], f"the zygote outlives {how.name}"
        os.close(zygote)
        assert list(program.folder.iterdir()) == []
        assert processes_named(str(program.folder)) == []
