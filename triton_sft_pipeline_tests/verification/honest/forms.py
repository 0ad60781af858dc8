"""Inputs and outputs of every form: structures, dtypes, strides, NaN, empty tensors, references that work in place."""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.snippets import (
    DOUBLE,
    HEADER,
    LAUNCH,
    Case,
    kernel,
    pointwise_kernel,
    problem,
    wrapper,
)

VERIFIED = frozenset({"verified"})

SUM_KERNEL = """
@triton.jit
def total(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(y_ptr, tl.sum(x, axis=0))
"""
_TOTAL = "total[(1,)](x, y, x.numel(), BLOCK=32)\nreturn y"

_STRIDED_KERNEL = """
@triton.jit
def strided(x_ptr, y_ptr, rows, columns, row_step, column_step, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < rows * columns
    x = tl.load(x_ptr + offsets // columns * row_step + offsets % columns * column_step, mask=mask)
    tl.store(y_ptr + offsets, x * 2, mask=mask)
"""
_STRIDED = (
    HEADER
    + _STRIDED_KERNEL
    + wrapper(
        "y = torch.empty(x.shape, device=x.device)\n"
        "strided[(1,)](x, y, *x.shape, *x.stride(), BLOCK=triton.next_power_of_2(x.numel()))\nreturn y"
    )
)


def _case(name: str, kind: str, pytorch_code: str, code: str) -> Case:
    return Case(name, kind, pytorch_code, code, VERIFIED)


def _typed(name: str, forward: str, expression: str, dtype: str, inputs: str = "[torch.randn(4, 8)]") -> Case:
    code = pointwise_kernel(expression, output=f"torch.empty_like(x, dtype=torch.{dtype})")
    return _case(name, "another dtype", problem(forward, inputs=inputs), code)


def _strided(name: str, inputs: str) -> Case:
    return _case(name, "non-contiguous input", problem("x * 2", inputs=inputs), _STRIDED)


