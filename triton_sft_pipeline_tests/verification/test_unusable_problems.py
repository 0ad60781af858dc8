"""Problems that cannot be judged get a verdict of their own, whatever kernel comes with them."""

from __future__ import annotations

import pytest

from triton_sft_pipeline.verification import KernelJudge
from triton_sft_pipeline_tests.verification.snippets import DOUBLE_KERNEL, problem

UNUSABLE = {
    "a reference that fails": (
        "reference_error",
        "no luck",
        problem("raise_(x)", prelude="def raise_(x):\n    raise ValueError('no luck')"),
    ),
    "a reference that exits": (
        "reference_error",
        "exit code",
        problem("exit(x)", prelude="import os\ndef exit(x):\n    os._exit(3)"),
    ),
    "a reference of dice": ("degenerate_task", "two answers", problem("x + torch.rand_like(x)")),
    "no code": ("reference_error", "no PyTorch code", ""),
    "code that does not parse": ("reference_error", "SyntaxError", "class Model("),
    "no module": ("reference_error", "no nn.Module", "import torch\ndef get_inputs():\n    return [torch.ones(2)]\n"),
    "no inputs": ("reference_error", "get_inputs", "import torch.nn as nn\nclass Model(nn.Module):\n    pass\n"),
    "an output that cannot be compared": ("reference_error", "object of type", problem("object()")),
    "inputs beyond the interpreter": (
        "unsupported_on_cpu",
        "4e+08 elements",
        problem("x * 2", inputs="[torch.rand(20000, 20000)]"),
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_problem_that_cannot_be_judged_is_not_the_kernels_fault(case: str, judge: KernelJudge) -> None:
    expected, mentioned, pytorch_code = UNUSABLE[case]
    verdict = judge.verify(pytorch_code, DOUBLE_KERNEL)
    assert verdict.verdict == expected, verdict.detail
    assert mentioned in verdict.detail
