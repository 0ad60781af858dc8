"""How inputs, weights and buffers reach a kernel: by name, by position, with defaults, through a ModelNew."""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.honest.memory import SCALE_KERNEL
from triton_sft_pipeline_tests.verification.snippets import (
    CALL,
    DOUBLE,
    HEADER,
    Case,
    kernel,
    pointwise,
    problem,
    wrapper,
)

_SCALED = problem("x * self.gain", init="self.gain = nn.Parameter(torch.randn(8))")
_NORMALISED = problem("x * self.norm.weight", init="self.norm = nn.LayerNorm(8); nn.init.normal_(self.norm.weight)")
_BUFFER = problem("x * self.mask", init="self.register_buffer('mask', torch.randn(8), persistent=False)")


def _weight(name: str, pytorch_code: str, weight: str, signature: str, kind: str = "weights") -> Case:
    body = f"y = torch.empty_like(x)\nscale[(1,)](x, {weight}, y, x.numel(), x.shape[-1], BLOCK=32)\nreturn y"
    return Case(name, kind, pytorch_code, HEADER + SCALE_KERNEL + wrapper(body, signature), frozenset({"verified"}))


def _plain(name: str, kind: str, pytorch_code: str, code: str) -> Case:
    return Case(name, kind, pytorch_code, code, frozenset({"verified", "verified_hybrid"}))


MODEL_NEW = """
class ModelNew(torch.nn.Module):
    def __init__(self, features, factor=1.0):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(features))
        self.factor = factor

    def forward(self, x):
        y = torch.empty_like(x)
        scale[(1,)](x, self.gain * self.factor, y, x.numel(), x.shape[-1], BLOCK=32)
        return y
"""
_WITH_ARGUMENTS = (
    _SCALED.replace("def __init__(self):", "def __init__(self, features, factor=1.0):")
    .replace("torch.randn(8)", "factor * torch.randn(features)")
    .replace("return []", "return [[8], {'factor': 1.0}]")
)

# The rule of `binding` that each of these must be recorded with.
CONTRACTS = {
    "a parameter by its name": "name",
    "a parameter by its dotted name": "name",
    "a parameter that comes before the input": "name",
    "a buffer by its name": "name",
    "a module's weight by its position": "head",
    "a parameter that no module calls weight, by its position": "v1",
    "a parameter with a default, by its position": "v1",
    "parameters as *args": "v1",
    "a ModelNew with arguments and weights": "ModelNew",
}

CASES = (
    _weight("a parameter by its name", _SCALED, "gain", "x, gain"),
    _weight("a parameter by its dotted name", _NORMALISED, "norm_weight", "x, norm_weight"),
    _weight("a parameter that comes before the input", _SCALED, "gain", "gain, x"),
    _weight("a buffer by its name", _BUFFER, "mask", "x, mask", "buffers"),
    _weight("a module's weight by its position", _NORMALISED, "w", "x, w"),
    _weight("a parameter that no module calls weight, by its position", _SCALED, "w", "x, w"),
    _weight("a parameter with a default, by its position", _SCALED, "w", "x, w=None"),
    _weight("parameters as *args", _SCALED, "weights[0]", "x, *weights"),
    _plain("a ModelNew with arguments and weights", "weights", _WITH_ARGUMENTS, HEADER + SCALE_KERNEL + MODEL_NEW),
    _plain(
        "a ModelNew with a buffer",
        "buffers",
        problem("x * self.mask", init="self.register_buffer('mask', torch.randn(8))"),
        HEADER
        + SCALE_KERNEL
        + """
class ModelNew(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(8))

    def forward(self, x):
        y = torch.empty_like(x)
        scale[(1,)](x, self.mask, y, x.numel(), x.shape[-1], BLOCK=32)
        return y
""",
    ),
    _plain(
        "a keyword default",
        "keyword default",
        DOUBLE,
        kernel(CALL.replace("BLOCK=32", "BLOCK=block"), signature="x, block=32"),
    ),
    _plain(
        "a keyword that must be named",
        "keyword default",
        DOUBLE,
        kernel(CALL.replace("BLOCK=32", "BLOCK=block"), signature="x, *, block=32"),
    ),
    _plain(
        "an epsilon by default",
        "keyword default",
        problem("x / (x.abs() + 1e-3)"),
        pointwise("x / (tl.abs(x) + eps)").replace("n, BLOCK", "n, eps, BLOCK")
        + wrapper(CALL.replace("x.numel(), BLOCK", "x.numel(), eps, BLOCK"), "x, eps: float = 1e-3"),
    ),
    _plain(
        "a number among the inputs",
        "arguments",
        problem("x * factor", inputs="[torch.randn(4, 8), 2.0]", signature="x, factor"),
        pointwise("x * factor").replace("n, BLOCK", "n, factor, BLOCK")
        + wrapper(CALL.replace("x.numel(), BLOCK", "x.numel(), factor, BLOCK"), "x, factor"),
    ),
    _plain(
        "a whole number and a truth value among the inputs",
        "arguments",
        problem("x * times if double else x", inputs="[torch.randn(4, 8), 2, True]", signature="x, times, double"),
        kernel(f"assert times == 2 and double is True\n{CALL}", signature="x, times, double"),
    ),
    _plain(
        "a list of tensors among the inputs",
        "arguments",
        problem("xs[0] * 2", inputs="[[torch.randn(4, 8), torch.randn(2)]]", signature="xs"),
        kernel(f"x = xs[0]\n{CALL}", signature="xs"),
    ),
    _plain("inputs as *args", "arguments", DOUBLE, kernel(f"x = tensors[0]\n{CALL}", signature="*tensors")),
    _plain("types on the parameters", "arguments", DOUBLE, kernel(CALL, signature="x: torch.Tensor")),
    _plain(
        "two inputs by name in another order",
        "arguments",
        problem("a - b", inputs="[torch.rand(4, 8), torch.rand(4, 8)]", signature="a, b"),
        pointwise("x - tl.load(b_ptr + offsets, mask=mask)").replace("x_ptr, y_ptr", "x_ptr, b_ptr, y_ptr")
        + wrapper("y = torch.empty_like(a)\npointwise[(1,)](a, b, y, a.numel(), BLOCK=32)\nreturn y", "b, a"),
    ),
)
