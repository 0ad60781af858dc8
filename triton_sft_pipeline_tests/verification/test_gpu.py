"""What only a GPU can show: compilation, speed, and faults that stay with the kernel that made them."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator

import pytest

from triton_sft_pipeline.verification import KernelJudge
from triton_sft_pipeline_tests.verification.snippets import (
    DOUBLE,
    DOUBLE_KERNEL,
    HEADER,
    pointwise,
    pointwise_kernel,
    problem,
    wrapper,
)

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
    assert verdict.speedup_low is not None and verdict.speedup_high is not None
    assert verdict.speedup_low < verdict.speedup < verdict.speedup_high
    assert (verdict.fast_1, verdict.fast_2) == (verdict.speedup_low > 1.0, verdict.speedup_low >= 2.0)
    assert verdict.launch_bound and verdict.graph_speedup
    assert verdict.versions["gpu"] and verdict.versions["driver"]


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


def test_work_on_another_stream_that_nobody_waits_for_is_found(gpu_judge: KernelJudge) -> None:
    large = problem("x * 2", inputs="[torch.randn(1 << 24)]")
    body = """
    y = torch.empty_like(x)
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            pointwise[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
    return y
    """
    verdict = gpu_judge.verify(large, pointwise("x * 2") + wrapper(body))
    assert not verdict.correctness, verdict


def test_a_kernel_that_waits_for_the_gpu_is_measured_with_its_waiting(gpu_judge: KernelJudge) -> None:
    body = """
    y = torch.empty_like(x)
    pointwise[(triton.cdiv(x.numel(), 32),)](x, y, x.numel(), BLOCK=32)
    torch.cuda.synchronize()
    return y
    """
    verdict = gpu_judge.verify(DOUBLE, pointwise("x * 2") + wrapper(body))
    assert verdict.verdict == "verified" and verdict.speedup and not verdict.fast_1, verdict


def test_a_matrix_product_in_tf32_is_not_float32(gpu_judge: KernelJudge) -> None:
    product = problem("x @ x.t()", inputs="[torch.randn(64, 64)]")
    kernel = HEADER + textwrap.dedent("""
        @triton.jit
        def square(x_ptr, y_ptr, PRECISION: tl.constexpr):
            rows = tl.arange(0, 64)[:, None]
            columns = tl.arange(0, 64)[None, :]
            x = tl.load(x_ptr + rows * 64 + columns)
            tl.store(y_ptr + rows * 64 + columns, tl.dot(x, tl.trans(x), input_precision=PRECISION))

        def triton_kernel_wrapper(x):
            y = torch.empty_like(x)
            square[(1,)](x, y, PRECISION="tf32")
            return y
    """)
    assert gpu_judge.verify(product, kernel).verdict == "incorrect_numerical"
    assert gpu_judge.verify(product, kernel.replace('"tf32"', '"ieee"')).verdict == "verified"


@pytest.mark.skipif(
    os.environ.get("TRITON_SFT_TEST_GPU") != "huge", reason="takes a GPU of 80 GB or more, and a minute"
)
def test_a_right_kernel_for_gigabytes_is_verified_and_measured_within_a_minute() -> None:
    code = problem("F.hardsigmoid(x)", inputs="[torch.rand(4096, 393216)]")
    right = pointwise_kernel("tl.minimum(tl.maximum(x / 6 + 0.5, 0.0), 1.0)").replace("32)", "1024)")
    with KernelJudge(device="cuda", workers=2) as judge:
        verdict = judge.verify(code, right)
        wrong = judge.verify(code, right.replace("0.5", "0.6"))
        idle = judge.verify(code, right.replace("torch.empty_like(x)", "F.hardsigmoid(x)").replace(HEADER, HEADER + _F))
    assert (verdict.verdict, verdict.trials) == ("verified", 1), verdict
    assert verdict.speedup and verdict.wall_s < 60, verdict
    assert wrong.verdict == "incorrect_numerical", wrong
    assert idle.verdict in ("torch_fallback", "dummy_kernel"), idle


_F = "import torch.nn.functional as F\n"
