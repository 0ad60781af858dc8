"""PyTorch does the work: without a launch, beside an idle one, before a kernel that copies, or for the heavy part.

Knows nothing of attempts to hide that from the judge; those are in `disguises`.
"""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.snippets import (
    DOUBLE,
    HEADER,
    LAUNCH,
    MATMUL,
    Case,
    kernel,
    pointwise,
    problem,
    wrapper,
)

_NO_LAUNCH = frozenset({"no_kernel_launch", "torch_fallback", "forbidden_construct"})
_IDLE = frozenset({"dummy_kernel", "no_kernel_launch", "torch_fallback", "forbidden_construct"})
_COPIED = frozenset({"torch_fallback", "dummy_kernel", "forbidden_construct"})

_COPY = f"y = torch.empty_like(x)\n{LAUNCH}\nreturn y"


def _no_launch(name: str, code: str, pytorch_code: str = DOUBLE) -> Case:
    return Case(name, "no launch", pytorch_code, code, _NO_LAUNCH)


def _idle(name: str, code: str, pytorch_code: str = DOUBLE) -> Case:
    return Case(name, "dummy launch", pytorch_code, code, _IDLE)


def _copied(name: str, before: str, pytorch_code: str = DOUBLE, signature: str = "x", prelude: str = "") -> Case:
    code = kernel(f"{before}\n{_COPY}", expression="x", signature=signature, prelude=prelude)
    return Case(name, "copy-through kernel", pytorch_code, code, _COPIED)


def _partial(name: str, code: str, pytorch_code: str = MATMUL) -> Case:
    return Case(name, "partial fallback", pytorch_code, code, _COPIED)


_NEVER = wrapper("if x.numel() < 0:\n    pointwise[(1,)](x, x, 0, BLOCK=32)\nreturn x * 2")
_FAILING = """
y = torch.empty_like(x)
try:
    pointwise[(1,)](x, y, x.numel(), BLOCK=32)
except Exception:
    y = x * 2
return y
"""

WITHOUT_LAUNCH = (
    _no_launch("torch without Triton", HEADER + wrapper("return x * 2")),
    _no_launch("torch beside a kernel that is never launched", pointwise("x * 2") + wrapper("return x * 2")),
    _no_launch("a launch in a branch that is never taken", pointwise("x * 2") + _NEVER),
    _no_launch("torch after a launch that failed", pointwise("tl.no_such_function(x)") + wrapper(_FAILING)),
    _no_launch(
        "torch after a launch that is made to fail",
        pointwise("x * 2") + wrapper(_FAILING.replace("BLOCK=32", "BLOCK=33")),
    ),
    _no_launch(
        "torch under a decorator",
        kernel("return x + x", prelude="no_grad = torch.no_grad()").replace(
            "def triton_kernel_wrapper", "@torch.no_grad()\ndef triton_kernel_wrapper"
        ),
    ),
    _no_launch(
        "a decorator that replaces the wrapper by torch",
        kernel("y = torch.empty_like(x)\n" + LAUNCH + "\nreturn y").replace(
            "def triton_kernel_wrapper",
            "def fast(function):\n    return lambda x: torch.add(x, x)\n\n@fast\ndef triton_kernel_wrapper",
        ),
    ),
    _no_launch(
        "torch in a default argument",
        pointwise("x * 2") + wrapper("return compute(x, 2)", "x, compute=torch.mul"),
    ),
    _no_launch(
        "torch through a class attribute",
        kernel("return Settings.compute(x, 2)", prelude="class Settings:\n    compute = staticmethod(torch.mul)\n"),
    ),
    _no_launch(
        "torch through names put together at run time",
        kernel("return getattr(torch, 'm' + 'ul')(x, 2)"),
    ),
    _no_launch(
        "a matmul from a ModelNew that is the reference",
        HEADER
        + """
class ModelNew(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(32, 32))

    def forward(self, x):
        return torch.relu(x @ self.weight)
""",
        MATMUL,
    ),
    _no_launch("a grid of no programs", kernel("y = x * 2\npointwise[(0,)](x, y, 0, BLOCK=32)\nreturn y")),
)

