"""Problems and kernels in pieces, so that a test shows only what it is about."""

from __future__ import annotations

import textwrap


def problem(
    forward: str, inputs: str = "[torch.randn(4, 8)]", init: str = "pass", signature: str = "x", prelude: str = ""
) -> str:
    """A problem whose module's forward is the expression or the lines `forward`."""
    body = forward if "return " in forward else f"return {forward}"
    return f"""import torch
import torch.nn as nn
import torch.nn.functional as F

{textwrap.dedent(prelude)}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
{textwrap.indent(textwrap.dedent(init), " " * 8)}

    def forward(self, {signature}):
{textwrap.indent(textwrap.dedent(body), " " * 8)}


def get_inputs():
    return {inputs}


def get_init_inputs():
    return []
"""


HEADER = """import torch
import triton
import triton.language as tl
"""

# An element-wise kernel over a flat tensor; `%s` computes `y` from `x`.
_POINTWISE = """
{decorators}@triton.jit
def pointwise(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    tl.store(y_ptr + offsets, {expression}, mask=mask)

"""


def pointwise(expression: str, decorators: str = "") -> str:
    """A Triton kernel `pointwise(x_ptr, y_ptr, n, BLOCK)` that stores `expression` of `x`."""
    return HEADER + _POINTWISE.format(expression=expression, decorators=decorators)


def wrapper(body: str, signature: str = "x") -> str:
    """A wrapper with these lines."""
    return f"\ndef triton_kernel_wrapper({signature}):\n{textwrap.indent(textwrap.dedent(body).strip(), ' ' * 4)}\n"


def pointwise_kernel(
    expression: str, output: str = "torch.empty_like(x)", before: str = "pass", result: str = "y"
) -> str:
    """A whole kernel: `output` is what it writes to, `before` runs first, `result` is what it returns."""
    body = f"""
{textwrap.dedent(before)}
y = {output}
pointwise[(triton.cdiv(x.numel(), 32),)](x, y, x.numel(), BLOCK=32)
return {result}
"""
    return pointwise(expression) + wrapper(body)


DOUBLE = problem("x * 2")
DOUBLE_KERNEL = pointwise_kernel("x * 2")
