"""Code that cannot be run or fails when it is, and what Triton's interpreter has no means to judge. No malice here."""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.snippets import (
    CALL,
    DOUBLE,
    DOUBLE_KERNEL,
    Case,
    pointwise,
    pointwise_kernel,
    problem,
    wrapper,
)


def _broken(name: str, verdict: str, mentions: str, code: str, pytorch_code: str = DOUBLE) -> Case:
    return Case(name, "broken code", pytorch_code, code, frozenset({verdict}), mentions)


def _beyond(name: str, mentions: str, code: str, pytorch_code: str = DOUBLE) -> Case:
    verdicts = frozenset({"unsupported_on_cpu"})
    return Case(name, "beyond the interpreter", pytorch_code, code, verdicts, mentions)


_OTHER_WEIGHTS = pointwise("x") + "class ModelNew(torch.nn.Module):\n    def forward(self, x):\n        return x\n"

CASES = (
    _broken("a syntax error", "syntax_error", "Line 2", "import torch\ndef triton_kernel_wrapper(x) return x"),
    _broken("an answer in prose", "syntax_error", "", "Here is the kernel that you asked for:\n" + DOUBLE_KERNEL),
    _broken("a fence of Markdown", "syntax_error", "", "```python\n" + DOUBLE_KERNEL + "```\n"),
    _broken("an indentation that is off", "syntax_error", "", DOUBLE_KERNEL.replace("    return y", "  return y")),
    _broken("code that is cut off", "syntax_error", "", DOUBLE_KERNEL[: DOUBLE_KERNEL.rindex("(")] + "("),
    _broken("three dots", "missing_wrapper", "triton_kernel_wrapper", "..."),
    _broken("no wrapper", "missing_wrapper", "triton_kernel_wrapper", pointwise("x * 2")),
    _broken(
        "a wrapper of another name",
        "missing_wrapper",
        "triton_kernel_wrapper",
        DOUBLE_KERNEL.replace("triton_kernel_wrapper", "kernel_wrapper"),
    ),
    _broken("no code", "no_code", "no kernel code", "  \n"),
    _broken("a missing library", "import_error", "no_such_library", "import no_such_library\n" + DOUBLE_KERNEL),
    _broken(
        "a missing name of a library",
        "import_error",
        "no_such_name",
        "from triton.language import no_such_name\n" + DOUBLE_KERNEL,
    ),
    _broken(
        "an undefined function in a kernel",
        "compile_error",
        "no_such_function",
        pointwise_kernel("tl.no_such_function(x)"),
    ),
    _broken(
        "a range that is no power of two",
        "compile_error",
        "power of 2",
        pointwise("x * 2") + wrapper(CALL.replace("BLOCK=32", "BLOCK=33")),
    ),
    _broken(
        "an exception",
        "runtime_error",
        "line 14 of kernel.py: ValueError: no",
        pointwise_kernel("x * 2", before="raise ValueError('no')"),
    ),
    _broken("an exception at import", "runtime_error", "ZeroDivisionError", DOUBLE_KERNEL + "\n1 / 0\n"),
    _broken(
        "a name that nothing defines", "runtime_error", "NameError", DOUBLE_KERNEL.replace("x.numel()", "count(x)")
    ),
    _broken(
        "a recursion without end",
        "runtime_error",
        "Recursion",
        DOUBLE_KERNEL + wrapper("return triton_kernel_wrapper(x)"),
    ),
    _broken(
        "a parameter that nothing fills", "contract_error", "unknown", pointwise("x * 2") + wrapper(CALL, "x, unknown")
    ),
    _broken(
        "a ModelNew with other weights",
        "contract_error",
        "state_dict",
        _OTHER_WEIGHTS,
        problem("x * self.gain", init="self.gain = nn.Parameter(torch.ones(8))"),
    ),
    _beyond(
        "a grid that is too large for the interpreter",
        "2000000 programs",
        pointwise("x * 2") + wrapper(CALL.replace("[(triton.cdiv(x.numel(), 32),)]", "[(2000, 1000)]")),
    ),
    _beyond(
        "a library function that needs a GPU",
        "libdevice.tanh",
        "from triton.language.extra import libdevice\n" + pointwise_kernel("libdevice.tanh(x)"),
        problem("torch.tanh(x)"),
    ),
    _beyond(
        "arithmetic in bfloat16",
        "bfloat16",
        pointwise_kernel("x + x"),
        problem("x + x", inputs="[torch.randn(4, 8).to(torch.bfloat16)]"),
    ),
)
