"""A sample of the cheats and honest traps, judged as on a host that gives the judge no namespaces."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from triton_sft_pipeline.verification import KernelJudge
from triton_sft_pipeline.verification import judge as judge_module
from triton_sft_pipeline_tests.verification.cheats import CHEATS
from triton_sft_pipeline_tests.verification.cheats.endings import ENDLESS
from triton_sft_pipeline_tests.verification.honest import HONEST
from triton_sft_pipeline_tests.verification.snippets import Case

pytestmark = pytest.mark.slow

_EVERY = 5
_CHEATS = [case for case in CHEATS if not case.needs_namespaces and case not in ENDLESS][::_EVERY]


@pytest.fixture(scope="session")
def plain_judge() -> Iterator[KernelJudge]:
    """A judge whose kernels get processes without namespaces."""
    client = functools.partial(judge_module.ZygoteClient, options=["--level", "process"])
    with ExitStack() as stack:
        # Undone at once: other judges of this process shall have namespaces.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(judge_module, "ZygoteClient", client)
            judge = stack.enter_context(KernelJudge(device="cpu", workers=2, trials=3))
        yield judge


def test_the_verdict_says_that_there_were_no_namespaces(plain_judge: KernelJudge) -> None:
    verdict = plain_judge.verify(HONEST[0].pytorch_code, HONEST[0].triton_code)
    assert plain_judge.isolation == verdict.isolation == "process"
    assert plain_judge.isolation_reason


@pytest.mark.parametrize("case", _CHEATS, ids=lambda case: case.name)
def test_a_cheat_is_refused_without_namespaces(case: Case, plain_judge: KernelJudge) -> None:
    verdict = plain_judge.verify(case.pytorch_code, case.triton_code)
    assert verdict.verdict in case.verdicts, verdict.detail
    assert case.mentions in verdict.detail
    assert not verdict.correctness


@pytest.mark.parametrize("case", HONEST[::_EVERY], ids=lambda case: case.name)
def test_a_right_kernel_is_verified_without_namespaces(case: Case, plain_judge: KernelJudge) -> None:
    verdict = plain_judge.verify(case.pytorch_code, case.triton_code)
    assert verdict.verdict in case.verdicts and verdict.correctness, f"{verdict.verdict}: {verdict.detail}"
