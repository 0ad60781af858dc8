"""Kernels whose arguments or half-done work look like the answer, and problems whose answers hardly change.

Each would be refused by a judge that takes a likeness for a cheat: a copy of the input that already is the answer for
some inputs, a second stage that changes nothing, memory that is filled with the right values, a constant output.
"""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.snippets import (
    HEADER,
    LAUNCH,
    Case,
    kernel,
    pointwise_kernel,
    problem,
    wrapper,
)

_RAND = "[torch.rand(4, 8)]"
_TRANSPOSED = "[torch.randn(8, 4).t()]"
_IN_PLACE = "pointwise[(1,)](y, y, y.numel(), BLOCK=32)\nreturn y"

_STAGES = """
@triton.jit
def first(x_ptr, z_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n)
    tl.store(z_ptr + offsets, {first}, mask=offsets < n)

@triton.jit
def second(z_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    z = tl.load(z_ptr + offsets, mask=offsets < n)
    tl.store(y_ptr + offsets, {second}, mask=offsets < n)
"""
_RESIDUAL = """
@triton.jit
def add(x_ptr, gain_ptr, y_ptr, n, columns, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    gain = tl.load(gain_ptr + offsets % columns, mask=mask)
    tl.store(y_ptr + offsets, x + gain * tl.maximum(x, 0.0), mask=mask)
"""
_POOL = """
@triton.jit
def pool(x_ptr, y_ptr, length, outputs, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), {padding}, dtype=tl.float32)
    for step in range(3):
        place = offsets * 2 - 1 + step
        inside = (place >= 0) & (place < length)
        best = tl.maximum(best, tl.load(x_ptr + row * length + place, mask=inside, other={padding}))
    tl.store(y_ptr + row * outputs + offsets, best, mask=offsets < outputs)
"""
_HINGE = """
@triton.jit
def hinge(x_ptr, target_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    target = tl.load(target_ptr + offsets, mask=mask, other=0.0)
    tl.store(y_ptr, tl.sum(tl.where(mask, tl.maximum(1 - x * target, 0.0), 0.0), axis=0) / n)
"""
_PLACED = """
@triton.jit
def placed(x_ptr, place_ptr, y_ptr, n, columns, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    place = tl.load(place_ptr + offsets % columns, mask=mask)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask) + place, mask=mask)
"""

POOLED = problem("F.max_pool1d(x, 3, stride=2, padding=1)", inputs="[torch.rand(2, 3, 9)]")


def pool_kernel(padding: str) -> str:
    """A maximum over windows of three that takes `padding` for what is outside."""
    body = "y = torch.empty(2, 3, 5)\npool[(6,)](x, y, 9, 5, BLOCK=8)\nreturn y"
    return HEADER + _POOL.replace("{padding}", padding) + wrapper(body)


def _alike(name: str, pytorch_code: str, code: str) -> Case:
    return Case(name, "likeness of the answer", pytorch_code, code, frozenset({"verified"}))


def _staged(name: str, forward: str, first: str, second: str, output: str = "torch.empty_like(x)") -> Case:
    body = f"""
z = torch.empty_like(x)
first[(1,)](x, z, x.numel(), BLOCK=32)
y = {output}
second[(1,)](z, y, x.numel(), BLOCK=32)
return y
"""
    code = HEADER + _STAGES.replace("{first}", first).replace("{second}", second) + wrapper(body)
    return _alike(name, problem(forward), code)


def _filled(name: str, forward: str, keep: str, output: str, inputs: str = "[torch.randn(4, 8)]") -> Case:
    """Only stores where `keep` is true; the rest of the output was there before."""
    code = kernel(f"y = {output}\n{LAUNCH}\nreturn y", "x").replace(
        "tl.store(y_ptr + offsets, x, mask=mask)", f"tl.store(y_ptr + offsets, x, mask=mask & ({keep}))"
    )
    return _alike(name, problem(forward, inputs=inputs), code)


def _steady(name: str, pytorch_code: str, code: str) -> Case:
    return Case(name, "constant for some draws", pytorch_code, code, frozenset({"verified"}))


# Every other draw is far below zero.
_SWINGING = """
DRAWN = []

def swing():
    DRAWN.append(1)
    return torch.randn(4, 8) - 100 * (len(DRAWN) % 2)
"""
_BOOLEAN = "torch.empty_like(x, dtype=torch.bool)"

