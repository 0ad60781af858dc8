"""What only a GPU can show: compilation, speed, and faults that stay with the kernel that made them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from triton_sft_pipeline.verification import KernelJudge
from triton_sft_pipeline_tests.verification.snippets import DOUBLE, DOUBLE_KERNEL, pointwise_kernel, problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("TRITON_SFT_TEST_GPU"), reason="TRITON_SFT_TEST_GPU is not set"),
]


@pytest.fixture(scope="module")
def gpu_judge() -> Iterator[KernelJudge]:
    with KernelJudge(device="cuda", workers=2, trials=2) as judge:
        yield judge


def test_speed_is_measured_and_the_flags_follow_from_it(gpu_judge: KernelJudge) -> None:
    verdict = gpu_judge.verify(DOUBLE, DOUBLE_KERNEL)
    assert (verdict.verdict, verdict.backend, verdict.device) == ("verified", "cuda", "cuda"), verdict.detail
    assert verdict.speedup and verdict.reference_time_ms and verdict.kernel_time_ms
    assert verdict.speedup == pytest.approx(verdict.reference_time_ms / verdict.kernel_time_ms)
    assert (verdict.fast_1, verdict.fast_2) == (verdict.speedup > 1.0, verdict.speedup >= 2.0)
    assert verdict.versions["gpu"]


def test_one_kernel_for_three_passes_over_memory_is_faster(gpu_judge: KernelJudge) -> None:
    slow = problem("((x * 2) + 1) * 3", inputs="[torch.randn(1 << 24)]")
    fused = pointwise_kernel("(x * 2 + 1) * 3").replace("32", "1024")
    verdict = gpu_judge.verify(slow, fused)
    assert verdict.fast_1, verdict


def test_a_wrong_kernel_is_not_fast(gpu_judge: KernelJudge) -> None:
    verdict = gpu_judge.verify(DOUBLE, pointwise_kernel("x * 3"))
    assert (verdict.verdict, verdict.fast_1, verdict.fast_2, verdict.speedup) == (
        "incorrect_numerical",
        False,
        False,
        None,
    )


def test_what_the_compiler_refuses_is_a_compile_error(gpu_judge: KernelJudge) -> None:
    verdict = gpu_judge.verify(DOUBLE, pointwise_kernel("tl.no_such_function(x)"))
    assert verdict.verdict == "compile_error", verdict.detail


def test_an_illegal_access_costs_the_next_kernel_nothing(gpu_judge: KernelJudge) -> None:
    wild = DOUBLE_KERNEL.replace("y_ptr + offsets", "y_ptr + offsets + (1 << 40)")
    assert gpu_judge.verify(DOUBLE, wild).verdict in ("runtime_error", "crash")
    assert gpu_judge.verify(DOUBLE, DOUBLE_KERNEL).verdict == "verified"
