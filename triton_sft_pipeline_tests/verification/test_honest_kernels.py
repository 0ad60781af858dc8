"""Right kernels of every shape that real ones have are verified."""

from __future__ import annotations

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

SUM_KERNEL = """
@triton.jit
def total(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(y_ptr, tl.sum(x, axis=0))
"""

SCALE_KERNEL = """
@triton.jit
def scale(x_ptr, w_ptr, y_ptr, n, columns, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    w = tl.load(w_ptr + offsets % columns, mask=mask)
    tl.store(y_ptr + offsets, x * w, mask=mask)

"""
SCALE_CALL = """
y = torch.empty_like(x)
scale[(1,)](x, {weight}, y, x.numel(), x.shape[-1], BLOCK=32)
return y
"""

TUNED = """@triton.autotune(
    configs=[triton.Config({"BLOCK": 32}), triton.Config({"BLOCK": 64})], key=["n"]
)
"""

HONEST = {
    "an element-wise kernel": (DOUBLE, DOUBLE_KERNEL),
    "a 0-d output": (
        problem("x.sum()"),
        HEADER
        + SUM_KERNEL
        + wrapper("y = torch.empty((), device=x.device)\ntotal[(1,)](x, y, x.numel(), BLOCK=32)\nreturn y"),
    ),
    "a tuple of outputs": (problem("(x * 2, x)"), pointwise_kernel("x * 2", result="(y, x)")),
    "a list where the reference gives a tuple": (problem("(x * 2, x)"), pointwise_kernel("x * 2", result="[y, x]")),
    "a dictionary of outputs": (problem("{'doubled': x * 2}"), pointwise_kernel("x * 2", result="{'doubled': y}")),
    "a bfloat16 output": (
        problem("x * 2", inputs="[torch.randn(4, 8).to(torch.bfloat16)]"),
        pointwise_kernel("x.to(tl.float32) * 2"),
    ),
    "a float16 output": (problem("x.half()"), pointwise_kernel("x", output="torch.empty_like(x, dtype=torch.float16)")),
    "an integer output": (
        problem("(x > 0).long()"),
        pointwise_kernel("(x > 0).to(tl.int64)", output="torch.empty_like(x, dtype=torch.int64)"),
    ),
    "a boolean output": (problem("x > 0"), pointwise_kernel("x > 0", output="torch.empty_like(x, dtype=torch.bool)")),
    "NaN and infinity where the reference has them": (
        problem("torch.log(x)", inputs="[torch.tensor([-1.0, 0.0, 1.0, 2.0])]"),
        pointwise_kernel("tl.log(x)"),
    ),
    "non-contiguous inputs": (
        problem("x * 2", inputs="[torch.randn(8, 4).t()]"),
        pointwise_kernel("x * 2", before="assert not x.is_contiguous()\nx = x.contiguous()"),
    ),
    "an in-place reference, computed out of place": (
        problem("F.relu(x, inplace=True)"),
        pointwise_kernel("tl.maximum(x, 0.0)"),
    ),
    "an in-place reference, computed in place": (problem("x.mul_(2)"), pointwise_kernel("x * 2", output="x")),
    "a keyword default": (
        problem("x * 2"),
        pointwise("x * 2")
        + wrapper("y = torch.empty_like(x)\npointwise[(1,)](x, y, x.numel(), BLOCK=block)\nreturn y", "x, block=32"),
    ),
    "a number among the inputs": (
        problem("x * factor", inputs="[torch.randn(4, 8), 2.0]", signature="x, factor"),
        pointwise("x * 2")
        + wrapper("y = torch.empty_like(x)\npointwise[(1,)](x, y, x.numel(), BLOCK=32)\nreturn y", "x, factor"),
    ),
    "autotune": (
        DOUBLE,
        pointwise("x * 2", decorators=TUNED)
        + wrapper("y = torch.empty_like(x)\npointwise[lambda meta: (meta['BLOCK'],)](x, y, x.numel())\nreturn y"),
    ),
    "code that insists on a GPU": (
        DOUBLE,
        pointwise_kernel(
            "x * 2",
            output='torch.empty_like(x, device="cuda")',
            before="""\
                assert x.is_cuda and x.device.type == "cuda" and torch.cuda.is_available()
                x = x.cuda()
                with torch.cuda.device(x.device):
                    torch.cuda.synchronize()
                assert triton.runtime.driver.active.utils.get_device_properties(0)["multiprocessor_count"] > 0
            """,
        ),
    ),
    "a helper class before the module": (
        problem(
            "x * 2", prelude="class Helper(nn.Module):\n    def __init__(self, size):\n        super().__init__()\n"
        ).replace("class Model", "class Doubled"),
        DOUBLE_KERNEL,
    ),
    "a helper class after the module": (
        problem("x * 2").replace("class Model", "class Doubled")
        + "\nclass Late(nn.Module):\n    def __init__(self, size):\n        super().__init__()\n",
        DOUBLE_KERNEL,
    ),
}