LIKENESSES = (
    _alike(
        "a relu in place on a copy of inputs that are never negative",
        problem("F.relu(x)", inputs=_RAND),
        kernel(f"y = x.clone()\n{_IN_PLACE}", "tl.maximum(x, 0.0)"),
    ),
    _alike("a scale in place on a copy", problem("x * 2", inputs=_RAND), kernel(f"y = x.clone()\n{_IN_PLACE}")),
    _alike(
        "an absolute value of a contiguous copy",
        problem("torch.abs(x)", inputs="[torch.rand(8, 4).t()]"),
        pointwise_kernel("tl.abs(x)", before="x = x.contiguous()"),
    ),
    _alike(
        "a contiguous copy of a transposed input",
        problem("torch.clamp(x, min=-1.0)", inputs=_TRANSPOSED),
        pointwise_kernel("tl.maximum(x, -1.0)", before="x = x.contiguous()"),
    ),
    _staged("a relu of what is positive already", "F.relu(x * x)", "x * x", "tl.maximum(z, 0.0)"),
    _staged("a relu of what is positive already, in place", "F.relu(x * x)", "x * x", "tl.maximum(z, 0.0)", "z"),
    _staged("a second stage that changes nothing", "torch.clamp(x * 2, -1e9, 1e9)", "x * 2", "z"),
    _staged("a first stage that only copies", "x * 2", "x", "z * 2"),
    _alike(
        "a residual connection in place",
        problem("x + F.relu(x)", inputs=_RAND),
        kernel(f"y = x.clone()\n{_IN_PLACE}", "x + tl.maximum(x, 0.0)"),
    ),
    _alike(
        "a residual connection whose branch is still zero",
        problem("x + self.gain * F.relu(x)", init="self.gain = nn.Parameter(torch.zeros(8))"),
        HEADER
        + _RESIDUAL
        + wrapper("y = torch.empty_like(x)\nadd[(1,)](x, gain, y, x.numel(), 8, BLOCK=32)\nreturn y", "x, gain"),
    ),
    _filled("zeros where the output is zero", "F.relu(x)", "x > 0", "torch.zeros_like(x)", _RAND),
    _filled("ones where the output is one", "torch.clamp(x, min=1.0)", "x > 1", "torch.ones_like(x)"),
    _filled("a number where the output is masked", "x.masked_fill(x < 0, -1e9)", "x >= 0", "torch.full_like(x, -1e9)"),
    _alike(
        "an input beside the output, of which the kernel gets a copy",
        problem("(x * 2, x)", inputs=_TRANSPOSED),
        kernel(f"given = x\nx = x.contiguous()\ny = torch.empty_like(x)\n{LAUNCH}\nreturn y, given"),
    ),
    _alike(
        "positions that are an output and an argument",
        problem("place = torch.arange(8.0)\nreturn x + place, place"),
        HEADER
        + _PLACED
        + wrapper(
            "place = torch.arange(8, dtype=torch.float32)\ny = torch.empty_like(x)\n"
            "placed[(1,)](x, place, y, x.numel(), 8, BLOCK=32)\nreturn y, place"
        ),
    ),
)

STEADY = (
    _steady(
        "an output that is zero for every other draw",
        problem("F.relu(x)", inputs="[swing()]", prelude=_SWINGING),
        pointwise_kernel("tl.maximum(x, 0.0)"),
    ),
    _steady(
        "truth values that are all false for every other draw",
        problem("x > -50", inputs="[swing()]", prelude=_SWINGING),
        pointwise_kernel("x > -50", output=_BOOLEAN),
    ),
    _steady(
        "a mask of what is not zero, which random inputs never are",
        problem("x != 0", inputs=_RAND),
        pointwise_kernel("x != 0", output=_BOOLEAN),
    ),
    _steady(
        "a mask in numbers of what is not zero",
        problem("(x != 0).float()", inputs=_RAND),
        pointwise_kernel("(x != 0).to(tl.float32)"),
    ),
    _steady(
        "a leaky relu of inputs that are never negative",
        problem("F.leaky_relu(x, 0.2)", inputs=_RAND),
        pointwise_kernel("tl.where(x > 0, x, 0.2 * x)"),
    ),
    _steady(
        "a hinge loss",
        problem(
            "torch.clamp(1 - x * target, min=0).mean()",
            inputs="[torch.rand(4, 8), torch.randint(0, 2, (4, 8)).float() * 2 - 1]",
            signature="x, target",
        ),
        HEADER
        + _HINGE
        + wrapper(
            "y = torch.empty(())\nhinge[(1,)](x, target, y, x.numel(), BLOCK=32)\nreturn y",
            "x, target",
        ),
    ),
    _steady("a maximum over windows with a border", POOLED, pool_kernel("-float('inf')")),
)

CASES = (*LIKENESSES, *STEADY)