CASES = (
    _case("a tuple of outputs", "tuple of outputs", problem("(x * 2, x)"), pointwise_kernel("x * 2", result="(y, x)")),
    _case(
        "a list where the reference gives a tuple",
        "tuple of outputs",
        problem("(x * 2, x)"),
        pointwise_kernel("x * 2", result="[y, x]"),
    ),
    _case(
        "a tuple with a number and nothing in it",
        "tuple of outputs",
        problem("(x * 2, 3, None)"),
        pointwise_kernel("x * 2", result="(y, 3, None)"),
    ),
    _case(
        "one tensor twice, as in the reference",
        "tuple of outputs",
        problem("y = x * 2\nreturn y, y"),
        pointwise_kernel("x * 2", result="(y, y)"),
    ),
    _case(
        "a dictionary of outputs",
        "dictionary of outputs",
        problem("{'doubled': x * 2}"),
        pointwise_kernel("x * 2", result="{'doubled': y}"),
    ),
    _case(
        "a dictionary with tuples in it",
        "dictionary of outputs",
        problem("{'a': (x * 2, x), 'b': {'c': x}}"),
        pointwise_kernel("x * 2", result="{'a': (y, x), 'b': {'c': x}}"),
    ),
    _case(
        "a 0-d output",
        "0-d output",
        problem("x.sum()"),
        HEADER + SUM_KERNEL + wrapper("y = torch.empty((), device=x.device)\n" + _TOTAL),
    ),
    _case(
        "a 0-d output that is a view of one value",
        "0-d output",
        problem("x.sum()"),
        HEADER + SUM_KERNEL + wrapper("y = torch.empty(1, device=x.device)\n" + _TOTAL + ".squeeze(0)"),
    ),
    _case(
        "a 0-d output as a reshaped value",
        "0-d output",
        problem("x.sum()"),
        HEADER + SUM_KERNEL + wrapper("y = torch.zeros(1, dtype=x.dtype)\n" + _TOTAL + ".reshape(())"),
    ),
    _case(
        "a number as output",
        "0-d output",
        problem("x.sum().item()"),
        HEADER + SUM_KERNEL + wrapper("y = torch.empty(1)\n" + _TOTAL + ".item()"),
    ),
    _typed("a float16 output", "x.half()", "x", "float16"),
    _typed("float16 in and out", "x * 2", "x * 2", "float16", "[torch.randn(4, 8).half()]"),
    _typed("a bfloat16 output", "x * 2", "x.to(tl.float32) * 2", "bfloat16", "[torch.randn(4, 8).to(torch.bfloat16)]"),
    _typed("bfloat16, copied", "x.clone()", "x", "bfloat16", "[torch.randn(4, 8).to(torch.bfloat16)]"),
    _typed("a float64 output", "x.double() * 2", "x.to(tl.float64) * 2", "float64"),
    _typed("an int64 output", "(x > 0).long()", "(x > 0).to(tl.int64)", "int64"),
    _typed("an int32 output", "(x * 10).int()", "(x * 10).to(tl.int32)", "int32"),
    _typed("a uint8 output", "(x > 0).to(torch.uint8)", "(x > 0).to(tl.uint8)", "uint8"),
    _typed("a boolean output", "x > 0", "x > 0", "bool"),
    _typed("integers in and out", "x * 3", "x * 3", "int64", "[torch.randint(-50, 50, (4, 8))]"),
    _typed("an integer division", "x // 3", "x // 3", "int64", "[torch.randint(0, 50, (4, 8))]"),
    _typed("truth values in", "~x", "x == 0", "bool", "[torch.rand(4, 8) > 0.5]"),
    _case(
        "NaN and infinity where the reference has them",
        "non-finite reference",
        problem("torch.log(x)", inputs="[torch.cat([torch.tensor([-1.0, 0.0]), torch.rand(6)])]"),
        pointwise_kernel("tl.log(x)"),
    ),
    _case(
        "minus infinity from a mask",
        "non-finite reference",
        problem("x.masked_fill(x > 0, float('-inf'))"),
        pointwise_kernel("tl.where(x > 0, float('-inf'), x)"),
    ),
    _case(
        "NaN in the input",
        "non-finite reference",
        problem("x * 2", inputs="[torch.where(torch.rand(4, 8) > 0.5, torch.randn(4, 8), float('nan'))]"),
        pointwise_kernel("x * 2"),
    ),
    _case(
        "NaN for half of the inputs",
        "non-finite reference",
        problem("torch.sqrt(x)"),
        pointwise_kernel("tl.sqrt(x)"),
    ),
    _case(
        "a transposed input, made contiguous",
        "non-contiguous input",
        problem("x * 2", inputs="[torch.randn(8, 4).t()]"),
        pointwise_kernel("x * 2", before="assert not x.is_contiguous()\nx = x.contiguous()"),
    ),
    _strided("a transposed input, read by its strides", "[torch.randn(8, 4).t()]"),
    _strided("every other column", "[torch.randn(4, 16)[:, ::2]]"),
    _strided("a slice from the middle", "[torch.randn(8, 16)[2:6, 4:12]]"),
    _strided("an expanded input", "[torch.randn(1, 8).expand(4, 8)]"),
    _case(
        "channels last",
        "non-contiguous input",
        problem("x * 2", inputs="[torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)]"),
        pointwise_kernel("x * 2", before="x = x.contiguous()"),
    ),
    _case(
        "an output with other strides than the reference's",
        "non-contiguous input",
        problem("x.t() * 2"),
        pointwise_kernel("x * 2", result="y.t()"),
    ),
    _case(
        "an expanded output",
        "non-contiguous input",
        problem("x.sum().expand(4, 8)"),
        HEADER + SUM_KERNEL + wrapper("y = torch.empty(1, 1)\n" + _TOTAL + ".expand(4, 8)"),
    ),
    _case(
        "an empty tensor",
        "empty tensor",
        problem("(x * 2, x[:0])"),
        pointwise_kernel("x * 2", result="(y, x.new_empty((0, 8)))"),
    ),
    _case(
        "an empty input beside another",
        "empty tensor",
        problem("x * 2", inputs="[torch.randn(4, 8), torch.empty(0, 8)]", signature="x, rest"),
        kernel(f"y = torch.empty_like(x)\n{LAUNCH}\nassert rest.numel() == 0\nreturn y", signature="x, rest"),
    ),
    _case(
        "an in-place reference, computed out of place",
        "in-place reference",
        problem("F.relu(x, inplace=True)"),
        pointwise_kernel("tl.maximum(x, 0.0)"),
    ),
    _case(
        "an in-place reference, computed in place",
        "in-place reference",
        problem("x.mul_(2)"),
        pointwise_kernel("x * 2", output="x"),
    ),
    _case(
        "a reference that returns a view of its input",
        "in-place reference",
        problem("(x.view(8, 4), x * 2)"),
        pointwise_kernel("x * 2", result="(x.view(8, 4), y)"),
    ),
    _case(
        "a view of the output in another shape",
        "0-d output",
        problem("(x * 2).view(2, 16)"),
        pointwise_kernel("x * 2", result="y.reshape(2, 16)"),
    ),
    _case(
        "inputs that are never negative",
        "operation",
        problem("x * 2", inputs="[torch.rand(4, 8)]"),
        pointwise_kernel("x * 2"),
    ),
    _case("an element-wise kernel", "operation", DOUBLE, pointwise_kernel("x * 2")),
)
