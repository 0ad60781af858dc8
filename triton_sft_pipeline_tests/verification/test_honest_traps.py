"""Right kernels of every shape that real ones have are verified, whatever looks odd about them."""

from __future__ import annotations

from collections import Counter

import pytest

from triton_sft_pipeline.verification import KernelJudge
from triton_sft_pipeline_tests.verification.honest import HONEST, KINDS
from triton_sft_pipeline_tests.verification.honest.binding import CONTRACTS
from triton_sft_pipeline_tests.verification.snippets import Case


@pytest.mark.parametrize("case", HONEST, ids=lambda case: case.name)
def test_a_right_kernel_is_verified(case: Case, judge: KernelJudge) -> None:
    verdict = judge.verify(case.pytorch_code, case.triton_code, key=case.name)
    assert verdict.verdict in case.verdicts, f"{verdict.verdict}: {verdict.detail}"
    assert verdict.key == case.name
    assert verdict.correctness and verdict.fast_0
    assert verdict.trials == 3
    assert verdict.contract == CONTRACTS.get(case.name, verdict.contract)


def test_every_kind_of_trap_has_a_case_and_every_case_a_name_of_its_own() -> None:
    assert set(Counter(case.kind for case in HONEST)) == KINDS
    assert len(HONEST) >= 20
    assert len({case.name for case in HONEST}) == len(HONEST)
    assert len({(case.pytorch_code, case.triton_code) for case in HONEST}) == len(HONEST)


def test_only_right_verdicts_are_allowed_and_every_recorded_rule_belongs_to_a_case() -> None:
    assert not [case.name for case in HONEST if not case.verdicts <= {"verified", "verified_hybrid"}]
    assert CONTRACTS.keys() <= {case.name for case in HONEST}
