"""Outputs of the right form with wrong values, some of them only for inputs that few would try."""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.honest.likenesses import POOLED, pool_kernel
from triton_sft_pipeline_tests.verification.snippets import DOUBLE, Case, kernel, pointwise_kernel, problem

_WRONG = frozenset({"incorrect_numerical"})
_CONSTANT = frozenset({"incorrect_numerical", "degenerate_task", "no_kernel_launch", "dummy_kernel"})

_RAND = "[torch.rand(4, 8)]"


def _other(name: str, pytorch_code: str, code: str, mentions: str = "the output") -> Case:
    return Case(name, "other values", pytorch_code, code, _WRONG, mentions)


def _partial(name: str, forward: str, expression: str, inputs: str = _RAND) -> Case:
    """Right for the inputs that the problem draws, wrong for negative ones."""
    return Case(name, "right for some inputs", problem(forward, inputs=inputs), pointwise_kernel(expression), _WRONG)


def _constant(name: str, forward: str, expression: str, inputs: str = "[torch.randn(4, 8)]") -> Case:
    return Case(name, "constant output", problem(forward, inputs=inputs), pointwise_kernel(expression), _CONSTANT)


CASES = (
    _other("everything a little off", DOUBLE, pointwise_kernel("x * 2 + 0.01"), "32 of 32 values"),
    _other("one wrong value", DOUBLE, pointwise_kernel("tl.where(offsets == 7, x * 2 + 1, x * 2)"), "1 of 32 values"),
    _other("another factor", DOUBLE, pointwise_kernel("x * 2.01")),
    _other("the other sign", DOUBLE, pointwise_kernel("x * -2")),
    _other(
        "computed in half precision",
        problem("x * 1.001"),
        pointwise_kernel("(x.to(tl.float16) * 1.001)", "torch.empty_like(x)"),
    ),
    _other(
        "an integer off by one",
        problem("(x > 0).long()"),
        pointwise_kernel("(x > 0).to(tl.int64) + 1", output="torch.empty_like(x, dtype=torch.int64)"),
        "differs in",
    ),
    _other(
        "one wrong boolean",
        problem("x > 0"),
        pointwise_kernel("(x > 0) ^ (offsets == 3)", output="torch.empty_like(x, dtype=torch.bool)"),
    ),
    _other(
        "a bias that is forgotten",
        problem("x * 2 + self.bias", init="self.bias = nn.Parameter(torch.ones(8))"),
        pointwise_kernel("x * 2"),
    ),
    _other("the values in reverse order", DOUBLE, pointwise_kernel("x * 2", result="y.flip(0)")),
    _other(
        "a transposed square",
        problem("x * 2", inputs="[torch.randn(8, 8)]"),
        pointwise_kernel("x * 2", result="y.t()"),
    ),
    _other(
        "a last row that is left at zero",
        DOUBLE,
        pointwise_kernel("tl.where(offsets < 24, x * 2, 0.0)", output="torch.zeros_like(x)"),
        "8 of 32 values",
    ),
    _other("one number with the wrong value", problem("x.sum().item()"), pointwise_kernel("x", result="0.5")),
    Case(
        "a number that says it equals every other",
        "lazy output",
        problem("x.sum().item()"),
        kernel(
            "y = torch.empty_like(x)\npointwise[(1,)](x, y, x.numel(), BLOCK=32)\nreturn Agreeable(0.5)",
            prelude="""
            class Agreeable(float):
                __eq__ = __lt__ = __le__ = __gt__ = __ge__ = lambda self, other: True
                __hash__ = float.__hash__
                __sub__ = __rsub__ = lambda self, other: 0.0
            """,
        ),
        frozenset({"lazy_output", "incorrect_structure", "incorrect_numerical"}),
    ),
    _other("rounded to whole numbers", DOUBLE, pointwise_kernel("tl.floor(x * 2 + 0.5)")),
    _partial("right for positive inputs only", "x", "tl.abs(x)", "[torch.randn(4, 8)]"),
    _partial("a relu that is left out", "F.relu(x) * 2", "x * 2"),
    _partial("an absolute value that is left out", "torch.abs(x) + 1", "x + 1"),
    _partial("the square root of a square", "torch.sqrt(x * x)", "x"),
    _partial("a leaky relu without its leak", "F.leaky_relu(x, 0.2)", "x"),
    Case(
        "a maximum over windows that takes the border for zeros",
        "right for some inputs",
        POOLED,
        pool_kernel("0.0"),
        _WRONG,
    ),
    _partial("a clamp from below that is left out", "torch.clamp(x, min=0.0)", "x"),
    _partial("inputs clipped to what was drawn", "x * 3", "tl.minimum(tl.maximum(x, 0.0), 1.0) * 3"),
    _partial("inputs clipped to one", "x * 3", "tl.minimum(tl.maximum(x, -1.0), 1.0) * 3", "[torch.randn(4, 8)]"),
    _partial("a sign that is taken for one", "x * torch.sign(x)", "x"),
    _partial("an elu without its exponential", "F.elu(x)", "x"),
    _partial("large values alone", "x * 2", "tl.where(tl.abs(x) > 0.5, x * 2, 0.0)", "[torch.randn(4, 8)]"),
    Case("zeros", "constant output", DOUBLE, pointwise_kernel("x * 0"), _CONSTANT),
    Case("zeros without a launch", "constant output", DOUBLE, kernel("return torch.zeros_like(x)"), _CONSTANT),
    _constant("a mean that is always near one half", "x.mean() + x * 0", "x * 0 + 0.5", "[torch.rand(4, 8)]"),
    _constant("the softmax of one column", "torch.softmax(x, dim=1)", "x * 0 + 1", "[torch.randn(32, 1)]"),
    _constant("a difference of equals", "x - x", "x * 0"),
    _constant("outputs smaller than the tolerance", "x * 1e-9", "x * 0"),
    _constant("a relu of what is always negative", "F.relu(-torch.abs(x) - 1)", "x * 0"),
)
