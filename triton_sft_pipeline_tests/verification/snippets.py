"""Problems and kernels in pieces, so that a test shows only what it is about."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A problem, a kernel for it, and what the judge must say.

    Attributes:
        name: a few words that say what the kernel does; the test's id.
        kind: which kind of attack, mistake or trap it is.
        pytorch_code: the problem.
        triton_code: the kernel.
        verdicts: the names of the verdicts that are right; any of them will do.
        mentions: what the verdict's sentence must contain.
        needs_namespaces: the judge can only stop it where the host gives it namespaces. Such a kernel is right when
            its attack succeeds, and raises when it does not.
    """

    name: str
    kind: str
    pytorch_code: str
    triton_code: str
    verdicts: frozenset[str]
    mentions: str = ""
    needs_namespaces: bool = False


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
LAUNCH = "pointwise[(triton.cdiv(x.numel(), 32),)](x, y, x.numel(), BLOCK=32)"
# The body of a wrapper that is right.
CALL = f"y = torch.empty_like(x)\n{LAUNCH}\nreturn y"
# A contraction and, beside it, a cheap element-wise part.
MATMUL = problem(
    "F.relu(x @ self.weight)",
    inputs="[torch.randn(16, 32)]",
    init="self.weight = nn.Parameter(torch.randn(32, 32))",
)


def kernel(body: str, expression: str = "x * 2", signature: str = "x", prelude: str = "") -> str:
    """The kernel `pointwise` for an expression, lines for the module, and a wrapper with the lines `body`."""
    return pointwise(expression) + textwrap.dedent(prelude) + "\n" + wrapper(body, signature)
