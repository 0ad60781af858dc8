"""The judge as a whole: what it yields, and what it says of itself. What it survives is in `test_judge_survives`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from itertools import count
from pathlib import Path

import pytest

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.verification import VERDICTS, JudgeItem, KernelJudge, Verdict
from triton_sft_pipeline.verification.lanes import Lane
from triton_sft_pipeline.verification.references import Reference
from triton_sft_pipeline_tests.verification.snippets import DOUBLE, DOUBLE_KERNEL, kernel, pointwise_kernel, problem


def test_importing_the_room_imports_neither_torch_nor_triton() -> None:
    program = "import sys, triton_sft_pipeline.verification; print({'torch', 'triton', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"


def test_the_interpreter_measures_no_speed(judge: KernelJudge) -> None:
    verdict = judge.verify(DOUBLE, DOUBLE_KERNEL)
    assert verdict.correctness
    speeds = (verdict.fast_1, verdict.fast_2, verdict.speedup, verdict.reference_time_ms, verdict.kernel_time_ms)
    assert speeds == (None,) * 5
    assert (verdict.device, verdict.backend) == ("cpu", "interpreter")
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
    assert isinstance(verdicts, Generator)
    verdicts.close()
    assert len(taken) <= 3 + judge.workers


def test_a_verdict_says_how_the_kernel_was_confined(judge: KernelJudge) -> None:
    verdict = judge.verify(DOUBLE, DOUBLE_KERNEL)
    assert verdict.isolation == judge.isolation in ("namespaces", "process")
    # There is a reason wherever it could have been better.
    assert (judge.isolation_reason == "") == (judge.isolation == "namespaces")


def test_kernels_for_one_problem_share_one_reference(judge: KernelJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[str] = []
    prepare = judge._prepare

    def counted(lane: Lane, pytorch_code: str, alone: bool) -> Reference:
        prepared.append(pytorch_code)
        return prepare(lane, pytorch_code, alone)

    monkeypatch.setattr(judge, "_prepare", counted)
    pytorch_code = problem("x * 2 # a problem that no other test uses")
    verdicts = list(judge.verify_many(JudgeItem(str(number), pytorch_code, DOUBLE_KERNEL) for number in range(4)))
    assert [verdict.verdict for verdict in verdicts] == ["verified"] * 4
    assert prepared == [pytorch_code]


CONSTANT = problem("torch.ones(4, 8) * (x.sum() < 1e9)", inputs="[torch.rand(4, 8)]")


def test_a_problem_whose_output_never_changes_proves_nothing(judge: KernelJudge) -> None:
    verdict = judge.verify(CONSTANT, pointwise_kernel("x * 0 + 1"))
    assert verdict.verdict == "degenerate_task" and "any constant would pass" in verdict.detail


def test_wrong_values_in_bfloat16_are_not_held_against_a_kernel_in_the_interpreter(judge: KernelJudge) -> None:
    verdict = judge.verify(
        problem("x.bfloat16() * 2"), pointwise_kernel("x * 3", output="torch.empty_like(x).bfloat16()")
    )
    assert verdict.verdict == "unsupported_on_cpu" and "judge this kernel on a GPU" in verdict.detail
    assert judge.verify(DOUBLE, pointwise_kernel("x * 3")).verdict == "incorrect_numerical"


SCALED = problem("x * self.scale", init="self.scale = nn.Parameter(torch.tensor(2.0))", signature="x")
BY_POSITION = """
    y = torch.empty_like(x)
    pointwise[(1,)](x, y, x.numel(), BLOCK=32)
    return y if scale is None else y * 0
"""


def test_another_way_of_binding_arguments_is_tried_when_one_is_wrong(judge: KernelJudge) -> None:
    code = kernel(BY_POSITION, signature="x, scale=None")
    verdict = judge.verify(SCALED, code)
    assert (verdict.verdict, verdict.contract) == ("verified", "head"), verdict.detail


def test_reference_and_kernel_may_be_any_text(judge: KernelJudge) -> None:
    assert judge.verify("# \udc80\n" + DOUBLE, "# \udc80\n" + DOUBLE_KERNEL).verdict in VERDICTS
    assert judge.verify(DOUBLE, "\0").verdict == "syntax_error"
    assert judge.verify(None, DOUBLE_KERNEL).verdict == judge.verify("", DOUBLE_KERNEL).verdict == "reference_error"
    assert judge.verify(DOUBLE, None).verdict == "no_code"


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


def test_what_is_no_text_is_no_code(judge: KernelJudge) -> None:
    assert judge.verify(DOUBLE, 5).verdict == "no_code"  # type: ignore[arg-type]
    assert judge.verify(5, DOUBLE_KERNEL).verdict == "reference_error"  # type: ignore[arg-type]


def test_a_judge_is_entered_once_at_a_time(judge: KernelJudge) -> None:
    with pytest.raises(PipelineError, match="in use"), judge:
        pass
    assert judge.verify(DOUBLE, DOUBLE_KERNEL).verdict == "verified"
