"""One judge for the whole room: starting one costs seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from triton_sft_pipeline.verification import KernelJudge
from triton_sft_pipeline.verification.lanes import Lane

SECRET_VARIABLE = "JUDGE_TEST_API_TOKEN"


@pytest.fixture(scope="session")
def judge() -> Iterator[KernelJudge]:
    os.environ[SECRET_VARIABLE] = "a secret"
    with KernelJudge(device="cpu", workers=2, trials=3) as judge:
        yield judge
    del os.environ[SECRET_VARIABLE]


@pytest.fixture(scope="session")
def impatient_judge() -> Iterator[KernelJudge]:
    """For kernels that never end: the limit is what such a test takes."""
    with KernelJudge(device="cpu", workers=4, trials=1, timeout_s=2.0) as judge:
        yield judge


@pytest.fixture(scope="session")
def lane(judge: KernelJudge) -> Iterator[Lane]:
    """Real children, to be asked without a judge."""
    assert judge._zygote is not None
    lane = Lane(judge._zygote, judge._limits(), None)
    yield lane
    lane.close()