WITH_A_DUMMY_LAUNCH = (
    _idle(
        "a launch into a scratch buffer",
        kernel("y = torch.empty_like(x)\n" + LAUNCH + "\nreturn x * 2"),
    ),
    _idle(
        "a launch that writes zeros to a tensor of its own",
        kernel("y = torch.zeros(1)\npointwise[(1,)](x, y, 1, BLOCK=32)\nreturn x * 2", expression="x * 0"),
    ),
    _idle(
        "a launch whose mask is empty",
        kernel("y = x * 2\npointwise[(1,)](x, y, 0, BLOCK=32)\nreturn y"),
    ),
    _idle(
        "a launch whose output torch overwrites",
        kernel("y = torch.empty_like(x)\n" + LAUNCH + "\ny.copy_(x * 2)\nreturn y", expression="x * 3"),
    ),
    _idle(
        "a launch whose output torch overwrites through an out argument",
        kernel("y = torch.empty_like(x)\n" + LAUNCH + "\nreturn torch.mul(x, 2, out=y)"),
    ),
    _idle(
        "a launch that adds zero to what torch computed",
        kernel(
            "y = x * 2\nz = torch.zeros_like(x)\npointwise[(1,)](x, z, x.numel(), BLOCK=32)\nreturn y + z",
            expression="x * 0",
        ),
    ),
    _idle(
        "one launch at import",
        kernel("return x * 2", prelude="warm = torch.zeros(32)\npointwise[(1,)](warm, warm, 32, BLOCK=32)\n"),
    ),
    _idle(
        "a launch into the memory that already holds the result",
        kernel("y = x * 2\npointwise[(1,)](y, y, x.numel(), BLOCK=32)\nreturn y", expression="x"),
    ),
    _idle(
        "a matmul by torch and a launch beside it",
        kernel("y = torch.empty_like(x)\n" + LAUNCH + "\nreturn torch.relu(x @ weight)", signature="x, weight"),
        MATMUL,
    ),
    _idle(
        "a launch whose result decides nothing",
        kernel("y = torch.empty_like(x)\n" + LAUNCH + "\nreturn torch.where(y == y, x * 2, y)"),
    ),
    _idle(
        "torch when a launch has set a flag",
        # Where launches do nothing the flag stays 0, and the output pretends to depend on the kernel.
        kernel(
            "y = torch.zeros_like(x)\n"
            + LAUNCH
            + "\nif not bool((y == 1).all()):\n    return torch.zeros_like(x)\nreturn x * 2",
            expression="x * 0 + 1",
        ),
    ),
)

COPY_THROUGH = (
    _copied("a kernel that copies what torch computed", "x = x * 2"),
    _copied("a kernel that copies a matmul", "x = torch.relu(x @ weight)", MATMUL, "x, weight"),
    _copied(
        "a kernel that copies what a module computed",
        "x = torch.nn.functional.linear(x, weight.t()).relu_()",
        MATMUL,
        "x, weight",
    ),
    _copied("a kernel that copies what einsum computed", "x = torch.einsum('ij,->ij', x, torch.tensor(2.0))"),
    _copied("a kernel that copies what a lambda computed", "x = compute(x)", prelude="compute = lambda x: x.mul(2)\n"),
    _copied(
        "a kernel that copies what a closure computed",
        "x = compute(x)",
        prelude="def make(factor):\n    def f(x):\n        return x * factor\n    return f\ncompute = make(2)\n",
    ),
    _copied("a kernel that copies what operator.mul computed", "x = operator.mul(x, 2)", prelude="import operator\n"),
    _copied("a kernel that copies what torch.ops computed", "x = torch.ops.aten.mul(x, 2)"),
    _copied(
        "a kernel that copies a softmax",
        "x = torch.softmax(x, dim=-1)",
        problem("torch.softmax(x, dim=-1)"),
    ),
    _copied(
        "a kernel that copies a sort",
        "x = torch.sort(x, dim=-1).values",
        problem("torch.sort(x, dim=-1).values"),
    ),
)

PARTLY = (
    _partial(
        "the matmul by torch and the relu by a kernel",
        kernel("x = x @ weight\n" + _COPY, expression="tl.maximum(x, 0.0)", signature="x, weight"),
    ),
    _partial(
        "the matmul as a product and a sum",
        kernel(
            "x = (x[:, :, None] * weight[None]).sum(1)\n" + _COPY,
            expression="tl.maximum(x, 0.0)",
            signature="x, weight",
        ),
    ),
    _partial(
        "the matmul in a loop of torch's dot products",
        kernel(
            "x = torch.stack([torch.mv(weight.t(), row) for row in x])\n" + _COPY,
            expression="tl.maximum(x, 0.0)",
            signature="x, weight",
        ),
    ),
    _partial(
        "a convolution by torch and its activation by a kernel",
        kernel(
            "x = torch.nn.functional.conv1d(x, conv_weight)\n" + _COPY,
            expression="tl.maximum(x, 0.0)",
            signature="x, conv_weight",
        ),
        problem(
            "F.relu(self.conv(x))",
            inputs="[torch.randn(2, 4, 16)]",
            init="self.conv = nn.Conv1d(4, 4, 3, bias=False)",
        ),
    ),
    _partial(
        "attention by torch and its scaling by a kernel",
        kernel(
            "x = torch.nn.functional.scaled_dot_product_attention(x, x, x)\n" + _COPY,
        ),
        problem("F.scaled_dot_product_attention(x, x, x) * 2", inputs="[torch.randn(1, 2, 8, 8)]"),
    ),
    _partial(
        "three quarters of a matmul by torch",
        kernel(
            """
            y = torch.empty_like(x)
            y[:12] = torch.relu(x[:12] @ weight)
            rest = x[12:].contiguous()
            products = (rest[:, :, None] * weight[None]).contiguous()
            sums = torch.empty(4, 32)
            for row in range(4):
                total = products[row].sum(0)
                pointwise[(1,)](total, sums[row], 32, BLOCK=32)
            y[12:] = sums
            return y
            """,
            expression="tl.maximum(x, 0.0)",
            signature="x, weight",
        ),
    ),
)

CASES = (*WITHOUT_LAUNCH, *WITH_A_DUMMY_LAUNCH, *COPY_THROUGH, *PARTLY)
