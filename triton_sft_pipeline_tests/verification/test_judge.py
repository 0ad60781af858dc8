"""The judge as a whole: what it yields, what it survives, what it leaves behind."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.verification import VERDICTS, JudgeItem, KernelJudge, Verdict
from triton_sft_pipeline_tests.verification.snippets import DOUBLE, DOUBLE_KERNEL, pointwise_kernel, problem

ENDLESS_KERNEL = pointwise_kernel("x * 2", before="while True:\n    pass")


def test_importing_the_room_imports_neither_torch_nor_triton() -> None:
    program = "import sys, triton_sft_pipeline.verification; print({'torch', 'triton', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"


def test_the_interpreter_measures_no_speed(judge: KernelJudge) -> None:
    verdict = judge.verify(DOUBLE, DOUBLE_KERNEL)
    assert verdict.correctness
    speeds = (verdict.fast_1, verdict.fast_2, verdict.speedup, verdict.reference_time_ms, verdict.kernel_time_ms)
    assert speeds == (None,) * 5
    assert (verdict.device, verdict.backend, verdict.isolation) == ("cpu", "interpreter", "process")
    assert verdict.versions.keys() >= {"python", "torch", "triton"}


def test_a_verdict_survives_json(judge: KernelJudge) -> None:
    verdict = judge.verify(DOUBLE, DOUBLE_KERNEL, key="k")
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict
    assert verdict.verdict in VERDICTS


def test_every_item_gets_its_verdict_under_its_own_key(judge: KernelJudge) -> None:
    items = [
        JudgeItem("right", DOUBLE, DOUBLE_KERNEL),
        JudgeItem("wrong", DOUBLE, pointwise_kernel("x * 3")),
        JudgeItem("none", DOUBLE, None),
    ]
    verdicts = {verdict.key: verdict.verdict for verdict in judge.verify_many(items)}
    assert verdicts == {"right": "verified", "wrong": "incorrect_numerical", "none": "no_code"}


def test_nothing_to_judge_gives_no_verdict(judge: KernelJudge) -> None:
    assert list(judge.verify_many([])) == []


def test_an_endless_stream_is_read_no_faster_than_it_is_judged(judge: KernelJudge) -> None:
    taken: list[int] = []

    def stream() -> Iterator[JudgeItem]:
        for number in count():
            taken.append(number)
            yield JudgeItem(str(number), DOUBLE, DOUBLE_KERNEL)

    verdicts = judge.verify_many(stream())
    for _ in range(3):
        assert next(verdicts).verdict == "verified"
    verdicts.close()
    assert len(taken) <= 3 + judge.workers


def test_kernels_for_one_problem_share_one_reference(judge: KernelJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[str] = []
    prepare = judge._references._prepare
    monkeypatch.setattr(judge._references, "_prepare", lambda code: (prepared.append(code), prepare(code))[1])
    pytorch_code = problem("x * 2 # a problem that no other test uses")
    verdicts = list(judge.verify_many(JudgeItem(str(number), pytorch_code, DOUBLE_KERNEL) for number in range(4)))
    assert [verdict.verdict for verdict in verdicts] == ["verified"] * 4
    assert prepared == [pytorch_code]


@pytest.mark.slow
def test_a_kernel_that_kills_the_zygote_costs_nobody_else_a_verdict(judge: KernelJudge) -> None:
    killer = pointwise_kernel("x * 2", before="import os, signal\nos.kill(os.getppid(), signal.SIGKILL)")
    items = [
        JudgeItem("killer", DOUBLE, killer),
        *(JudgeItem(str(number), DOUBLE, DOUBLE_KERNEL) for number in range(3)),
    ]
    verdicts = {verdict.key: verdict.verdict for verdict in judge.verify_many(items)}
    assert verdicts == {"killer": "infra_error", "0": "verified", "1": "verified", "2": "verified"}


def test_settings_that_make_no_sense_are_refused() -> None:
    for settings in ({"device": "tpu"}, {"trials": 0}, {"timeout_s": 0}, {"workers": 0}):
        with pytest.raises(PipelineError):
            KernelJudge(**settings)  # type: ignore[arg-type]


def test_a_judge_that_was_not_entered_says_how_to_use_it() -> None:
    with pytest.raises(PipelineError, match="context manager"):
        KernelJudge(device="cpu").verify(DOUBLE, DOUBLE_KERNEL)


def test_asking_for_a_gpu_where_there_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(PipelineError, match="No usable GPU"), KernelJudge(device="cuda"):
        pass
    assert list(tmp_path.iterdir()) == []


# Judges a kernel that ends and one that does not; says where its zygote is, and when the second one runs.
_PROGRAM = """
import sys, tempfile
from triton_sft_pipeline.verification import JudgeItem, KernelJudge
tempfile.tempdir = sys.argv[1]
pytorch_code, right, endless = (open(path).read() for path in sys.argv[2:])
with KernelJudge(device="cpu", workers=2) as judge:
    print(judge._zygote._process._process.pid, flush=True)
    items = [JudgeItem("endless", pytorch_code, endless), JudgeItem("right", pytorch_code, right)]
    for verdict in judge.verify_many(items):
        print(verdict.verdict, flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
def test_nothing_is_left_behind_when_the_judge_is_stopped(how: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    files = {"problem": DOUBLE, "right": DOUBLE_KERNEL, "endless": ENDLESS_KERNEL}
    for name, code in files.items():
        (tmp_path / name).write_text(code)
    arguments = [str(folder), *(str(tmp_path / name) for name in files)]
    judge = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert judge.stdout is not None
    zygote = os.pidfd_open(int(judge.stdout.readline()))
    assert judge.stdout.readline() == "verified\n"
    judge.send_signal(how)
    judge.wait(20)
    # A process's descriptor is readable once it has ended.
    assert select.select([zygote], [], [], 20)[0], "the zygote outlives its judge"
    os.close(zygote)
    judge.stdout.close()
    assert list(folder.iterdir()) == []
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in _content(path)]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