@pytest.mark.parametrize("case", HONEST)
def test_a_right_kernel_is_verified(case: str, judge: KernelJudge) -> None:
    pytorch_code, triton_code = HONEST[case]
    verdict = judge.verify(pytorch_code, triton_code, key=case)
    assert (verdict.verdict, verdict.key) == ("verified", case), verdict.detail
    assert verdict.correctness and verdict.fast_0
    assert verdict.contract == "name"
    assert verdict.trials == 3


SCALED = problem("x * self.gain", init="self.gain = nn.Parameter(torch.randn(8))")
NORMALISED = problem("x * self.norm.weight", init="self.norm = nn.LayerNorm(8); nn.init.normal_(self.norm.weight)")

CONTRACTS = {
    "a parameter by its name": ("name", SCALED, wrapper(SCALE_CALL.format(weight="gain"), "x, gain")),
    "a parameter by its dotted name": (
        "name",
        NORMALISED,
        wrapper(SCALE_CALL.format(weight="norm_weight"), "x, norm_weight"),
    ),
    "a parameter that comes before the input": ("name", SCALED, wrapper(SCALE_CALL.format(weight="gain"), "gain, x")),
    "a buffer by its name": (
        "name",
        problem("x * self.mask", init="self.register_buffer('mask', torch.randn(8), persistent=False)"),
        wrapper(SCALE_CALL.format(weight="mask"), "x, mask"),
    ),
    "a module's weight by its position": ("head", NORMALISED, wrapper(SCALE_CALL.format(weight="w"), "x, w")),
    "a parameter that no module calls weight, by its position": (
        "v1",
        SCALED,
        wrapper(SCALE_CALL.format(weight="w"), "x, w"),
    ),
    "a parameter with a default, by its position": ("v1", SCALED, wrapper(SCALE_CALL.format(weight="w"), "x, w=None")),
    "parameters as *args": ("v1", SCALED, wrapper(SCALE_CALL.format(weight="weights[0]"), "x, *weights")),
}


@pytest.mark.parametrize("case", CONTRACTS)
def test_weights_reach_the_wrapper_and_the_rule_is_recorded(case: str, judge: KernelJudge) -> None:
    contract, pytorch_code, code = CONTRACTS[case]
    verdict = judge.verify(pytorch_code, HEADER + SCALE_KERNEL + code)
    assert (verdict.verdict, verdict.contract) == ("verified", contract), verdict.detail


MODEL_NEW = """
class ModelNew(torch.nn.Module):
    def __init__(self, features, scale=1.0):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(features))
        self.scale = scale

    def forward(self, x):
        y = torch.empty_like(x)
        scale[(1,)](x, self.gain * self.scale, y, x.numel(), x.shape[-1], BLOCK=32)
        return y
"""


def test_model_new_gets_the_references_arguments_and_weights(judge: KernelJudge) -> None:
    pytorch_code = SCALED.replace("def __init__(self):", "def __init__(self, features, scale=1.0):")
    pytorch_code = pytorch_code.replace("torch.randn(8)", "scale * torch.randn(features)")
    pytorch_code = pytorch_code.replace("return []", "return [[8], {'scale': 1.0}]")
    verdict = judge.verify(pytorch_code, HEADER + SCALE_KERNEL + MODEL_NEW)
    assert (verdict.verdict, verdict.contract) == ("verified", "ModelNew"), verdict.detail
